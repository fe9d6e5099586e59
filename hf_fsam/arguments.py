"""The `fsam_*` training arguments: their defaults, their help texts, their checks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers import TrainingArguments

Variant = Literal["none", "sam", "functional", "logit"]
AscentScope = Literal["micro_batch", "optimizer_step", "rank"]
AscentDirection = Literal["gradient", "momentum"]

# Outside of these ε is lost in the rounding of the weights, or overflows float32: such a run would be a plain one.
_LEAST_RHO, _MOST_RHO = 1e-12, 1e6
_MOST_STEPS = 2**31 - 1


@dataclass
class FSAMArguments:
    """The fields alone. Put them before any `TrainingArguments` subclass to extend it, e.g. for TRL:

        @dataclass
        class FSAMSFTConfig(FSAMArguments, SFTConfig):
            pass

    Raises:
        ValueError: a field is out of range; the message names the field, its value and what it takes.
    """

    fsam_variant: Variant = field(
        default="functional",
        metadata={
            "help": "What the perturbation moves. functional: the Jacobian alone, the cotangent stays at the "
            "unperturbed weights (Functional-SAM). sam: both (Foret et al. 2021). logit: the cotangent alone, for "
            "diagnosis, three forward passes. none: the plain Trainer."
        },
    )
    fsam_rho: float = field(
        default=0.03,
        metadata={"help": "L2 radius of the perturbation over all trainable weights together. 0 trains like none."},
    )
    fsam_precondition: bool = field(
        default=False,
        metadata={
            "help": "Ascend along g / (sqrt(v) + eps), with the optimizer's bias-corrected second moment v and its own "
            "eps, in place of g. Needs Adam, AdamW, NAdam, RAdam or one that keeps its "
            "state as they do."
        },
    )
    fsam_ascent_scope: AscentScope = field(
        default="micro_batch",
        metadata={
            "help": "Whose gradient gives the perturbation. micro_batch: this micro-batch, averaged over processes. "
            "optimizer_step: the whole gradient accumulation window of all processes, the paper's definition; keeps "
            "the cotangents of the window in memory. rank: this process's micro-batch, no communication (m-SAM)."
        },
    )
    fsam_ascent_direction: AscentDirection = field(
        default="gradient",
        metadata={
            "help": "gradient: of the clean pass, two passes a step. momentum: the optimizer's own, which is there "
            "already: of the clean pass its forward half remains, 1.33 passes a step. The first step, which has none "
            "yet, takes the gradient. Only with fsam_variant='functional'."
        },
    )
    fsam_every_steps: int = field(
        default=1,
        metadata={"help": "Perturb every so many optimizer steps; the steps between are the plain Trainer's."},
    )
    fsam_boundary: str | None = field(
        default=None,
        metadata={
            "help": "Name, as in model.named_modules(), of the module whose output tensor ends the function and begins "
            "the loss. Found by itself for language models and the usual classification and question answering heads."
        },
    )
    fsam_fused_head: bool = field(
        default=True,
        metadata={
            "help": "Compute a language model's loss and cotangents from its final hidden states, chunk by chunk, and "
            "make no logits. Where the model or the loss is not known to allow it, the log says so once and the logits "
            "are made."
        },
    )
    fsam_offload_hidden_states: bool = field(
        default=False,
        metadata={
            "help": "Keep the final hidden states that the fused head needs again in the second pass on the host: with "
            "fsam_ascent_scope='optimizer_step', those of a whole window wait for it."
        },
    )

    fsam_diagnostics_steps: int = field(
        default=0,
        metadata={
            "help": "Every so many optimizer steps, measure on two batches and log whether SAM's gradient comes from "
            "the logits' statistics or from the function (FSAMDiagnosticsCallback). 0: never."
        },
    )

    def __post_init__(self) -> None:
        check(self)
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()


@dataclass
class FSAMTrainingArguments(FSAMArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the fields of :class:`FSAMArguments`."""


