"""DeepSpeed ZeRO: the engine steps inside of `backward`, and shards optimizer, gradients and, at stage 3, weights.

Read in DeepSpeed 0.19.8. Accelerate calls `engine.backward(loss)` and, at the end of an accumulation window,
`engine.step()` from one and the same `accelerator.backward`: the weights have to be back at θ between the two.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from hf_fsam.engines.base import Ascent, Engine
from hf_fsam.perturbation import Exchange, Perturbation, own_storage, perturb
from hf_fsam.second_moment import SecondMoment, precondition


def select_deepspeed_engine(args: Any, accelerator: Accelerator) -> Engine:
    """The engine for the ZeRO stage of the run's DeepSpeed configuration.

    Raises:
        ValueError: something in it would be ignored or wrong; the message names it.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    sharded = zero.get("stage") == 3
    offload = [zero.get(part) or {} for part in ("offload_optimizer", "offload_param")]
    optimizer = str(config.get("optimizer", {}).get("type", "")).lower()
    reentrant = args.activation_checkpointing and (args.activation_checkpointing_kwargs or {}).get("use_reentrant")
    refused = {
        "zero_hpz_partition_size > 1 (hpZ), whose second copy of the weights would not see the perturbation": (
            (zero.get("zero_hpz_partition_size") or 1) > 1
        ),
        "mics_shard_size (MiCS)": (zero.get("mics_shard_size") or -1) > 0,
        "zenflow": bool(zero.get("zenflow")),
        "super_offload (SuperOffload)": any(part.get("super_offload") for part in offload),
        "offload to NVMe": any(part.get("device") == "nvme" for part in offload),
        "offload to the CPU": any(part.get("device") == "cpu" for part in offload),
        "compile.deepcompile (DeepCompile)": bool(config.get("compile", {}).get("deepcompile")),
        "torch_autocast": bool(config.get("torch_autocast", {}).get("enabled")),
        "tensor_parallel": bool(config.get("tensor_parallel")),
        "pipeline parallelism": bool(config.get("pipeline")),
        "sequence_parallel_size > 1": (config.get("sequence_parallel_size") or 1) > 1,
        f"the 1-bit optimizer {optimizer!r}": optimizer.startswith(("onebit", "zerooneadam")),
        "use_reentrant=True below ZeRO stage 3": bool(reentrant) and not sharded,
        "fsam_ascent_scope='rank' at ZeRO stage 3, where no process holds its own gradient whole": (
            sharded and args.fsam_ascent_scope == "rank"
        ),
    }
    for what, holds in refused.items():
        if holds:
            raise ValueError(
                f"hf_fsam does not support {what} under DeepSpeed. Change that setting, or set fsam_variant='none'."
            )
    return ShardedDeepSpeedEngine(accelerator) if sharded else ReplicatedDeepSpeedEngine(accelerator)


def _second_moment_settings(engine: Any) -> tuple[float, float | Tensor, float] | None:
    """β₂, step and epsilon of the optimizer inside; None before its first step.

    Raises:
        ValueError: it keeps no second moment, or its groups differ in β₂ or epsilon.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if engine.global_steps == 0:
        return None
    state = next((state for state in inner.state.values() if "exp_avg_sq" in state), None)
    settings = {(group.get("betas", (0, None))[1], group.get("eps")) for group in inner.param_groups}
    if state is None or len(settings) != 1 or None in next(iter(settings)):
        raise ValueError(
            f"fsam_precondition=True needs an optimizer of the Adam family with one β₂ and one epsilon for all groups; "
            f"{type(inner).__name__} under DeepSpeed has {settings}. Set fsam_precondition=False."
        )
    beta, eps = next(iter(settings))
    return beta, state["step"] if "step" in state else inner.param_groups[0]["step"], eps


class _DeepSpeedEngine:
    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def _engine(self) -> Any:
        return self.accelerator.deepspeed_engine_wrapped.engine

    def scale(self, loss: Tensor) -> Tensor:
        return loss * getattr(self._engine.optimizer, "loss_scale", 1.0)

    @contextmanager
    def _restored_before_step(self) -> Iterator[None]:
        """Accelerate's `backward` steps the engine, too: restoring later would undo the update."""
        engine, step = self._engine, self._engine.step

        def restored_step(*args: Any, **kwargs: Any) -> Any:
            self.restore()
            return step(*args, **kwargs)

        engine.step = restored_step
        try:
            yield
        finally:
            del engine.step

    def restore(self) -> None:
        raise NotImplementedError


