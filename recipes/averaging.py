"""Averages of the weights along a training, which are evaluated and saved in place of the weights themselves."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback


@dataclass
class AveragingArguments:
    weight_average: Literal["none", "ema", "swa"] = field(
        default="none",
        metadata={
            "help": "Evaluate and save an average of the weights in place of the weights. ema: exponential, with "
            "average_decay. swa: the mean over the steps after average_from."
        },
    )
    average_decay: float = field(
        default=0.99,
        metadata={
            "help": "For ema: the share of the average kept by a step. The first 1 / (1 - average_decay) steps are "
            "averaged evenly: else the first weights would weigh far too much."
        },
    )
    average_from: float = field(default=0.5, metadata={"help": "For swa: the share of the training to leave out."})

    def __post_init__(self) -> None:
        for name in ("average_decay", "average_from"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a share: give a number from 0 to below 1.")
        if self.weight_average != "none":
            if getattr(self, "save_strategy", "no") != "no":
                raise ValueError(
                    f"weight_average={self.weight_average!r} keeps the average in memory alone, and a checkpoint would "
                    'lack it: set save_strategy="no".'
                )
            if getattr(self, "enable_jit_checkpoint", False):
                self.enable_jit_checkpoint = False
                logging.getLogger(__name__).warning(
                    "weight_average=%r: no checkpoint is saved on SIGTERM, since it would lack the average.",
                    self.weight_average,
                )
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()


class AveragingMixin:
    """Put it before a Trainer class; its arguments have the fields of :class:`AveragingArguments`.

    Raises:
        ValueError: an average is asked for where no process has whole weights, or in a training that is resumed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.weight_average != "none" and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"weight_average={self.args.weight_average!r} needs whole weights, and DeepSpeed and FSDP may shard "
                "them: leave it out, or train with one process or torchrun's DDP."
            )
        self.forget_average()
        if self.args.weight_average != "none":
            self.add_callback(_Update(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint and self.args.weight_average != "none":
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: no checkpoint holds the average that "
                f"weight_average={self.args.weight_average!r} asks for. Start again, or leave weight_average out."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def forget_average(self) -> None:
        self.average: list[Tensor] | None = None
        self.averaged_steps = 0

    def trained_weights(self) -> list[Tensor]:
        return [weight.data for weight in self.model.parameters() if weight.requires_grad]

    def evaluated_weights(self) -> list[Tensor]:
        """The average where there is one, and the weights themselves elsewhere."""
        return self.trained_weights() if self.average is None else self.average

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self.using(self.evaluated_weights()):
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # The Trainer's own call with a folder (5.23) is for a checkpoint, as on SIGTERM: its optimizer's state is of θ.
        of_checkpoint = _internal_call and output_dir is not None
        with nullcontext() if of_checkpoint else self.using(self.evaluated_weights()):
            super().save_model(output_dir, _internal_call=_internal_call)

    @contextmanager
    def using(self, values: list[Tensor]) -> Iterator[None]:
        """Gives the trained weights other values for a while."""
        weights = self.trained_weights()
        if values[0] is weights[0] or values[0].data_ptr() == weights[0].data_ptr():
            yield
            return
        kept = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, values)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    @torch.no_grad()
    def update_average(self) -> None:
        """ā ← ā + w·(θ − ā), with w = 1 − decay for ema, and at the start w = 1 / steps for both."""
        if (
            self.args.weight_average == "swa"
            and self.state.global_step <= self.args.average_from * self.state.max_steps
        ):
            return
        self.averaged_steps += 1
        # In bfloat16 an average would not move: its small steps would be rounded off.
        weights = [weight.float() for weight in self.trained_weights()]
        if self.average is None:
            self.average = [weight.clone() for weight in weights]
            return
        share = 1 / self.averaged_steps
        if self.args.weight_average == "ema":
            share = max(share, 1 - self.args.average_decay)
        torch._foreach_lerp_(self.average, weights, share)


class _Update(TrainerCallback):
    def __init__(self, trainer: AveragingMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:  # again for every trial, and for every batch size
        self.trainer.forget_average()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.update_average()