def check(args: FSAMArguments) -> None:
    """Raises the `ValueError` of :class:`FSAMArguments`, also for fields that were set after it was made, as a
    hyperparameter search or a callback does, and puts Python's own values in the place of what is alike: a number of
    NumPy's, a tensor of one number, a fraction, text from YAML. Others can't be saved with a checkpoint."""
    for name, checked in _CHECKS.items():
        value = getattr(args, name)
        own = checked(name, value)
        if own is not value:
            setattr(args, name, own)
    if args.fsam_ascent_direction == "momentum" and args.fsam_variant in ("sam", "logit"):
        raise ValueError(
            f"fsam_ascent_direction='momentum' is for fsam_variant='functional', not {args.fsam_variant!r}: what is "
            "left of the clean pass is there for the cotangent. Set fsam_ascent_direction='gradient'."
        )


def plain_passes(args: FSAMArguments) -> float:
    """What a step costs, in passes of plain training (a forward pass is a third of one), over the whole training.

    By what is computed: the fused head, whose second pass needs no forward through the head, takes less.
    """
    if args.fsam_variant == "none" or args.fsam_rho == 0:
        return 1.0
    ascent = 1 / 3 if args.fsam_ascent_direction == "momentum" else 1.0
    if args.fsam_variant == "logit":  # and a forward pass at θ+ε for the cotangent
        ascent += 1 / 3
    return 1.0 + ascent / args.fsam_every_steps


def _choice(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if isinstance(value, str) and value in choices:
            return choices[choices.index(value)]  # what is alike, as NumPy's text or an enumeration's
        raise ValueError(f"{name}={_shown(value)} is unknown: choose one of {', '.join(map(repr, choices))}.")

    return check


def _radius(name: str, value: Any) -> float:
    rho = _number(value)
    if rho is not None and (rho == 0 or _LEAST_RHO <= rho <= _MOST_RHO):
        return rho
    raise ValueError(
        f"{name}={_shown(value)} is not a radius: give 0 (trains like 'none') or a number from {_LEAST_RHO:g} to "
        f"{_MOST_RHO:g}; 0.03 is where to begin."
    )


def _count(least: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if type(value) is not int:
            number = _number(value)
            value = int(number) if number is not None and number.is_integer() else value
        if type(value) is int and least <= value <= _MOST_STEPS:
            return value
        raise ValueError(
            f"{name}={_shown(value)} is not a count of steps: give a whole number from {least} to {_MOST_STEPS}."
        )

    return check


def _truth(name: str, value: Any) -> bool:
    if _is_truth(value):
        return bool(value)
    raise ValueError(f"{name}={_shown(value)} is neither True nor False: give one of them.")


def _module_name(name: str, value: Any) -> str | None:
    if value is None or (type(value) is str and value):
        return value
    if isinstance(value, str) and value:
        return str.__str__(value)
    raise ValueError(
        f"{name}={_shown(value)} is not a module's name: give one of model.named_modules(), or leave it out to have "
        "the head found."
    )


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "fsam_variant": _choice(get_args(Variant)),
    "fsam_ascent_scope": _choice(get_args(AscentScope)),
    "fsam_ascent_direction": _choice(get_args(AscentDirection)),
    "fsam_rho": _radius,
    "fsam_every_steps": _count(1),
    "fsam_diagnostics_steps": _count(0),
    "fsam_precondition": _truth,
    "fsam_fused_head": _truth,
    "fsam_offload_hidden_states": _truth,
    "fsam_boundary": _module_name,
}


def _number(value: Any) -> float | None:
    """None: it is no number, or more than one, or none that a float holds."""
    if type(value) is float:
        return value
    if _is_truth(value) or "complex" in str(getattr(value, "dtype", "")):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is a tensor's
        return None


def _is_truth(value: Any) -> bool:
    """Python's, NumPy's, or a tensor of one truth value."""
    if isinstance(value, bool):
        return True
    return str(getattr(value, "dtype", "")) in ("bool", "torch.bool") and value.ndim == 0


def _shown(value: object, most: int = 80) -> str:
    try:
        text = repr(value)
    except Exception:  # Python does not print numbers of thousands of digits
        text = f"a {type(value).__name__} that can't be printed"
    return text if len(text) <= most else f"{text[: most - 3]}..."
