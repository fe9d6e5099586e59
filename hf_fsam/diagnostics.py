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
        self._sharpness, self._norm, self._radius, self._perturbed, self._skipped = torch.zeros(
            5, device=self._device
        ).unbind()

    def add_ascent(self, perturbation: Perturbation, unit: Tensor) -> None:
        """unit: what one unit of the plain gradient measures in the ascent gradient's, shape ()."""
        self._perturbed = self._perturbed + (perturbation.radius != 0)
        self._skipped = self._skipped + perturbation.skipped
        self._radius = self._radius + perturbation.radius
        self._norm = self._norm + torch.where(perturbation.skipped, 0.0, perturbation.gradient_norm / unit)

    def add_sharpness(self, rise: Tensor, skipped: Tensor) -> None:
        """rise: ℓ(θ+ε) − ℓ(θ) of one micro-batch, as it counts in the loss that is logged, shape ()."""
        self._sharpness = self._sharpness + torch.where(skipped, 0.0, rise.float())

    def count_step(self) -> None:
        """An optimizer step begins."""
        self._steps += 1

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The means since the last call, over all processes; empty where there was no step."""
        if self._steps == 0:
            return {}
        sums = torch.stack([self._sharpness, self._norm, self._radius, self._perturbed, self._skipped])
        sharpness, norm, radius, perturbed, skipped = accelerator.reduce(sums, "mean").tolist()
        perturbed = perturbed or 1.0
        logs = {
            "fsam/sharpness": sharpness / self._steps,
            "fsam/ascent_grad_norm": norm / perturbed,
            "fsam/radius": radius / perturbed,
            "fsam/skipped": skipped,
        }
        self.clear()
        return logs
