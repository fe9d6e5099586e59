"""What is not supported of a trainer's way of running, whatever the engine. Asked before training."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from hf_fsam.accelerate_settings import compiles
from hf_fsam.heads import liger, trl

_SUPPORTED = (
    DistributedType.NO,
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
)
_STATELESS = ("transformers", "hf_fsam", "builtins")
_FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LAUNCH = "run one process a device under `torchrun` or `accelerate launch`, with DDP, FSDP2 or DeepSpeed ZeRO"


def refusals(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """What is not supported, and what to do about it."""
    model: nn.Module = trainer.model  # type: ignore[assignment]
    yield from _launch(trainer.args, trainer.accelerator)
    yield from _parallelism(trainer, trainer.accelerator)
    yield from _training(trainer.args)
    yield from _cuda_graphs(trainer.args, trainer.accelerator, model)
    yield from _inputs(trainer.args, type(trainer))
    yield from _liger(trainer.args, model)
    yield from _loss(trainer.args, type(trainer))
    yield from _weights(model)


def _launch(args: Any, accelerator: Any) -> Iterator[tuple[str, str]]:
    """How the processes were started."""
    if args.n_gpu > 1:
        yield f"DataParallel (n_gpu={args.n_gpu} without a launcher)", f"{_LAUNCH}, or set CUDA_VISIBLE_DEVICES=0"
    if accelerator.distributed_type not in _SUPPORTED:
        yield f"distributed_type={accelerator.distributed_type.value}", _LAUNCH
    if accelerator.mixed_precision == "fp8":
        yield "mixed_precision='fp8', which rounds the perturbation away", "choose mixed_precision='bf16'"
    if args.parallel_mode.value.startswith(("sagemaker", "tpu")):
        yield f"parallel_mode={args.parallel_mode.value!r}", _LAUNCH


def _parallelism(trainer: Trainer, accelerator: Any) -> Iterator[tuple[str, str]]:
    """How the model is spread over devices."""
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
    ddp = getattr(accelerator, "ddp_handler", None)
    if accelerator.distributed_type.value.startswith("MULTI") and getattr(ddp, "static_graph", False):
        yield (
            "ddp_static_graph=True (or Accelerate's static_graph), with which DDP takes the first pass that it sees "
            "for the training's",
            "leave it out",
        )


def _training(args: Any) -> Iterator[tuple[str, str]]:
    """What a step must not do before its end."""
    optim = str(getattr(args.optim, "value", args.optim) or "")
    if "lomo" in optim or "layerwise" in optim:
        yield (
            f"optim={optim!r}, which steps inside the backward pass",
            f"set optim={optim.removesuffix('_layerwise')!r}" if "layerwise" in optim else "set optim='adamw_torch'",
        )


def _cuda_graphs(args: Any, accelerator: Any, model: nn.Module) -> Iterator[tuple[str, str]]:
    """CUDA graphs read the weights where these were when the graph was recorded, and would miss the perturbed ones."""
    plugin = accelerator.state.dynamo_plugin  # what Accelerate's configuration says where the arguments say nothing
    for mode in dict.fromkeys((args.torch_compile_mode, plugin.mode)):
        if mode in ("reduce-overhead", "max-autotune"):
            yield (
                f"torch_compile_mode={mode!r} (Accelerate's dynamo_mode), whose CUDA graphs read the weights where "
                "they once were",
                "set torch_compile_mode='default' or 'max-autotune-no-cudagraphs'",
            )
    if "cudagraphs" in (args.torch_compile_backend, plugin.backend.value.lower()):
        yield "CUDA graphs (torch_compile_backend='cudagraphs')", "set torch_compile_backend='inductor'"
    if compiles(args, accelerator):
        import torch._inductor.config

        if torch._inductor.config.triton.cudagraphs:
            yield (
                "CUDA graphs (torch._inductor.config.triton.cudagraphs, or TORCHINDUCTOR_CUDAGRAPHS in the "
                "environment)",
                "set it to False, or 0",
            )
    for name, module in model.named_modules():
        # The first is what model.compile() sets, the second what torch.compile(model) and
        # model.forward = torch.compile(model.forward) do.
        for compiled in (vars(module).get("_compiled_call_impl"), vars(module).get("forward")):
            # Read in torch 2.13: inductor's callables have this method, which returns its settings together with what
            # its mode makes of them. Those of other backends don't.
            config: dict | None = getattr(compiled, "get_compiler_config", dict)()
            if config and config.get("triton.cudagraphs"):
                yield (
                    f"CUDA graphs ({name or type(module).__name__} is compiled with them)",
                    "compile it with mode='default' or 'max-autotune-no-cudagraphs'",
                )


def _inputs(args: Any, trainer_class: type) -> Iterator[tuple[str, str]]:
    """Whether the inputs of several micro-batches can be made before the first of them has had its turn."""
    counts = counts_what_it_prepares(trainer_class)
    if counts and args.fsam_ascent_scope == "optimizer_step" and args.gradient_accumulation_steps > 1:
        yield (
            f"fsam_ascent_scope='optimizer_step' with {counts}, whose _prepare_inputs may go by how often its "
            "training_step was called, as it does where one text is generated for several micro-batches",
            "set fsam_ascent_scope='micro_batch', or gradient_accumulation_steps=1",
        )


def counts_what_it_prepares(trainer_class: type) -> str | None:
    """The name of the class whose `_prepare_inputs` may go by how often `training_step` was called, because it has both
    of its own: TRL's GRPO generates a text for many steps and cuts it. None where there is none."""
    own = [each for each in trainer_class.__mro__ if each.__module__.split(".")[0] not in _STATELESS]
    prepares = next((each.__name__ for each in own if "_prepare_inputs" in vars(each)), None)
    return prepares if any("training_step" in vars(each) for each in own) else None


def _liger(args: Any, model: nn.Module) -> Iterator[tuple[str, str]]:
    """Liger's losses have no boundary to split at. `sam` needs none."""
    splits = args.fsam_variant in ("functional", "logit")
    if args.use_liger_kernel and splits and (asked := liger.losses_in(args.liger_kernel_config)):
        yield (
            f"liger_kernel_config={{{asked[0]!r}: True}} with fsam_variant={args.fsam_variant!r}, which "
            "needs the model's own loss",
            "leave it out: Liger's layers are used all the same, and with fsam_fused_head a language model makes no "
            "logits either",
        )
    if splits and liger.makes_the_loss(model):
        yield (
            f"a model whose forward pass is Liger's, which makes the loss without the logits, with fsam_variant="
            f"{args.fsam_variant!r}",
            "load the model without Liger's loss (fused_linear_cross_entropy=False), or leave Liger to "
            "use_liger_kernel=True",
        )


def _loss(args: Any, trainer_class: type) -> Iterator[tuple[str, str]]:
    """How the loss comes about."""
    if args.fsam_variant in ("functional", "logit"):
        yield from trl.unknown_heads(trainer_class)


def _weights(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype not in _FORMATS:
            yield (
                f"trainable weights of {weight.dtype} ({name}), which have no norm or no rounding here",
                "keep that weight in float32 (a complex one as two real ones, torch.view_as_real), or freeze it with "
                "requires_grad_(False)",
            )
