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


_CHANGES = ("sharpness", "functional_sharpness")
_SUMS = ("gradient_norm", "radius", "perturbed", "skipped", "not_finite", *_CHANGES)


class LoggedMeans:
    """The means for the next line of the log. Their sums stay on the device, so that the host waits for them only where
    it logs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        self._steps = 0
        self._sums = dict.fromkeys(_SUMS, torch.zeros((), device=self._device))
        self._steps_with = dict.fromkeys(_CHANGES, 0)  # how many steps had such a change
        self._last_with = dict.fromkeys(_CHANGES, 0)

    def count_step(self) -> None:
        """An optimizer step begins."""
        self._steps += 1

    def add_ascent(self, perturbation: Perturbation, unit: Tensor) -> None:
        """unit: what one unit of the plain gradient measures in the ascent gradient's, shape ()."""
        self._add("perturbed", perturbation.radius != 0)
        self._add("skipped", perturbation.skipped)
        self._add("radius", perturbation.radius)
        self._add("gradient_norm", torch.where(perturbation.skipped, 0.0, perturbation.gradient_norm / unit))

    def add_second(self, not_finite: Tensor) -> None:
        """not_finite: the second pass computed infinity or NaN where the clean one did not; shape (), bool."""
        self._add("not_finite", not_finite)

    def add_change(self, name: str, change: Tensor, skipped: Tensor) -> None:
        """change: ℓ(θ+ε) − ℓ(θ) of a micro-batch, or an estimate of it, as it counts in the logged loss, shape ()."""
        change = change.float()
        self._add(name, torch.where(skipped | ~change.isfinite(), 0.0, change))
        self._steps_with[name] += self._last_with[name] != self._steps
        self._last_with[name] = self._steps

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The means since the last call, over all processes; empty where there was no step.

        All processes reduce the same numbers, although not all need have seen the same changes: one may have read the
        logits of its batches for a metric.
        """
        if self._steps == 0:
            return {}
        counts = torch.tensor(list(self._steps_with.values()), dtype=torch.float32, device=self._device)
        sums = torch.cat([torch.stack([value.float() for value in self._sums.values()]), counts])
        means = accelerator.reduce(sums, "mean").tolist()
        self.clear()
        mean = dict(zip(_SUMS, means, strict=False))
        steps_with = dict(zip(_CHANGES, means[len(_SUMS) :], strict=True))
        perturbed = mean["perturbed"] or 1.0
        return {
            **{f"fsam/{name}": mean[name] / steps_with[name] for name in _CHANGES if steps_with[name]},
            "fsam/ascent_grad_norm": mean["gradient_norm"] / perturbed,
            "fsam/radius": mean["radius"] / perturbed,
            "fsam/skipped": mean["skipped"],
            "fsam/not_finite": mean["not_finite"],
        }


class FSAMSettings(TrainerCallback, ExportableState):
    """Writes the `fsam_*` fields into `trainer_state.json`, and warns where a resumed run has others.

    Attributes:
        settings: of the last step.
        first: of the start of the training. A schedule of ρ begins there again in a resumed run, before it goes on.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = self.first = settings

    def state(self) -> dict[str, Any]:
        return {"args": self.settings, "attributes": {"first": self.first}}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.settings = settings_of(args)  # a callback may have changed them, as a schedule of ρ does

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.settings = self.first = settings_of(args)
        # The Trainer saves these settings only where the state has a place for them, which it lacks if a plain Trainer
        # saved the checkpoint.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        first = saved["attributes"].get("first", saved["args"])
        for name, value in first.items():
            now = self.settings.get(name, value)
            if state.global_step and now not in (value, saved["args"].get(name)):
                logger.warning(
                    f"The checkpoint was trained with {name}={value!r} at its start, this run starts with {now!r}. "
                    f"Set it to {value!r} to go on as before."
                )


def settings_of(args: FSAMArguments) -> dict[str, Any]:
    """All `fsam_*` fields by name, as values of Python's own types.

    Raises:
        ValueError: one is out of range.
    """
    check(args)
    return {each.name: getattr(args, each.name) for each in fields(FSAMArguments)}
