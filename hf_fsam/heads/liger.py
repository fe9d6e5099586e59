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
from transformers import PreTrainedModel
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


@contextmanager
def losses_left_out(args: Any) -> Iterator[None]:
    """Inside, `args.liger_kernel_config` has none of Liger's losses. The Trainer has no other way to be told."""
    given = args.liger_kernel_config
    args.liger_kernel_config = {**(given or {}), **dict.fromkeys(_LOSSES, False)}
    logger.warning_once(
        f"use_liger_kernel=True: Liger's layers are used. Its loss is left out for fsam_variant={args.fsam_variant!r}, "
        "which needs the model's own: with fsam_fused_head a language model makes no logits, either."
    )
    try:
        yield
    finally:
        args.liger_kernel_config = given