class ReplicatedDeepSpeedEngine(_DeepSpeedEngine):
    """ZeRO-0, -1 and -2: every process holds every weight whole."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._exchange = Exchange()

    @contextmanager
    def ascent(self, model: Any, *, average: bool) -> Iterator[Ascent]:
        parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
        sums: list[Tensor | None] = [None] * len(parameters)

        def backward(loss: Tensor) -> None:
            # Not a plain backward: ZeRO reduces and takes away what arrives in `.grad`.
            gradients = torch.autograd.grad(self.scale(loss), parameters, allow_unused=True)
            for index, gradient in enumerate(gradients):
                if gradient is not None:
                    total = sums[index]
                    # Not in place: several weights may share the memory of one gradient.
                    sums[index] = gradient if total is None else total + gradient

        # The module inside: the engine's own forward pass announces a backward pass of the training.
        ascent = Ascent(model.module, backward)
        yield ascent
        for parameter, gradient in zip(parameters, sums, strict=True):
            if average:
                gradient = torch.zeros_like(parameter) if gradient is None else gradient
                gradient = self.accelerator.reduce(gradient, "mean")
            if gradient is not None:
                ascent.weights.append(parameter)
                ascent.gradients.append(gradient)

    def perturb(
        self, ascent: Ascent, optimizer: Optimizer | None, rho: float, seed: int, cotangents: list[Tensor]
    ) -> Perturbation:
        divide = None
        if optimizer is not None and (settings := _second_moment_settings(self._engine)) is not None:
            divide = partial(self._precondition, ascent.weights, *settings)
        generator = torch.Generator(self.accelerator.device).manual_seed(seed)
        return perturb(ascent.weights, own_storage(ascent.gradients, cotangents), divide, rho, generator)

    def _precondition(
        self,
        weights: Sequence[Tensor],
        beta: float,
        step: float | Tensor,
        eps: float,
        gradients: Sequence[Tensor],
    ) -> None:
        """Each process divides what it owns the second moment of, and all put the parts together."""
        optimizer = self._engine.optimizer
        # Of ZeRO-1 and -2, or of the bfloat16 optimizer below them; none at stage 0 in float32.
        masters: Any = getattr(optimizer, "single_partition_of_fp32_groups", None) or getattr(
            optimizer, "fp32_groups_flat_partition", None
        )
        for weight, gradient in zip(weights, gradients, strict=True):
            if not hasattr(weight, "_hp_mapping"):  # stage 0 in float32 shards nothing
                SecondMoment(optimizer.state[weight]["exp_avg_sq"], beta, step, eps).divide(gradient)
                continue
            whole = gradient.flatten()
            own = torch.zeros_like(whole)
            mapping = weight._hp_mapping
            if mapping is not None:
                flat = masters[mapping.param_group_index]
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                average = optimizer.optimizer.state[flat]["exp_avg_sq"].narrow(0, there.start, there.numel)
                part = own.narrow(0, here.start, here.numel).copy_(whole.narrow(0, here.start, here.numel))
                SecondMoment(average.to(whole.device), beta, step, eps).divide(part)
            gradient.copy_(self.accelerator.reduce(own, "sum").view_as(gradient))

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        with self._exchange(perturbation), self._restored_before_step():
            yield

    def restore(self) -> None:
        self._exchange.restore()


class ShardedDeepSpeedEngine(_DeepSpeedEngine):
    """ZeRO-3: every process holds a shard of every weight, of its gradient and of the optimizer's state."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._moved: list[Any] = []

    @contextmanager
    def ascent(self, model: Any, *, average: bool) -> Iterator[Ascent]:
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
        # Nothing has been accumulated at the first micro-step; what lies there then is the last step's.
        first = model.optimizer.micro_step_id == 0 and not model.optimizer._epilogue_ran_this_backward
        waiting = None if first else [safe_get_local_grad(parameter).clone() for parameter in parameters]

        def backward(loss: Tensor) -> None:
            model.set_gradient_accumulation_boundary(False)
            model.backward(loss, scale_wrt_gas=False)

        for parameter in parameters:
            _set(safe_set_local_grad, parameter, None)
        ascent = Ascent(model, backward)
        yield ascent
        for index, parameter in enumerate(parameters):
            ascent.weights.append(parameter)
            ascent.gradients.append(safe_get_local_grad(parameter).clone())
            _set(safe_set_local_grad, parameter, None if waiting is None else waiting[index])

    def perturb(
        self, ascent: Ascent, optimizer: Optimizer | None, rho: float, seed: int, cotangents: list[Tensor]
    ) -> Perturbation:
        from deepspeed.utils import safe_get_local_optimizer_state

        divide = None
        if optimizer is not None and (settings := _second_moment_settings(self._engine)) is not None:
            moments = [
                SecondMoment(safe_get_local_optimizer_state(weight, "exp_avg_sq"), *settings)
                for weight in ascent.weights
            ]
            divide = partial(precondition, moments=moments)
        weights: list[Any] = ascent.weights
        shards = [weight.ds_tensor.data for weight in weights]
        # Each process rounds numbers of its own.
        generator = torch.Generator(self.accelerator.device).manual_seed(seed + self.accelerator.process_index)
        result = perturb(shards, ascent.gradients, divide, rho, generator, total=self._over_processes)
        result.weights = ascent.weights
        result.radius = self.accelerator.reduce(result.radius, "sum")
        return result

    def _over_processes(self, norm: Tensor) -> Tensor:
        return self.accelerator.reduce(norm.square(), "sum").sqrt()

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        weights: list[Any] = perturbation.weights
        self._moved = weights
        try:
            for weight, value in zip(weights, perturbation.values, strict=True):
                weight.ds_tensor.data.copy_(value)
            _forget_gathered(weights)
            with self._restored_before_step():
                yield
        finally:
            self.restore()

    def restore(self) -> None:
        """From the optimizer's own copy, of which the weights are the rounding: no backup is kept."""
        from deepspeed.utils import safe_get_local_fp32_param

        if self._moved:
            for weight in self._moved:
                weight.ds_tensor.data.copy_(safe_get_local_fp32_param(weight))
            _forget_gathered(self._moved)
            self._moved = []


def _set(setter: Any, parameter: Any, value: Tensor | None) -> None:
    setter(parameter, torch.zeros_like(parameter.ds_tensor, dtype=torch.float32) if value is None else value)


def _forget_gathered(weights: list[Any]) -> None:
    """Small weights stay gathered between the passes (stage3_param_persistence_threshold): have them gathered anew."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for weight in weights:
        if weight.ds_status == ZeroParamStatus.AVAILABLE:
            weight.partition(param_list=[weight], has_been_updated=False)
