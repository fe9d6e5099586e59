"""Who owns the parameters. An engine knows how one way of holding them is ascended, perturbed and restored."""

import inspect
import re
from collections.abc import Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from hf_fsam.engines.base import Ascent, Engine
from hf_fsam.engines.deepspeed import select_deepspeed_engine
from hf_fsam.engines.fsdp import select_fsdp_engine
from hf_fsam.engines.local import LocalEngine, unwrapped
from hf_fsam.heads.trl import has_unknown_fused_head

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
_FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LAUNCH = "run one process a device under `torchrun` or `accelerate launch`, with DDP, FSDP2 or DeepSpeed ZeRO"


def select_engine(trainer: "Trainer") -> Engine:
    """The engine for the trainer's way of holding its parameters.

    Raises:
        ValueError: it is not supported; the message names it and the cure.
    """
    args, accelerator = trainer.args, trainer.accelerator
    for what, cure in _refusals(trainer):
        raise ValueError(f"hf_fsam does not support {what}: {cure}; or set fsam_variant='none'.")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return select_deepspeed_engine(args, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return select_fsdp_engine(args, accelerator)
    return LocalEngine(accelerator)


def _refusals(trainer: Any) -> Iterator[tuple[str, str]]:
    """What is not supported of the trainer's way of running, and what to do."""
    args, accelerator = trainer.args, trainer.accelerator
    if args.n_gpu > 1:
        yield f"DataParallel (n_gpu={args.n_gpu} without a launcher)", f"{_LAUNCH}, or set CUDA_VISIBLE_DEVICES=0"
    if accelerator.distributed_type not in _SUPPORTED:
        yield f"distributed_type={accelerator.distributed_type.value}", _LAUNCH
    if args.parallel_mode.value.startswith(("sagemaker", "tpu")):
        yield f"parallel_mode={args.parallel_mode.value!r}", _LAUNCH
    if trainer.is_model_parallel:
        yield (
            "a model spread over several devices (hf_device_map)",
            "load it without device_map, and shard what one device can't hold with FSDP2 or DeepSpeed ZeRO-3",
        )
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        yield (
            "a model sharded at load time (DistributedConfig)",
            "load it without distributed_config, and shard it with FSDP2 (fsdp_config version: 2) or DeepSpeed ZeRO-3",
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    kinds = [kind for kind in ("tp", "cp", "sp") if getattr(parallelism, f"{kind}_enabled", False)]
    if kinds:
        yield (
            f"tensor, context and sequence parallelism (parallelism_config with {'_size, '.join(kinds)}_size > 1)",
            "set these sizes to 1, and shard with FSDP2 or DeepSpeed ZeRO-3",
        )
    if accelerator.distributed_type.value.startswith("MULTI") and getattr(
        getattr(accelerator, "ddp_handler", None), "static_graph", False
    ):
        yield (
            "ddp_static_graph=True (or Accelerate's static_graph), with which DDP takes the first pass that it sees "
            "for the training's",
            "leave it out",
        )
    optim = str(getattr(args.optim, "value", args.optim) or "")
    if "lomo" in optim or "layerwise" in optim:
        yield (
            f"optim={optim!r}, which steps inside the backward pass",
            f"set optim={optim.removesuffix('_layerwise')!r}" if "layerwise" in optim else "set optim='adamw_torch'",
        )
    if args.use_liger_kernel:
        yield (
            "use_liger_kernel=True, whose fused loss replaces the model's own",
            "set use_liger_kernel=False: with fsam_fused_head a language model makes no logits either",
        )
    if args.torch_compile_mode in ("reduce-overhead", "max-autotune"):
        yield (
            f"torch_compile_mode={args.torch_compile_mode!r}, whose CUDA graphs hold on to the place of the weights",
            "set torch_compile_mode='default' or 'max-autotune-no-cudagraphs'",
        )
    graphs = _cuda_graphs(args, trainer.model)
    if graphs is not None:
        yield f"CUDA graphs, which hold on to the place of the weights ({graphs[0]})", graphs[1]
    generating = _generating(type(trainer))
    if generating is not None:
        yield (
            f"a trainer that generates what it trains on, as {generating} does: the second pass would be on other text",
            "generate before the training, into the data set, and what is for the eye alone in a TrainerCallback",
        )
    if args.fsam_variant in ("functional", "logit") and has_unknown_fused_head(type(trainer)):
        yield (
            "the fused head of this TRL, which is another than that of TRL 1.16",
            "install trl==1.16.*, or set fsam_variant='sam'",
        )
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in _FORMATS:
            yield (
                f"trainable weights of {parameter.dtype} ({name}), which have no norm or no rounding here",
                "keep that weight in float32 (a complex one as two real ones, torch.view_as_real), or freeze it with "
                "requires_grad_(False)",
            )


def _cuda_graphs(args: Any, model: nn.Module) -> tuple[str, str] | None:
    """Where they are switched on, as far as it can be known, and the cure. Read in torch 2.13: a compiled callable has
    `get_compiler_config`, inductor's settings with what its mode makes of them; other backends have none."""
    if args.torch_compile_backend == "cudagraphs":
        return "torch_compile_backend='cudagraphs'", "set torch_compile_backend='inductor'"
    if args.torch_compile:
        import torch._inductor.config

        if torch._inductor.config.triton.cudagraphs:
            return (
                "torch._inductor.config.triton.cudagraphs, or TORCHINDUCTOR_CUDAGRAPHS in the environment",
                "set it to False, or 0",
            )
    for name, module in model.named_modules():
        # Those of model.compile(), and of torch.compile(model) and model.forward = torch.compile(model.forward).
        for compiled in (vars(module).get("_compiled_call_impl"), vars(module).get("forward")):
            config: dict | None = getattr(compiled, "get_compiler_config", dict)()
            if config and config.get("triton.cudagraphs"):
                return (
                    f"{name or type(module).__name__} is compiled with them",
                    "compile it with mode='default' or 'max-autotune-no-cudagraphs'",
                )
    return None


_GENERATES = re.compile(r"(^|_)generate(_|$)|for_generation")
_STEPS = ("training_step", "compute_loss")  # what these call may be an evaluation


def _generating(trainer_class: type) -> str | None:
    """The method that makes a batch, or a loss of it, out of what the model has just generated; None where none does.

    By the names in its code. TRL 1.16's GRPO, RLOO, distillation, GOLD, A2PO and their like generate in
    `_prepare_inputs`, or in methods that it calls; online DPO and GKD in `training_step`.
    """

    others = ("transformers", "hf_fsam", "builtins")
    owners = [each for each in trainer_class.__mro__ if each.__module__.split(".")[0] not in others]

    def generates(name: str, seen: set[str]) -> bool:
        """seen: the methods looked into, and those not to look into."""
        for owner in owners:
            code = getattr(inspect.unwrap(vars(owner).get(name, print)), "__code__", None)
            for called in _names(code) if code else ():
                if _GENERATES.search(called):
                    return True
                if name not in _STEPS and called not in seen:
                    seen.add(called)
                    if generates(called, seen):
                        return True
        return False

    for name in ("_prepare_inputs", *_STEPS):
        if generates(name, {name}):
            owner = next(each for each in owners if name in vars(each))
            return f"{owner.__name__}.{name}"
    return None


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
