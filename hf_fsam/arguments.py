"""The `fsam_*` training arguments, with their defaults, help texts and checks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers import TrainingArguments

from hf_fsam.mistakes import did_you_mean

Variant = Literal["none", "sam", "functional", "logit"]
AscentScope = Literal["micro_batch", "optimizer_step", "rank"]
AscentDirection = Literal["gradient", "momentum"]

# A smaller ε is lost when the weights are rounded, and a greater one overflows float32. Either way the run would train
# plainly without saying so.
_LEAST_RHO, _MOST_RHO = 1e-12, 1e6
_MOST_STEPS = 2**31 - 1


@dataclass
class FSAMArguments:
    """The `fsam_*` fields alone. Put the class before any subclass of `TrainingArguments` to extend it, e.g. for TRL:

        @dataclass
        class FSAMSFTConfig(FSAMArguments, SFTConfig):
            pass

    Raises:
        ValueError: a field is out of range. The message names the field, its value and the values that it takes.
    """

    # ---- The perturbation ----

    fsam_variant: Variant = field(
        default="functional",
        metadata={
            "help": "Which factors of the gradient are taken at the perturbed weights. functional: the Jacobian of the "
            "network, while the cotangent (the loss derivative at the logits) stays that of the unperturbed weights "
            "(Functional-SAM). sam: both (Foret et al. 2021). logit: the cotangent, which takes three forward passes "
            "and is meant for diagnosis. none: neither, the plain Trainer."
        },
    )
    fsam_rho: float = field(
        default=0.03,
        metadata={
            "help": "L2 norm of the perturbation over all trainable weights together. With 0 the training is that of "
            "fsam_variant='none'."
        },
    )
    fsam_precondition: bool = field(
        default=False,
        metadata={
            "help": "Perturb along g / (sqrt(v) + eps) instead of the gradient g, with the bias-corrected second "
            "moment v and the eps of the optimizer. This needs Adam, AdamW, NAdam, RAdam or an optimizer that keeps "
            "its state as they do."
        },
    )

    # ---- The ascent ----

    fsam_ascent_scope: AscentScope = field(
        default="micro_batch",
        metadata={
            "help": "The data whose gradient gives the perturbation. micro_batch: this micro-batch, averaged over the "
            "processes. optimizer_step: all micro-batches of the optimizer step on all processes, as the paper defines "
            "it; the cotangents of all of them are kept in memory. rank: this micro-batch on this process, without "
            "communication (m-SAM)."
        },
    )
    fsam_ascent_direction: AscentDirection = field(
        default="gradient",
        metadata={
            "help": "gradient: perturb along the gradient of the clean pass, so that a step takes two passes. "
            "momentum: perturb along the optimizer's momentum. Then the clean pass is only a forward pass, and a step "
            "takes 1.33 passes; the first step has no momentum yet and takes the gradient. For "
            "fsam_variant='functional' only."
        },
    )
    fsam_every_steps: int = field(
        default=1,
        metadata={
            "help": "Perturb in every k-th optimizer step only. The steps in between are those of the plain Trainer."
        },
    )

    # ---- The boundary and the head ----

    fsam_boundary: str | None = field(
        default=None,
        metadata={
            "help": "Name, as in model.named_modules(), of the module whose output ends the network and begins the "
            "loss; or several names with commas between them, where several modules make together what the loss takes. "
            "It is found automatically for language models, for the usual classification and question answering heads, "
            "and for the models of sentence-transformers."
        },
    )
    fsam_fused_head: bool = field(
        default=True,
        metadata={
            "help": "Compute the loss and cotangents of a language model from its final hidden states, chunk by chunk, "
            "so that the logits are never in memory. Where this is not known to be exact for the model or the loss, "
            "the log says so once and the logits are computed."
        },
    )
    fsam_offload_hidden_states: bool = field(
        default=False,
        metadata={
            "help": "Move the final hidden states to the host's memory until the second pass needs them. This helps "
            "with fsam_ascent_scope='optimizer_step', where those of all micro-batches are kept."
        },
    )

    # ---- Diagnostics ----

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
    """`transformers.TrainingArguments` with the fields of `FSAMArguments`."""

    __repr__ = TrainingArguments.__repr__  # which hides tokens


def check(args: FSAMArguments) -> None:
    """Raises the `ValueError` of `FSAMArguments`.

    The trainer calls it again during the training, since a hyperparameter search or a callback may set fields. A NumPy
    number, a tensor of one number, a fraction and text from YAML are replaced by the number of Python's own that they
    equal, because a checkpoint can't hold the others.
    """
    for name, checked in _CHECKS.items():
        value = getattr(args, name)
        plain = checked(name, value)
        if plain is not value:
            setattr(args, name, plain)
    if args.fsam_ascent_direction == "momentum" and args.fsam_variant in ("sam", "logit"):
        raise ValueError(
            f"fsam_ascent_direction='momentum' is for fsam_variant='functional', not {args.fsam_variant!r}: its clean "
            "pass gives the cotangent and no gradient. Set fsam_ascent_direction='gradient'."
        )


def plain_passes(args: FSAMArguments) -> float:
    """The cost of a step in passes of plain training, averaged over the training. A forward pass is a third of one.

    The fused head takes less than this: its second pass makes no forward pass through the head.
    """
    if args.fsam_variant == "none" or args.fsam_rho == 0:
        return 1.0
    ascent = 1 / 3 if args.fsam_ascent_direction == "momentum" else 1.0
    if args.fsam_variant == "logit":  # one more forward pass, at θ+ε, for the cotangent
        ascent += 1 / 3
    return 1.0 + ascent / args.fsam_every_steps


def _choice(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if isinstance(value, str) and value in choices:
            return choices[choices.index(value)]  # Python's own text in place of NumPy's or an enumeration's
        raise ValueError(
            f"{name}={_shown(value)} is unknown: choose one of {', '.join(map(repr, choices))}."
            f"{did_you_mean(value, choices) if isinstance(value, str) else ''}"
        )

    return check


def _radius(name: str, value: Any) -> float:
    rho = _number(value)
    if rho is not None and (rho == 0 or _LEAST_RHO <= rho <= _MOST_RHO):
        return rho
    raise ValueError(
        f"{name}={_shown(value)} is not a radius: give 0 (which trains like 'none') or a number from {_LEAST_RHO:g} to "
        f"{_MOST_RHO:g}. 0.03 is a good start."
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
        f"{name}={_shown(value)} is not a module's name: give one of model.named_modules(), or several with commas "
        "between them, or None to have the head found automatically."
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
    """The value as a float. None where it is no number, several numbers, or one that a float can't hold."""
    if type(value) is float:
        return value
    if _is_truth(value) or "complex" in str(getattr(value, "dtype", "")):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        return None


def _is_truth(value: Any) -> bool:
    """Whether the value is a bool, Python's or NumPy's, or a tensor of one."""
    if isinstance(value, bool):
        return True
    return str(getattr(value, "dtype", "")) in ("bool", "torch.bool") and value.ndim == 0


def _shown(value: object, most: int = 80) -> str:
    try:
        text = repr(value)
    except Exception:  # e.g. Python does not print integers of thousands of digits
        text = f"a {type(value).__name__} that can't be printed"
    return text if len(text) <= most else f"{text[: most - 3]}..."
