"""Who owns the parameters. An engine knows how one way of holding them is ascended, perturbed and restored."""

from typing import TYPE_CHECKING

from accelerate.utils import DistributedType

from hf_fsam.engines.base import Ascent, Engine
from hf_fsam.engines.deepspeed import select_deepspeed_engine
from hf_fsam.engines.fsdp import select_fsdp_engine
from hf_fsam.engines.local import LocalEngine, unwrapped

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["Ascent", "Engine", "LocalEngine", "select_engine", "unwrapped"]

_SUPPORTED = (
    DistributedType.NO,
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
)


def select_engine(trainer: "Trainer") -> Engine:
    """The engine for the trainer's way of holding its parameters.

    Raises:
        ValueError: it is not supported; the message names it and the cure.
    """
    args, accelerator = trainer.args, trainer.accelerator
    parallelism = getattr(accelerator, "parallelism_config", None)
    optim = str(getattr(args.optim, "value", args.optim) or "")
    refused = {
        "DataParallel (n_gpu > 1 without a launcher)": args.n_gpu > 1,
        f"distributed_type={accelerator.distributed_type.value}": accelerator.distributed_type not in _SUPPORTED,
        f"parallel_mode={args.parallel_mode.value!r}": args.parallel_mode.value.startswith(("sagemaker", "tpu")),
        "a model spread over several devices (hf_device_map)": trainer.is_model_parallel,
        "a model sharded at load time (DistributedConfig)": getattr(
            trainer, "is_distributed_loading_by_transformers", False
        ),
        "tensor, context and sequence parallelism (parallelism_config)": parallelism is not None
        and any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")),
        "ddp_static_graph=True (or Accelerate's static_graph), with which DDP takes the first pass that it sees for "
        "the training's: leave it out,": (
            accelerator.distributed_type.value.startswith("MULTI")
            and bool(getattr(accelerator.ddp_handler, "static_graph", False))
        ),
        f"optim={optim!r}, which steps inside the backward pass": "lomo" in optim or "layerwise" in optim,
        f"torch_compile_mode={args.torch_compile_mode!r}, whose CUDA graphs hold on to the place of the weights": (
            args.torch_compile_mode in ("reduce-overhead", "max-autotune")
        ),
        "use_liger_kernel=True, whose fused loss replaces the model's own (fsam_fused_head makes no logits either),": (
            args.use_liger_kernel
        ),
        "a trainer that generates what it trains on (TRL's GRPO, RLOO)": hasattr(trainer, "_buffered_inputs"),
    }
    for what, holds in refused.items():
        if holds:
            raise ValueError(
                f"hf_fsam does not support {what} yet. Run one process, or one process a device under `torchrun` or "
                "`accelerate launch` (DDP, FSDP2, DeepSpeed ZeRO), or set fsam_variant='none'."
            )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return select_deepspeed_engine(args, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return select_fsdp_engine(args, accelerator)
    return LocalEngine(accelerator)
