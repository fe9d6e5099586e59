"""What a training leaves in the Trainer's logs and its checkpoints' state."""

from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_fsam.arguments import FSAMArguments, check
from hf_fsam.perturbation import Perturbation

logger = logging.get_logger(__name__)


class LoggedMeans:
    """Means over the logging window, kept on the device: the host asks for them only when it logs."""

    _CHANGES = ("sharpness", "functional_sharpness")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        self._steps = 0
        self._changes = {name: torch.zeros((), device=self._device) for name in self._CHANGES}
        self._changed = dict.fromkeys(self._CHANGES, 0)  # in how many steps there was such a change
        self._last_changed = dict.fromkeys(self._CHANGES, 0)
        sums = torch.zeros(5, device=self._device).unbind()
        self._norm, self._radius, self._perturbed, self._skipped, self._not_finite = sums

    def add_ascent(self, perturbation: Perturbation, unit: Tensor) -> None:
        """unit: what one unit of the plain gradient measures in the ascent gradient's, shape ()."""
        self._perturbed = self._perturbed + (perturbation.radius != 0)
        self._skipped = self._skipped + perturbation.skipped
        self._radius = self._radius + perturbation.radius
        self._norm = self._norm + torch.where(perturbation.skipped, 0.0, perturbation.gradient_norm / unit)

    def add_second(self, not_finite: Tensor) -> None:
        """not_finite: the second pass computed what is not a number, where the clean one did not; shape (), bool."""
        self._not_finite = self._not_finite + not_finite

    def add_change(self, name: str, change: Tensor, skipped: Tensor) -> None:
        """change: what θ+ε makes of one micro-batch's loss, as it counts in the loss that is logged, shape ()."""
        change = change.float()
        self._changes[name] = self._changes[name] + torch.where(skipped | ~change.isfinite(), 0.0, change)
        if self._last_changed[name] != self._steps:
            self._last_changed[name] = self._steps
            self._changed[name] += 1

    def count_step(self) -> None:
        """An optimizer step begins."""
        self._steps += 1

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The means since the last call, over all processes; empty where there was no step.

        Processes need not have seen the same changes: one may read the logits of its batches for a metric.
        """
        if self._steps == 0:
            return {}
        sums = [self._norm, self._radius, self._perturbed, self._skipped, self._not_finite, *self._changes.values()]
        counts = torch.tensor(list(self._changed.values()), dtype=torch.float32, device=self._device)
        means = accelerator.reduce(torch.cat([torch.stack(sums), counts]), "mean").tolist()
        norm, radius, perturbed, skipped, not_finite, *changes = means
        perturbed = perturbed or 1.0
        by_name = zip(self._CHANGES, changes[: len(self._CHANGES)], changes[len(self._CHANGES) :], strict=True)
        logs = {
            **{f"fsam/{name}": change / steps for name, change, steps in by_name if steps},
            "fsam/ascent_grad_norm": norm / perturbed,
            "fsam/radius": radius / perturbed,
            "fsam/skipped": skipped,
            "fsam/not_finite": not_finite,
        }
        self.clear()
        return logs


class FSAMSettings(TrainerCallback, ExportableState):
    """Writes the `fsam_*` fields into `trainer_state.json`, and says so where a resumed run changes them."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def state(self) -> dict[str, Any]:
        return {"args": self.settings, "attributes": {}}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.settings = settings_of(args)  # a schedule of ρ, say, changes them

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.settings = settings_of(args)
        # A plain Trainer's checkpoint has no place for these settings, which the Trainer needs to save them to.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        for name, value in saved["args"].items():
            if state.global_step and self.settings.get(name, value) != value:
                logger.warning(
                    f"The checkpoint was trained with {name}={value!r}, this run goes on with {self.settings[name]!r}. "
                    f"Set it to {value!r} to go on as before."
                )


def settings_of(args: FSAMArguments) -> dict[str, Any]:
    check(args)  # and makes them Python's own
    return {each.name: getattr(args, each.name) for each in fields(FSAMArguments)}
