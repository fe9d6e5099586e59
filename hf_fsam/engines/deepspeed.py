"""DeepSpeed ZeRO: the engine steps inside of `backward`, and shards optimizer, gradients and, at stage 3, weights.

Read in DeepSpeed 0.19.8. Accelerate calls `engine.backward(loss)` and, at the end of an accumulation window,
`engine.step()` from one and the same `accelerator.backward`: the weights have to be back at θ between the two.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_fsam.engines.base import RANK_SET_LATE, Ascent, Engine, perturb_shards
from hf_fsam.engines.local import LocalEngine, gradients_set_aside
from hf_fsam.perturbation import Perturbation
from hf_fsam.second_moment import SecondMoment, precondition


def select_deepspeed_engine(args: Any, accelerator: Accelerator) -> Engine:
    """The engine for the ZeRO stage of the run's DeepSpeed configuration.

    Raises:
        ValueError: something in it would be ignored or wrong; the message names it.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage") or 0
    offload = [zero.get(part) or {} for part in ("offload_optimizer", "offload_param")]
    optimizer = str(config.get("optimizer", {}).get("type", "")).lower()
    low_precision = [kind for kind in ("bf16", "fp16") if (config.get(kind) or {}).get("enabled") in (True, "auto")]
    rank = args.fsam_ascent_scope == "rank"
    refused = {
        "zero_hpz_partition_size > 1 (hpZ), whose second copy of the weights would not see the perturbation": (
            (zero.get("zero_hpz_partition_size") or 1) > 1
        ),
        "zero_quantized_weights (qwZ), which rounds the perturbation away": bool(zero.get("zero_quantized_weights")),
        "zero_quantized_gradients (qgZ)": bool(zero.get("zero_quantized_gradients")),
        "mics_shard_size (MiCS)": (zero.get("mics_shard_size") or -1) > 0,
        "zenflow": bool(zero.get("zenflow")),
        "super_offload (SuperOffload)": any(part.get("super_offload") for part in offload),
        "offload to NVMe": any(part.get("device") == "nvme" for part in offload),
        "compile.deepcompile (DeepCompile)": bool((config.get("compile") or {}).get("deepcompile")),
        "torch_autocast": bool((config.get("torch_autocast") or {}).get("enabled")),
        "tensor_parallel": bool(config.get("tensor_parallel")),
        "pipeline parallelism": bool(config.get("pipeline")),
        "sequence_parallel_size > 1": (config.get("sequence_parallel_size") or 1) > 1,
        f"the 1-bit optimizer {optimizer!r}": optimizer.startswith(("onebit", "zerooneadam")),
        f"fsam_precondition=True with the optimizer {optimizer!r}, of which it is not known that it keeps Adam's "
        "second moment": args.fsam_precondition and optimizer not in ("", "adam", "adamw"),
        f"{' and '.join(low_precision)} at ZeRO stage 0 (stage 1 shards no more than that does)": (
            stage == 0 and bool(low_precision)
        ),
        "fsam_ascent_scope='rank' at ZeRO stage 3, where no process holds its own gradient whole": (
            stage == 3 and rank
        ),
        f"fsam_ascent_scope='rank' with fsam_precondition=True at ZeRO stage {stage}, where no process holds the "
        "second moment whole": (stage in (1, 2) and rank and args.fsam_precondition),
    }
    for what, holds in refused.items():
        if holds:
            raise ValueError(
                f"hf_fsam does not support {what} under DeepSpeed. Change that setting, or set fsam_variant='none'."
            )
    if stage == 3:
        return ShardedDeepSpeedEngine(accelerator)
    return WholeDeepSpeedEngine(accelerator) if stage == 0 or rank else FlatDeepSpeedEngine(accelerator)


@contextmanager
def _before_step(engine: Any, restore: Callable[[], None]) -> Iterator[None]:
    """Accelerate's `backward` steps the engine, too: restoring later would undo the update."""
    step = engine.step

    def restored_step(*args: Any, **kwargs: Any) -> Any:
        restore()
        return step(*args, **kwargs)

    engine.step = restored_step
    try:
        yield
    finally:
        del engine.step


