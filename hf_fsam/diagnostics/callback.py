"""What the user sees of the geometry, in the Trainer's logs."""

import math
import operator
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from hf_fsam.diagnostics.probe import Probe, ratio
from hf_fsam.optimizer_state import check_keeps_second_moment

logger = logging.get_logger(__name__)


class FSAMDiagnosticsCallback(TrainerCallback):
    """Logs, every so many optimizer steps, whether SAM's gradient would come from the logits' statistics.

    For an :class:`~hf_fsam.FSAMTrainer` in one process or under DDP, whatever its `fsam_variant`, `none` as well. ε is
    that of `fsam_rho` and `fsam_precondition` on each batch's gradient. The log gets, as means over the batches
    (docs/DIAGNOSTICS.md says how to read them):

        fsam/logit_path            ‖J(θ)ᵀ(u(θ+ε) − u(θ))‖
        fsam/functional_path       ‖(J(θ+ε) − J(θ))ᵀu(θ)‖
        fsam/logit_to_functional   their ratio
        fsam/path_cosine           their cosine
        fsam/rise_ascent           ℓ(θ+ε) − ℓ(θ)
        fsam/rise_random           the same along random directions of norm ρ
        fsam/logit_entropy         entropy of softmax(z), nats
        fsam/logit_norm            ‖z − mean z‖
        fsam/top_curvature         the Hessian's eigenvalue of largest magnitude, on the first batch

    Args:
        every: optimizer steps. One measurement costs about 5 steps of plain training for each batch, and up to 40 for
            the eigenvalue. It holds up to seven copies of the trainable weights, the logits and two of their cotangents
            (no fused head) and, for the eigenvalue, the graph of a backward pass. Where memory does not last, it is
            left out with a line in the log.
        batches: the first so many micro-batches of the training, the same ones each time.

    Raises:
        ValueError: `every` or `batches` is not a count; at the beginning of the training, with another Trainer than
            FSAMTrainer, under DeepSpeed or FSDP, and with fsam_rho=0.
    """

    def __init__(self, every: int, batches: int = 2) -> None:
        for name, value in (("every", every), ("batches", batches)):
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise ValueError(f"FSAMDiagnosticsCallback: {name}={value!r} is not a count: give 1 or more.")
        self.every, self.batches = operator.index(every), operator.index(batches)
        self.trainer: Any = None  # FSAMMixin.train puts itself here
        self._probe: Probe | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer is None:
            raise ValueError("FSAMDiagnosticsCallback measures with what FSAMTrainer has: give it to an FSAMTrainer.")
        if not args.fsam_rho > 0:
            raise ValueError(f"fsam_rho={args.fsam_rho!r}: FSAMDiagnosticsCallback needs a radius to look along.")
        if args.fsam_precondition:
            check_keeps_second_moment(self.trainer.optimizer)
        self._probe = Probe(self.trainer, self.batches)
        self.trainer.fsam.probes.append(self._probe)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (
            self._probe is not None
            and self._probe.batches
            and args.fsam_rho > 0
            and state.global_step % self.every == 0
        ):
            due = control.should_log
            # Not the trainer's own `log`, which in TRL takes what has gathered for the Trainer's line.
            Trainer.log(self.trainer, diagnose(self._probe, args.fsam_rho))
            control.should_log = due  # the Trainer takes its own line to be written


def diagnose(probe: Probe, rho: float) -> dict[str, float]:
    """What :class:`FSAMDiagnosticsCallback` logs, over all processes; without what could not be measured."""
    try:
        with probe.measuring():
            each = [_diagnose_batch(probe, batch, rho) for batch in probe.batches]
            found = {name: sum(values[name] for values in each) / len(each) for name in each[0]}
            try:  # takes the most memory, and the others do not need it
                found["top_curvature"] = probe.top_curvature(probe.batches[0])
            except torch.OutOfMemoryError:
                logger.warning("fsam/top_curvature is left out: the device has not enough memory for it.")
    except torch.OutOfMemoryError:
        logger.warning("The diagnostics are left out: the device has not enough memory for them beside the training.")
        found = {}
    values = torch.tensor([found.get(name, math.nan) for name in _MEASURED], device=probe.device)
    means = probe.trainer.accelerator.reduce(values, "mean").tolist()
    return {f"fsam/{name}": value for name, value in zip(_MEASURED, means, strict=True) if not math.isnan(value)}


_MEASURED = (
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


def _diagnose_batch(probe: Probe, batch: dict[str, Any], rho: float) -> dict[str, float]:
    paths = probe.paths(batch, rho)
    return {
        "logit_path": paths.logit,
        "functional_path": paths.functional,
        "logit_to_functional": ratio(paths.logit, paths.functional),
        "path_cosine": paths.cosine,
        "rise_ascent": paths.rise,
        "rise_random": probe.rise_random(batch, rho),
        **probe.logits(batch),
    }
