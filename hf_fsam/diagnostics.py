"""What the user sees of the geometry, in the Trainer's logs."""

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_fsam.perturbation import Perturbation


class LoggedMeans:
    """Means over the logging window, kept on the device: the host asks for them only when it logs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        self._steps = 0
        self._rises: dict[str, Tensor] = {}
        self._norm, self._radius, self._perturbed, self._skipped = torch.zeros(4, device=self._device).unbind()

    def add_ascent(self, perturbation: Perturbation, unit: Tensor) -> None:
        """unit: what one unit of the plain gradient measures in the ascent gradient's, shape ()."""
        self._perturbed = self._perturbed + (perturbation.radius != 0)
        self._skipped = self._skipped + perturbation.skipped
        self._radius = self._radius + perturbation.radius
        self._norm = self._norm + torch.where(perturbation.skipped, 0.0, perturbation.gradient_norm / unit)

    def add_rise(self, name: str, rise: Tensor, skipped: Tensor) -> None:
        """rise: what θ+ε makes of one micro-batch's loss, as it counts in the loss that is logged, shape ()."""
        rise = torch.where(skipped, 0.0, rise.float())
        self._rises[name] = self._rises[name] + rise if name in self._rises else rise

    def count_step(self) -> None:
        """An optimizer step begins."""
        self._steps += 1

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The means since the last call, over all processes; empty where there was no step."""
        if self._steps == 0:
            return {}
        sums = torch.stack([self._norm, self._radius, self._perturbed, self._skipped, *self._rises.values()])
        norm, radius, perturbed, skipped, *rises = accelerator.reduce(sums, "mean").tolist()
        perturbed = perturbed or 1.0
        logs = {
            **{f"fsam/{name}": rise / self._steps for name, rise in zip(self._rises, rises, strict=True)},
            "fsam/ascent_grad_norm": norm / perturbed,
            "fsam/radius": radius / perturbed,
            "fsam/skipped": skipped,
        }
        self.clear()
        return logs