@contextmanager
def _gradients_to(optimizer: Any, take: Callable[[Any], None]) -> Iterator[None]:
    """Inside, a weight whose gradient is complete goes to `take`, not to ZeRO's reduction and accumulation.

    DeepSpeed's hooks on the weights call these methods (0.19.8): `process_gradients` at stages 1 and 2,
    `reduce_ready_partitions_and_remove_grads` at stage 3. There is no public way to keep a backward pass from them.
    """
    name = next(
        (
            name
            for name in ("process_gradients", "reduce_ready_partitions_and_remove_grads")
            if hasattr(optimizer, name)
        ),
        None,
    )
    if name is None:  # stage 0 has no such hooks
        yield
        return
    # As before any forward pass of the engine's; without it the hooks believe to be in the last backward pass still.
    optimizer.clear_backward_seen_flag()
    setattr(optimizer, name, lambda parameter, *_: take(parameter))
    try:
        yield
    finally:
        delattr(optimizer, name)


class WholeDeepSpeedEngine(LocalEngine):
    """ZeRO-0 and, at stages 1 and 2, the scope `rank`: every process ascends, perturbs and restores on its own, with
    gradient and backup whole, as under DDP."""

    @property
    def _engine(self) -> Any:
        return self.accelerator.deepspeed_engine_wrapped.engine

    def scale(self, loss: Tensor) -> Tensor:
        return loss * getattr(self._engine.optimizer, "loss_scale", 1.0)

    @contextmanager
    def _apart(self, model: Any) -> Iterator[nn.Module]:
        # The module inside: the engine's own forward pass announces a backward pass of the training.
        with _gradients_to(model.optimizer, take=lambda parameter: None):
            yield model.module

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        with super().perturbed(perturbation), _before_step(self._engine, self.restore):
            yield


class _ShardingEngine:
    """ZeRO-1 to -3: each process perturbs the shards that it has the master weights of.

    Ascent gradients are reduced to their owners as they arrive and kept on the shards, in the weights' dtype: nothing
    enters ZeRO's own accumulators, and nothing is whole.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._sums: dict[Any, Tensor] = {}

    @property
    def _engine(self) -> Any:
        return self.accelerator.deepspeed_engine_wrapped.engine

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self._engine.optimizer.loss_scale

    @contextmanager
    def ascent(self, model: Any, *, average: bool) -> Iterator[Ascent]:
        if not average:
            raise ValueError(RANK_SET_LATE)
        self.settle()
        parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
        bucket = _Bucket(model.optimizer.reduce_bucket_size, self._reduce)

        def backward(loss: Tensor) -> None:
            self.scale(loss).backward()
            bucket.flush()
            self._release(model)

        shards = self._shards(model)
        self._sums = {key: torch.zeros_like(shard, device=self.accelerator.device) for key, shard in shards}
        ascent = Ascent(model.module, backward)
        try:
            with gradients_set_aside(parameters), _gradients_to(model.optimizer, bucket.add):
                yield ascent
            ascent.weights = [shard for _, shard in shards]
            ascent.gradients = list(self._sums.values())
        finally:
            self._sums = {}

    def perturb(
        self, ascent: Ascent, optimizer: Optimizer | None, rho: float, seed: int, cotangents: list[Tensor]
    ) -> Perturbation:
        divide = None
        if optimizer is not None and (settings := _second_moment_settings(self._engine)) is not None:
            # One after the other: offloaded state visits the device.
            moments = (SecondMoment(average, *settings) for average in self._averages())
            divide = partial(precondition, moments=moments)
        return perturb_shards(self.accelerator, ascent.weights, ascent.gradients, divide, rho, seed)

    def _shards(self, model: Any) -> list[tuple[Any, Tensor]]:
        """The shards of the weights that this process owns, each with the key of its gradient."""
        raise NotImplementedError

    def _averages(self) -> Iterable[Tensor]:
        """The optimizer's second moment of each shard."""
        raise NotImplementedError

    def _reduce(self, parameters: list[Any], gradients: list[Tensor]) -> None:
        """Add the mean over the processes of each gradient to the sums of its owners."""
        raise NotImplementedError

    def _release(self, model: Any) -> None:
        """After a backward pass of the ascent, what DeepSpeed does after its own."""

    def settle(self) -> None:
        """Where no process holds what another one perturbs, nothing is left to do."""


