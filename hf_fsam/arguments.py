"""The `fsam_*` training arguments: their defaults, their help texts, their checks."""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, get_args

from transformers import TrainingArguments

Variant = Literal["none", "sam", "functional", "logit"]
AscentScope = Literal["micro_batch", "optimizer_step", "rank"]
AscentDirection = Literal["gradient", "momentum"]


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
        if isinstance(self.fsam_rho, str):  # YAML reads 5e-2, without a point, as one
            with suppress(ValueError):
                self.fsam_rho = float(self.fsam_rho)
        check(self)
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()


@dataclass
class FSAMTrainingArguments(FSAMArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the fields of :class:`FSAMArguments`."""


def check(args: FSAMArguments) -> None:
    """Raises the `ValueError` of :class:`FSAMArguments`, also for fields that were set after it was made, as a
    hyperparameter search or a callback does."""
    _check_choice("fsam_variant", args.fsam_variant, get_args(Variant))
    _check_choice("fsam_ascent_scope", args.fsam_ascent_scope, get_args(AscentScope))
    _check_choice("fsam_ascent_direction", args.fsam_ascent_direction, get_args(AscentDirection))
    if args.fsam_ascent_direction == "momentum" and args.fsam_variant in ("sam", "logit"):
        raise ValueError(
            f"fsam_ascent_direction='momentum' is for fsam_variant='functional', not {args.fsam_variant!r}: what is "
            "left of the clean pass is there for the cotangent."
        )
    if not (_is_number(args.fsam_rho) and args.fsam_rho >= 0):
        raise ValueError(f"fsam_rho={args.fsam_rho!r} is not a radius: give a finite number, zero or above.")
    if not (isinstance(args.fsam_every_steps, int) and _is_number(args.fsam_every_steps) and args.fsam_every_steps > 0):
        raise ValueError(f"fsam_every_steps={args.fsam_every_steps!r} is not a count of steps: give 1 or more.")
    if not (isinstance(args.fsam_diagnostics_steps, int) and args.fsam_diagnostics_steps >= 0):
        raise ValueError(
            f"fsam_diagnostics_steps={args.fsam_diagnostics_steps!r} is not a count of steps: give 0 (never) or more."
        )
    for name in ("fsam_precondition", "fsam_fused_head", "fsam_offload_hidden_states"):
        if not isinstance(getattr(args, name), bool):
            raise ValueError(f"{name}={getattr(args, name)!r} is neither True nor False.")
    if args.fsam_boundary is not None and not (isinstance(args.fsam_boundary, str) and args.fsam_boundary):
        raise ValueError(
            f"fsam_boundary={args.fsam_boundary!r} is not a module's name: give one of model.named_modules(), or "
            "leave it out to have the head found."
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


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}.")
