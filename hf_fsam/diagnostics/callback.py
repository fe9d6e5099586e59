"""The callback that writes the probe's measurements into the Trainer's log."""

import math
import operator
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from hf_fsam.diagnostics.probe import Probe, ratio
from hf_fsam.functional_sam import FunctionalSAM
from hf_fsam.optimizer_state import check_keeps_second_moment

logger = logging.get_logger(__name__)

# What is logged, with the prefix fsam/. All processes reduce these in this order, whatever each could measure.
MEASURED = (
    "logit_path",
    "functional_path",
    "logit_to_functional",
    "path_cosine",
    "rise_ascent",
    "rise_random",
    "logit_entropy",
    "logit_norm",
    "top_curvature",
)


class FSAMDiagnosticsCallback(TrainerCallback):
    """Logs, every so many optimizer steps, whether SAM's gradient comes from the logits' statistics or the function.

    It needs an `FSAMTrainer` in one process or under DDP, and works with any `fsam_variant`, `none`
    included. ε follows from `fsam_rho`, `fsam_precondition` and each batch's own gradient. The log gets these values as
    means over the batches; docs/diagnostics.md says how to read them:

        fsam/logit_path            ‖J(θ)ᵀ(u(θ+ε) − u(θ))‖
        fsam/functional_path       ‖(J(θ+ε) − J(θ))ᵀu(θ)‖
        fsam/logit_to_functional   their ratio
        fsam/path_cosine           their cosine
        fsam/rise_ascent           ℓ(θ+ε) − ℓ(θ)
        fsam/rise_random           the same for random ε of norm ρ
        fsam/logit_entropy         entropy of softmax(z), nats
        fsam/logit_norm            ‖z − mean z‖
        fsam/top_curvature         the Hessian's eigenvalue of largest magnitude, on the first batch

    Args:
        every: the number of optimizer steps from one measurement to the next. A measurement costs about 5 steps of
            plain training for each batch, and up to 40 for the eigenvalue. It needs memory for up to seven copies of
            the trainable weights, for the logits and two of their cotangents (it does without the fused head) and, for
            the eigenvalue, for the graph of a backward pass. Where the memory does not suffice, a line in the log says
            what was not measured.
        batches: the number of micro-batches, the first of the training and always the same.

    Raises:
        ValueError: `every` or `batches` is not a count; at the beginning of the training, the Trainer is not an
            FSAMTrainer, it shards weights or gradients over processes, or fsam_rho is 0.
    """

    def __init__(self, every: int, batches: int = 2) -> None:
        for name, value in (("every", every), ("batches", batches)):
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise ValueError(f"FSAMDiagnosticsCallback: {name}={value!r} is not a count: give 1 or more.")
        self.every, self.batches = operator.index(every), operator.index(batches)
        self.fsam: FunctionalSAM | None = None  # FSAMMixin.train sets it
        self._probe: Probe | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.fsam is None:
            raise ValueError("FSAMDiagnosticsCallback needs an FSAMTrainer to measure: give it to an FSAMTrainer.")
        if not args.fsam_rho > 0:
            raise ValueError(
                f"fsam_rho={args.fsam_rho!r}: FSAMDiagnosticsCallback needs a radius above 0 to measure at. Set "
                "fsam_rho, with fsam_variant='none' to train plainly."
            )
        if args.fsam_precondition:
            check_keeps_second_moment(self.fsam.trainer.optimizer)
        self._probe = Probe(self.fsam, self.batches)
        self.fsam.probes.append(self._probe)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        probe = self._probe
        if probe is None or not probe.batches or not args.fsam_rho > 0 or state.global_step % self.every != 0:
            return
        should_log = control.should_log
        # Not through the trainer's own `log`: TRL's adds the metrics that it has gathered for the Trainer's next line.
        Trainer.log(probe.trainer, diagnose(probe, args.fsam_rho))
        control.should_log = should_log  # the call above clears it, and the Trainer's own line is still due


def diagnose(probe: Probe, rho: float) -> dict[str, float]:
    """Measures what `FSAMDiagnosticsCallback` logs, averaged over the batches and processes.

    Values that some process could not measure are left out.
    """
    found: dict[str, float] = {}
    try:
        with probe.measuring():
            each = []
            for batch in probe.batches:
                paths = probe.paths(batch, rho)
                each.append(
                    {
                        "logit_path": paths.logit,
                        "functional_path": paths.functional,
                        "logit_to_functional": ratio(paths.logit, paths.functional),
                        "path_cosine": paths.cosine,
                        "rise_ascent": paths.loss_change,
                        "rise_random": probe.random_loss_change(batch, rho),
                        **probe.logits(batch),
                    }
                )
            found = {name: sum(values[name] for values in each) / len(each) for name in each[0]}
            try:  # this takes the most memory, and the other values do not depend on it
                found["top_curvature"] = probe.top_curvature(probe.batches[0])
            except torch.OutOfMemoryError:
                logger.warning("fsam/top_curvature is not logged: the device has not enough memory to measure it.")
    except torch.OutOfMemoryError:
        logger.warning(
            "The diagnostics are not logged: the device has not enough memory to measure beside the training."
        )
    values = torch.tensor([found.get(name, math.nan) for name in MEASURED], device=probe.device)
    means = probe.trainer.accelerator.reduce(values, "mean").tolist()
    return {f"fsam/{name}": value for name, value in zip(MEASURED, means, strict=True) if not math.isnan(value)}
