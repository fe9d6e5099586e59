"""All that is known of Liger: which of its kernels make the loss.

`use_liger_kernel=True` has `Trainer.train` call Liger with `liger_kernel_config`. Its norms, rotary embeddings and MLPs
are layers like others. Its losses take the place that a split step has to see: `fused_linear_cross_entropy`, on for
nearly all models, is a `forward` of the whole model in which nothing calls the head; `cross_entropy` is another
`torch.nn.functional.cross_entropy` for the whole process, which writes its gradient over the logits.

Read in liger-kernel 0.8.5 and transformers 5.23.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

_LOSSES = ("fused_linear_cross_entropy", "cross_entropy")


def losses_in(config: Mapping[str, bool] | None) -> list[str]:
    """The losses that a `liger_kernel_config` asks for by name."""
    return [name for name in _LOSSES if (config or {}).get(name)]


def makes_the_loss(model: nn.Module) -> bool:
    """Whether Liger has taken over the `forward` of the model, or of the one inside."""
    return any(
        isinstance(module, PreTrainedModel) and str(module.forward.__module__).startswith("liger_kernel.")
        for module in model.modules()
    )


class _PutsBack(TrainerCallback):
    """The Trainer has told Liger by the time that the training begins, and its checkpoints keep the user's settings."""

    def __init__(self, config: dict[str, bool] | None) -> None:
        self.config = config

    def on_train_begin(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        args.liger_kernel_config = self.config


@contextmanager
def losses_left_out(trainer: Trainer) -> Iterator[None]:
    """Inside, and until the training begins, `liger_kernel_config` has none of Liger's losses. The Trainer has no other
    way to be told."""
    args: Any = trainer.args
    puts_back = _PutsBack(args.liger_kernel_config)
    args.liger_kernel_config = {**(args.liger_kernel_config or {}), **dict.fromkeys(_LOSSES, False)}
    trainer.add_callback(puts_back)
    logger.warning_once(
        f"use_liger_kernel=True: Liger's layers are used. Its loss is left out for fsam_variant={args.fsam_variant!r}, "
        "which needs the model's own: with fsam_fused_head a language model makes no logits, either."
    )
    try:
        yield
    finally:
        trainer.remove_callback(puts_back)
        puts_back.on_train_begin(args)  # where it never began
