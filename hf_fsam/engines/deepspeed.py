"""DeepSpeed ZeRO: the engine steps inside of `backward`, and shards optimizer, gradients and, at stage 3, weights.

Read in DeepSpeed 0.19.8. Accelerate calls `engine.backward(loss)` and, at the end of an accumulation window,
`engine.step()` from one and the same `accelerator.backward`: the weights have to be back at θ between the two.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_fsam.cleanup import Cleanup
from hf_fsam.engines.base import RANK_SET_LATE, Ascent, Bucket, Engine, perturb_shards
from hf_fsam.engines.local import LocalEngine, gradients_set_aside
from hf_fsam.optimizer_state import SecondMoment, precondition
from hf_fsam.perturbation import Perturbation


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
    accumulated = (config.get("data_types") or {}).get("grad_accum_dtype")
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
        # For which DeepSpeed has an optimizer of its own, BF16_Optimizer.
        f"data_types.grad_accum_dtype={accumulated!r} with bf16 at ZeRO stage 1 (leave it out, or choose stage 2)": (
            stage == 1 and "bf16" in low_precision and accumulated in ("fp32", "float32", "float", "torch.float32")
        ),
        "fsam_ascent_scope='rank' at ZeRO stage 3, where no process holds its own gradient whole": (
            stage == 3 and rank
        ),
        f"fsam_ascent_scope='rank' with fsam_precondition=True at ZeRO stage {stage}, where no process holds the "
        "second moment whole": (stage in (1, 2) and rank and args.fsam_precondition),
        f"fsam_ascent_scope='rank' with fsam_ascent_direction='momentum' at ZeRO stage {stage}, where no process holds "
        "the momentum whole": (stage in (1, 2) and rank and args.fsam_ascent_direction == "momentum"),
    }
    for what, holds in refused.items():
        if holds:
            raise ValueError(
                f"hf_fsam does not support {what} under DeepSpeed. Change that setting, or set fsam_variant='none'."
            )
    if stage == 3:
        return ShardedDeepSpeedEngine(accelerator)
    if stage == 0 or rank:
        return WholeDeepSpeedEngine(accelerator)
    return ReplicatedDeepSpeedEngine(accelerator) if stage == 1 else FlatDeepSpeedEngine(accelerator)


@contextmanager
def _around_step(
    engine: Any,
    cleanup: Cleanup,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Accelerate's `backward` steps the engine, too: what belongs before or after that can't wait for its return."""
    step = engine.step

    def surrounded_step(*args: Any, **kwargs: Any) -> Any:
        before()
        result = step(*args, **kwargs)
        after()
        return result

    with cleanup.replaced(engine, "step", surrounded_step):
        yield


@contextmanager
def _gradients_to(engine: Any, cleanup: Cleanup, take: Callable[[Any], None]) -> Iterator[None]:
    """Inside, a weight whose gradient is complete goes to `take`, not to ZeRO's reduction and accumulation.

    DeepSpeed's hooks on the weights call these methods (0.19.8): `process_gradients` at stages 1 and 2,
    `reduce_ready_partitions_and_remove_grads` at stage 3. There is no public way to keep a backward pass from them.

    Raises:
        RuntimeError: what DeepSpeed has put around the optimizer has other hooks.
    """
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:  # stage 0: it has put nothing there, and there are no hooks
        yield
        return
    names = ("process_gradients", "reduce_ready_partitions_and_remove_grads")
    name = next((name for name in names if hasattr(optimizer, name)), None)
    if name is None or not hasattr(optimizer, "clear_backward_seen_flag"):
        raise RuntimeError(
            f"hf_fsam does not know DeepSpeed's {type(optimizer).__name__}, into whose gradients those of the ascent "
            "would go: it was written for the optimizers of ZeRO stages 1 to 3 of DeepSpeed 0.19.8. Install that "
            "version, choose another stage, or set fsam_variant='none'."
        )
    # As before any forward pass of the engine's; without it the hooks enter a backward pass that nobody leaves. A
    # backward pass that was broken off has not been left, either: DeepSpeed would end it at the end of the ascent's.
    optimizer.clear_backward_seen_flag()
    while optimizer._backward_active_depth:
        optimizer.exit_backward()
    with cleanup.replaced(optimizer, name, lambda parameter, *_: take(parameter)):
        yield


