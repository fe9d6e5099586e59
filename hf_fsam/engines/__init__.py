"""Who holds the weights. An engine knows how one way of holding them is ascended, perturbed and restored."""

from typing import TYPE_CHECKING

from accelerate.utils import DistributedType

from hf_fsam.engines.base import Ascent, Engine
from hf_fsam.engines.deepspeed import select_deepspeed_engine
from hf_fsam.engines.fsdp import select_fsdp_engine
from hf_fsam.engines.local import LocalEngine, gradients_set_aside
from hf_fsam.refusals import refusals

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["Ascent", "Engine", "LocalEngine", "gradients_set_aside", "select_engine"]


def select_engine(trainer: "Trainer") -> Engine:
    """The engine for the trainer's way of holding its weights.

    Raises:
        ValueError: the trainer's way of running is not supported; the message names it and the cure.
        RuntimeError: DeepSpeed's version is not; the same.
    """
    args, accelerator = trainer.args, trainer.accelerator
    for what, cure in refusals(trainer):
        raise ValueError(f"hf_fsam does not support {what}: {cure}; or set fsam_variant='none'.")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return select_deepspeed_engine(args, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return select_fsdp_engine(args, accelerator)
    return LocalEngine(accelerator)