class FlatDeepSpeedEngine(_ShardingEngine):
    """ZeRO-1 and -2: the weights are whole everywhere, views of one flat tensor a group, of which each process owns one
    stretch: that one it perturbs, and the stretches are gathered as after an optimizer step.

    The way back is the same, from the master weights, unless the optimizer's step follows: that overwrites and gathers
    every weight anyway.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._own_moved = self._others_moved = False

    def _shards(self, model: Any) -> list[tuple[Any, Tensor]]:
        return list(enumerate(self._own))

    @property
    def _own(self) -> list[Tensor]:
        optimizer = self._engine.optimizer
        return [
            stretches[torch.distributed.get_rank(group)]
            for stretches, group in zip(
                optimizer.parallel_partitioned_bit16_groups, optimizer.real_dp_process_group, strict=True
            )
        ]

    def _averages(self) -> Iterable[Tensor]:
        optimizer = self._engine.optimizer
        for master in optimizer.single_partition_of_fp32_groups:
            yield optimizer.optimizer.state[master]["exp_avg_sq"]

    def _reduce(self, parameters: list[Any], gradients: list[Tensor]) -> None:
        optimizer = self._engine.optimizer
        pieces: dict[tuple[int, int], list[tuple[int, Tensor]]] = defaultdict(list)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            index, place = _place(parameter, optimizer.bit16_groups_flat)
            length = self._sums[index].numel()
            for start, end in _stretches(place, gradient.numel(), length):
                piece = gradient.view(-1)[start - place : end - place]
                pieces[index, start // length].append((start % length, piece))
        for (index, owner), parts in sorted(pieces.items()):
            group = optimizer.real_dp_process_group[index]
            joined = torch.cat([piece for _, piece in parts]).div_(torch.distributed.get_world_size(group))
            torch.distributed.reduce(joined, dst=torch.distributed.get_global_rank(group, owner), group=group)
            if owner == torch.distributed.get_rank(group):
                for (start, piece), reduced in zip(
                    parts, joined.split([piece.numel() for _, piece in parts]), strict=True
                ):
                    self._sums[index][start : start + piece.numel()] += reduced

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        optimizer = self._engine.optimizer
        self._own_moved = self._others_moved = True
        try:
            for own, value in zip(self._own, perturbation.values, strict=True):
                own.copy_(value)
            for flat, own, group in zip(
                optimizer.bit16_groups_flat, self._own, optimizer.real_dp_process_group, strict=True
            ):
                torch.distributed.all_gather_into_tensor(flat, own, group=group)
            with self._overwritten_by_step():
                yield
            self.settle()
        finally:
            self.restore()

    @contextmanager
    def _overwritten_by_step(self) -> Iterator[None]:
        engine, step = self._engine, self._engine.step

        def settling_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if engine.was_step_applied():
                self._own_moved = self._others_moved = False
            return result

        engine.step = settling_step
        try:
            yield
        finally:
            del engine.step

    def restore(self) -> None:
        if self._own_moved:
            for own, master in zip(self._own, self._engine.optimizer.single_partition_of_fp32_groups, strict=True):
                own.copy_(master.data)
            self._own_moved = False

    def settle(self) -> None:
        if self._others_moved:
            self._engine.optimizer.update_lp_params()
            self._own_moved = self._others_moved = False


class ShardedDeepSpeedEngine(_ShardingEngine):
    """ZeRO-3: every process holds a shard of every weight, of its gradient and of the optimizer's state."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._weights: list[Any] = []
        self._moved = False

    def _shards(self, model: Any) -> list[tuple[Any, Tensor]]:
        self._weights = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
        return [(weight, weight.ds_tensor.data) for weight in self._weights]

    def _averages(self) -> Iterable[Tensor]:
        from deepspeed.utils import safe_get_local_optimizer_state

        for weight in self._weights:
            yield safe_get_local_optimizer_state(weight, "exp_avg_sq")

    def _reduce(self, parameters: list[Any], gradients: list[Tensor]) -> None:
        from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

        # The mean. The last process's parts are shorter than its shards, which end in padding.
        parts = reduce_scatter_coalesced(gradients, parameters[0].ds_process_group)
        for parameter, part in zip(parameters, parts, strict=True):
            self._sums[parameter][: part.numel()] += part

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        self._moved = True
        try:
            for weight, value in zip(self._weights, perturbation.values, strict=True):
                weight.ds_tensor.data.copy_(value)
            self._forget_gathered()
            with _before_step(self._engine, self.restore):
                yield
        finally:
            self.restore()

    def restore(self) -> None:
        """From the master weights, of which the weights are the rounding: no backup is kept."""
        from deepspeed.utils import safe_get_local_fp32_param

        if self._moved:
            for weight in self._weights:
                weight.ds_tensor.data.copy_(safe_get_local_fp32_param(weight))
            self._forget_gathered()
            self._moved = False

    def _release(self, model: Any) -> None:
        model.optimizer.backward_epilogue()

    def _forget_gathered(self) -> None:
        """Small weights stay gathered between the passes (stage3_param_persistence_threshold), others may after a pass
        that ended early: have them gathered anew."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        for weight in self._weights:
            if weight.ds_status == ZeroParamStatus.AVAILABLE:
                weight.partition(param_list=[weight], has_been_updated=False)


class _Bucket:
    """Gradients on their way to their owners: enough of them together to be worth a reduction.

    Args:
        most: numbers in it, unless one gradient alone has more.
        reduce: takes the weights and their gradients, (weights, gradients).
    """

    def __init__(self, most: int, reduce: Callable[[list[Any], list[Tensor]], None]) -> None:
        self._most, self._reduce = most, reduce
        self._parameters: list[Any] = []
        self._gradients: list[Tensor] = []

    @torch.no_grad()
    def add(self, parameter: Any) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if sum(each.numel() for each in self._gradients) + gradient.numel() > self._most:
            self.flush()
        self._parameters.append(parameter)
        self._gradients.append(gradient.contiguous())

    @torch.no_grad()
    def flush(self) -> None:
        if self._gradients:
            self._reduce(self._parameters, self._gradients)
        self._parameters, self._gradients = [], []


def _place(parameter: Tensor, flats: list[Tensor]) -> tuple[int, int]:
    """Which of `flats` the parameter is a view of, and at which number it begins there."""
    for index, flat in enumerate(flats):
        numbers, rest = divmod(parameter.data_ptr() - flat.data_ptr(), flat.element_size())
        if rest == 0 and 0 <= numbers < flat.numel():
            return index, numbers
    raise RuntimeError("a trainable weight is not in any of DeepSpeed's flat groups: this version lays them out anew.")


def _stretches(start: int, count: int, length: int) -> Iterator[tuple[int, int]]:
    """[start, start + count) cut at the multiples of `length`."""
    end = start + count
    while start < end:
        cut = min(end, (start // length + 1) * length)
        yield start, cut
        start = cut


def _second_moment_settings(engine: Any) -> tuple[float, float | Tensor, float] | None:
    """β₂, step and epsilon of the optimizer inside; None before its first step.

    Raises:
        ValueError: it keeps no second moment, or its groups differ in β₂ or epsilon.
    """
    inner = engine.optimizer.optimizer
    if engine.global_steps == engine.skipped_steps:  # fp16 skips the first steps while it finds its loss scale
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