class WholeDeepSpeedEngine(LocalEngine):
    """ZeRO-0 and, at stages 1 and 2, the scope `rank`: every process ascends, perturbs and restores on its own, with
    gradient and backup whole, as under DDP."""

    forward_can_be_retried = gradients_whole = False  # DeepSpeed follows the passes with hooks of its own

    @property
    def _engine(self) -> Any:
        return self.accelerator.deepspeed_engine_wrapped.engine

    def scale(self, loss: Tensor) -> Tensor:
        return loss * getattr(self._engine.optimizer, "loss_scale", 1.0)

    @contextmanager
    def _apart(self, model: Any) -> Iterator[nn.Module]:
        # The module inside: the engine's own forward pass announces a backward pass of the training.
        with _gradients_to(model, self._cleanup, take=lambda parameter: None):
            yield model.module

    def perturb(
        self, ascent: Ascent, optimizer: Optimizer | None, rho: float, seed: int, cotangents: list[Tensor]
    ) -> Perturbation:
        if optimizer is not None and self._engine.optimizer is not self._engine.basic_optimizer:
            raise ValueError(
                "fsam_precondition=True was set after the start with fsam_ascent_scope='rank', where no process "
                "holds the second moment whole: set fsam_precondition=False, or begin with another fsam_ascent_scope."
            )
        return super().perturb(ascent, optimizer, rho, seed, cotangents)

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        with super().perturbed(perturbation):  # makes the exchange that is asked for below
            step = _around_step(self._engine, self._cleanup, before=self._exchange.restore)
            with step:
                yield


class _ShardingEngine:
    """ZeRO-2 and -3: each process perturbs the shards that it has the master weights of.

    Ascent gradients are reduced to their owners as they arrive and kept on the shards, in the weights' dtype: nothing
    enters ZeRO's own accumulators, and nothing is whole.
    """

    keeps = False  # the weights are moved in place
    forward_can_be_retried = gradients_whole = False

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._cleanup = Cleanup()

    @property
    def _engine(self) -> Any:
        return self.accelerator.deepspeed_engine_wrapped.engine

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self._engine.optimizer.loss_scale

    @contextmanager
    def ascent(self, model: Any, *, average: bool, passes: int) -> Iterator[Ascent]:
        if not average:
            raise ValueError(RANK_SET_LATE)
        self.settle()
        parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
        shards = self._shards(model)
        sums = {key: torch.zeros_like(shard, device=self.accelerator.device) for key, shard in shards}
        bucket = Bucket(model.optimizer.reduce_bucket_size, partial(self._reduce, sums=sums))

        def backward(loss: Tensor) -> None:
            self.scale(loss).backward()
            bucket.flush()
            self._release(model)

        def take(parameter: Any) -> None:
            gradient, parameter.grad = parameter.grad, None
            bucket.add(parameter, gradient)

        ascent = Ascent(model.module, backward)
        with gradients_set_aside(parameters, self._cleanup), _gradients_to(model, self._cleanup, take):
            yield ascent
        ascent.weights = [shard for _, shard in shards]
        ascent.gradients = list(sums.values())

    def momentum(self, model: Any, optimizer: Optimizer) -> Ascent | None:
        self.settle()
        if not _has_stepped(self._engine):
            return None
        shards = [shard for _, shard in self._shards(model)]
        return _along(self._moments("exp_avg"), shards, model.module, self.accelerator.device)

    def perturb(
        self, ascent: Ascent, optimizer: Optimizer | None, rho: float, seed: int, cotangents: list[Tensor]
    ) -> Perturbation:
        divide = _dividing_by(self._moments("exp_avg_sq"), self._engine) if optimizer is not None else None
        return perturb_shards(self.accelerator, ascent.weights, ascent.gradients, divide, rho, seed)

    def _shards(self, model: Any) -> list[tuple[Any, Tensor]]:
        """The shards of the weights that this process owns, each with the key of its gradient."""
        raise NotImplementedError

    def _moments(self, name: str) -> Iterable[Tensor]:
        """What the optimizer keeps under that name for each shard."""
        raise NotImplementedError

    def _reduce(self, parameters: list[Any], gradients: list[Tensor], sums: dict[Any, Tensor]) -> None:
        """Add the mean over the processes of each gradient to the sums of its owners."""
        raise NotImplementedError

    def _release(self, model: Any) -> None:
        """After a backward pass of the ascent, what DeepSpeed does after its own."""

    def restore(self) -> None:
        self._cleanup.run()

    def settle(self) -> None:
        """Where no process holds what another one perturbs, nothing is left to do."""


class _Flat:
    """How ZeRO-1 and -2 lay out the weights: views of one flat tensor a group, of which each process owns a stretch."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.wholes: list[Tensor] = optimizer.bit16_groups_flat
        self.groups: list[Any] = optimizer.real_dp_process_group
        self.masters: list[Tensor] = optimizer.single_partition_of_fp32_groups
        self.own = [
            stretches[torch.distributed.get_rank(group)]
            for stretches, group in zip(optimizer.parallel_partitioned_bit16_groups, self.groups, strict=True)
        ]

    def moments(self, name: str) -> Iterator[Tensor]:
        """What the optimizer keeps under that name for each stretch that this process owns."""
        for master in self.masters:
            yield self._optimizer.optimizer.state[master][name]

    def place(self, parameter: Tensor) -> tuple[int, int]:
        """The parameter's group, and at which number it begins there."""
        for index, whole in enumerate(self.wholes):
            numbers, rest = divmod(parameter.data_ptr() - whole.data_ptr(), whole.element_size())
            if rest == 0 and 0 <= numbers < whole.numel():
                return index, numbers
        raise RuntimeError(
            "a trainable weight is in none of DeepSpeed's flat groups, which this version lays out anew: install "
            "deepspeed==0.19.8, or set fsam_variant='none'."
        )

    def reduce(self, parameters: list[Any], gradients: list[Tensor], sums: dict[int, Tensor]) -> None:
        """Add the means over the processes to `sums`, each number at its owner's alone."""
        pieces: dict[tuple[int, int], list[tuple[int, Tensor]]] = defaultdict(list)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            index, place = self.place(parameter)
            length = self.own[index].numel()
            for start, end in _stretches(place, gradient.numel(), length):
                piece = gradient.flatten()[start - place : end - place]
                pieces[index, start // length].append((start % length, piece))
        for (index, owner), parts in sorted(pieces.items()):
            group = self.groups[index]
            joined = torch.cat([piece for _, piece in parts]).div_(torch.distributed.get_world_size(group))
            torch.distributed.reduce(joined, dst=torch.distributed.get_global_rank(group, owner), group=group)
            if owner == torch.distributed.get_rank(group):
                sizes = [piece.numel() for _, piece in parts]
                for (start, _), reduced in zip(parts, joined.split(sizes), strict=True):
                    sums[index][start : start + reduced.numel()] += reduced

    def gather(self, wholes: list[Tensor], own: list[Tensor]) -> None:
        """Every process's stretches into `wholes`."""
        for whole, stretch, group in zip(wholes, own, self.groups, strict=True):
            torch.distributed.all_gather_into_tensor(whole, stretch, group=group)


class ReplicatedDeepSpeedEngine(WholeDeepSpeedEngine):
    """ZeRO-1: weights and gradients are whole everywhere, as under DDP, and so are the perturbed weights; but each
    process has the second moment, and so the direction, of its own stretch alone."""

    @contextmanager
    def ascent(self, model: Any, *, average: bool, passes: int) -> Iterator[Ascent]:
        if not average:
            raise ValueError(RANK_SET_LATE)
        with super().ascent(model, average=False, passes=passes) as ascent:
            yield ascent

    def perturb(
        self, ascent: Ascent, optimizer: Optimizer | None, rho: float, seed: int, cotangents: list[Tensor]
    ) -> Perturbation:
        flat = _Flat(self._engine.optimizer)
        parameters = [parameter for parameter in self._engine.module.parameters() if parameter.requires_grad]
        if not ascent.owned:
            self._to_owners(ascent, flat, parameters)
        divide = _dividing_by(flat.moments("exp_avg_sq"), self._engine) if optimizer is not None else None
        result = perturb_shards(self.accelerator, ascent.weights, ascent.gradients, divide, rho, seed)
        wholes = [torch.empty_like(whole) for whole in flat.wholes]
        flat.gather(wholes, result.values)
        places = [flat.place(parameter) for parameter in parameters]
        result.weights = parameters
        result.values = [
            wholes[index][place : place + parameter.numel()].view_as(parameter)
            for parameter, (index, place) in zip(parameters, places, strict=True)
        ]
        return result

    def _to_owners(self, ascent: Ascent, flat: _Flat, parameters: list[Any]) -> None:
        sums = {index: torch.zeros_like(stretch) for index, stretch in enumerate(flat.own)}
        bucket = Bucket(self._engine.optimizer.reduce_bucket_size, partial(flat.reduce, sums=sums))
        gradients = dict(zip(ascent.weights, ascent.gradients, strict=True))
        ascent.gradients.clear()
        for parameter in parameters:
            gradient = gradients.pop(parameter, None)
            # Another process may have used this weight: all take part in the reduction.
            bucket.add(parameter, torch.zeros_like(parameter) if gradient is None else gradient)
        bucket.flush()
        ascent.weights, ascent.gradients, ascent.owned = flat.own, list(sums.values()), True

    def momentum(self, model: Any, optimizer: Optimizer) -> Ascent | None:
        if not _has_stepped(self._engine):
            return None
        flat = _Flat(self._engine.optimizer)
        return _along(flat.moments("exp_avg"), flat.own, model.module, self.accelerator.device)


class FlatDeepSpeedEngine(_ShardingEngine):
    """ZeRO-2: weights are whole everywhere, gradients are not. Each process perturbs the stretch that it owns, and the
    stretches are gathered as after an optimizer step.

    The way back is the same, from the master weights, unless the optimizer's step follows: that overwrites and gathers
    every weight anyway.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._own_moved = self._others_moved = False

    @property
    def _flat(self) -> _Flat:
        return _Flat(self._engine.optimizer)

    def _shards(self, model: Any) -> list[tuple[Any, Tensor]]:
        return list(enumerate(self._flat.own))

    def _moments(self, name: str) -> Iterable[Tensor]:
        return self._flat.moments(name)

    def _reduce(self, parameters: list[Any], gradients: list[Tensor], sums: dict[Any, Tensor]) -> None:
        self._flat.reduce(parameters, gradients, sums)

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        flat = self._flat
        self._own_moved = self._others_moved = True
        with self._cleanup.after(self._put_back):
            for own, value in zip(flat.own, perturbation.values, strict=True):
                own.copy_(value)
            flat.gather(flat.wholes, flat.own)
            with _around_step(self._engine, self._cleanup, after=self._overwritten):
                yield
            self.settle()

    def _overwritten(self) -> None:
        """By the optimizer's step, unless it was skipped."""
        if self._engine.was_step_applied():
            self._own_moved = self._others_moved = False

    def _put_back(self) -> None:
        if self._own_moved:
            flat = self._flat
            for own, master in zip(flat.own, flat.masters, strict=True):
                own.copy_(master.data)
            self._own_moved = False

    def settle(self) -> None:
        if self._others_moved:
            self._put_back()
            flat = self._flat
            flat.gather(flat.wholes, flat.own)
            self._others_moved = False


class ShardedDeepSpeedEngine(_ShardingEngine):
    """ZeRO-3: every process holds a shard of every weight, of its gradient and of the optimizer's state."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._all: list[Any] = []
        self._weights: list[Any] = []  # those that are trained
        self._moved = False

    def _shards(self, model: Any) -> list[tuple[Any, Tensor]]:
        self._all = list(model.module.parameters())
        self._weights = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
        return [(weight, weight.ds_tensor.data) for weight in self._weights]

    def _moments(self, name: str) -> Iterable[Tensor]:
        from deepspeed.utils import safe_get_local_optimizer_state

        for weight in self._weights:
            yield safe_get_local_optimizer_state(weight, name)

    def _reduce(self, parameters: list[Any], gradients: list[Tensor], sums: dict[Any, Tensor]) -> None:
        from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

        # The mean. The last process's parts are shorter than its shards, which end in padding.
        parts = reduce_scatter_coalesced([g.contiguous() for g in gradients], parameters[0].ds_process_group)
        for parameter, part in zip(parameters, parts, strict=True):
            sums[parameter][: part.numel()] += part

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        self._moved = True
        with self._cleanup.after(self._put_back):
            for weight, value in zip(self._weights, perturbation.values, strict=True):
                weight.ds_tensor.data.copy_(value)
            self._have_gathered_anew()
            with _around_step(self._engine, self._cleanup, before=self._put_back):
                yield

    def restore(self) -> None:
        super().restore()
        self._let_go(self._all)  # what a pass that was broken off has gathered

    def _put_back(self) -> None:
        """From the master weights, of which the weights are the rounding: no backup is kept."""
        from deepspeed.utils import safe_get_local_fp32_param

        if self._moved:
            for weight in self._weights:
                # Not `non_blocking` from the host, where the optimizer's step may come next.
                weight.ds_tensor.data.copy_(safe_get_local_fp32_param(weight))
            self._have_gathered_anew()
            self._moved = False

    def _release(self, model: Any) -> None:
        model.optimizer.backward_epilogue()

    def _have_gathered_anew(self) -> None:
        """What has been written into the shards is what the next pass computes with."""
        from deepspeed.accelerator import get_accelerator

        self._let_go(self._weights)
        # With overlap_comm weights are gathered on a stream that waits for nobody, in particular not for the one that
        # the shards were written on. DeepSpeed does not show it (0.19.8, hence the mangled name). There is none on the
        # CPU, where `synchronize` does nothing; in a version that hides it elsewhere the host waits.
        offload = self._engine.optimizer.parameter_offload
        gathering = getattr(offload, "_DeepSpeedZeRoOffload__allgather_stream", None)
        if gathering is None:
            get_accelerator().synchronize()
        else:
            gathering.wait_stream(get_accelerator().current_stream())

    def _let_go(self, weights: list[Any]) -> None:
        """Small weights stay gathered between the passes (stage3_param_persistence_threshold), others may after a pass
        that ended early, in the modules that it was in."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        for weight in weights:
            if weight.ds_status == ZeroParamStatus.AVAILABLE:
                weight.ds_active_sub_modules.clear()
                weight.partition(param_list=[weight], has_been_updated=False)


def _stretches(start: int, count: int, length: int) -> Iterator[tuple[int, int]]:
    """[start, start + count) cut at the multiples of `length`."""
    end = start + count
    while start < end:
        cut = min(end, (start // length + 1) * length)
        yield start, cut
        start = cut


def _has_stepped(engine: Any) -> bool:
    return engine.global_steps != engine.skipped_steps  # fp16 skips the first steps while it finds its loss scale


def _along(moments: Iterable[Tensor], shards: list[Tensor], module: nn.Module, device: torch.device) -> Ascent:
    """An ascent along the optimizer's momentum of the shards, on the device where gradients would be."""
    # Offloaded state stays where it is, but for this copy, and so do offloaded shards.
    copies = [
        each.to(device, shard.dtype, copy=True).view_as(shard) for each, shard in zip(moments, shards, strict=True)
    ]
    return Ascent(module, lambda loss: None, shards, copies, owned=True)


def _dividing_by(averages: Iterable[Tensor], engine: Any) -> Callable[[Sequence[Tensor]], None] | None:
    """What preconditions with these second moments; None before the optimizer's first step."""
    settings = _second_moment_settings(engine)
    if settings is None:
        return None
    # One after the other: offloaded state visits the device.
    return partial(precondition, moments=(SecondMoment(average, *settings) for average in averages))


def _second_moment_settings(engine: Any) -> tuple[float, float | Tensor, float] | None:
    """β₂, step and epsilon of the optimizer inside; None before its first step.

    Raises:
        ValueError: it keeps no second moment, or its groups differ in β₂ or epsilon.
    """
    inner = engine.optimizer.optimizer
    if not _has_stepped(engine):
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
