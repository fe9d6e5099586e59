"""DeepSpeed ZeRO: optimizer state, gradients and, at stage 3, weights are sharded.

Accelerate's `backward` calls `engine.backward(loss)` and, at the end of an accumulation window, `engine.step()`: the
weights have to be back at θ between the two. What DeepSpeed does not document is in `deepspeed_internals`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

import hf_fsam.engines.deepspeed_internals as internals
from hf_fsam.engines.base import RANK_SET_LATE, Ascent, Bucket, Engine
from hf_fsam.engines.local import LocalEngine, gradients_set_aside, trainable
from hf_fsam.optimizer_state import SecondMoment, momentum_name, second_moments_of_shards
from hf_fsam.perturbation import Perturbation


def select_deepspeed_engine(args: Any, accelerator: Accelerator) -> Engine:
    """The engine for the ZeRO stage of the run's DeepSpeed configuration.

    Raises:
        ValueError: something in it would be ignored or wrong; the message names it.
        RuntimeError: another version of DeepSpeed, without something that is used here; the message names it.
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
        "offload_optimizer.ratio < 1 (Twin-Flow) with fsam_precondition=True or fsam_ascent_direction='momentum'": (
            offload[0].get("ratio", 1) < 1 and (args.fsam_precondition or args.fsam_ascent_direction == "momentum")
        ),
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
    internals.check_classes(stage)
    if stage == 3:
        return ShardedDeepSpeedEngine(accelerator)
    if stage == 0 or rank:
        return WholeDeepSpeedEngine(accelerator)
    return ReplicatedDeepSpeedEngine(accelerator) if stage == 1 else FlatDeepSpeedEngine(accelerator)


# Takes weights and their gradients, and adds the means over the processes to sums, each number at its owner alone.
Reduce = Callable[[list[Any], list[Tensor]], None]


class _FlatShards:
    """What this process owns of the weights that are perturbed, at ZeRO-1 and -2: one stretch of each flat group.

    Stretches come as lists, one for each group. Shards are the parts of the weights in them, as views.
    """

    def __init__(self, engine: Any, weights: Sequence[Tensor], device: torch.device) -> None:
        self.groups, self._weights = internals.flat_groups(engine), weights
        self._state = internals.inner_optimizer(engine).state
        self._ranks = [torch.distributed.get_rank(group.processes) for group in self.groups]
        self.wholes = [group.whole for group in self.groups]
        self.stretches = self.owned(self.wholes)

    def owned(self, wholes: list[Tensor]) -> list[Tensor]:
        """The stretches that this process owns of tensors that are laid out as the groups are."""
        return [
            whole.view(torch.distributed.get_world_size(group.processes), -1)[rank]
            for whole, group, rank in zip(wholes, self.groups, self._ranks, strict=True)
        ]

    def shards(self, stretches: list[Tensor] | None = None) -> list[Tensor]:
        stretches = self.stretches if stretches is None else stretches
        return [
            stretches[index][begin : begin + part.stop - part.start]
            for weight in self._weights
            for index, owner, begin, part in self._parts(weight)
            if owner == self._ranks[index]
        ]

    def moments(self, name: str) -> Iterator[Tensor]:
        """What the optimizer has under that name for each shard."""
        yield from self.shards([self._state[group.master][name] for group in self.groups])

    def place(self, weight: Tensor) -> tuple[int, int]:
        """The weight's group, and at which number of it the weight begins."""
        for index, whole in enumerate(self.wholes):
            numbers, rest = divmod(weight.data_ptr() - whole.data_ptr(), whole.element_size())
            if rest == 0 and 0 <= numbers < whole.numel():
                return index, numbers
        raise RuntimeError(
            "a trainable weight is in none of DeepSpeed's flat groups, which this version lays out in another way: run "
            f"`pip install deepspeed=={internals.VERSION}`, or set fsam_variant='none'."
        )

    def _parts(self, weight: Tensor) -> Iterator[tuple[int, int, int, slice]]:
        """The weight, cut where a stretch ends: (group, owner, at which number of the owner's stretch the part begins,
        which numbers of the flattened weight it has)."""
        index, place = self.place(weight)
        length, start = self.stretches[index].numel(), 0
        while start < weight.numel():
            owner, begin = divmod(place + start, length)
            end = min(weight.numel(), start + length - begin)
            yield index, owner, begin, slice(start, end)
            start = end

    def accumulator(self) -> tuple[Reduce, list[Tensor]]:
        """What adds gradients up, and this process's sums: zeros, one for each shard."""
        sums = [torch.zeros_like(stretch) for stretch in self.stretches]
        return partial(self._reduce, sums=sums), self.shards(sums)

    def _reduce(self, weights: list[Tensor], gradients: list[Tensor], sums: list[Tensor]) -> None:
        pieces: dict[tuple[int, int], list[tuple[int, Tensor]]] = defaultdict(list)
        for weight, gradient in zip(weights, gradients, strict=True):
            for index, owner, begin, part in self._parts(weight):
                pieces[index, owner].append((begin, gradient.flatten()[part]))
        for (index, owner), parts in sorted(pieces.items()):  # in one order on all processes
            group = self.groups[index].processes
            joined = torch.cat([piece for _, piece in parts]).div_(torch.distributed.get_world_size(group))
            torch.distributed.reduce(joined, dst=torch.distributed.get_global_rank(group, owner), group=group)
            if owner == self._ranks[index]:
                sizes = [piece.numel() for _, piece in parts]
                for (begin, _), mean in zip(parts, joined.split(sizes), strict=True):
                    sums[index][begin : begin + mean.numel()] += mean

    def gather(self, wholes: list[Tensor]) -> None:
        """Every process's stretches, in place: each has its own in `wholes`."""
        for whole, stretch, group in zip(wholes, self.owned(wholes), self.groups, strict=True):
            torch.distributed.all_gather_into_tensor(whole, stretch, group=group.processes)


class _ShardsOfEach:
    """What this process owns of the weights that are perturbed, at ZeRO-3: one shard of each."""

    def __init__(self, engine: Any, weights: Sequence[Tensor], device: torch.device) -> None:
        self._weights, self._device = weights, device

    def shards(self) -> list[Tensor]:
        return [internals.shard_of(weight) for weight in self._weights]

    def moments(self, name: str) -> Iterator[Tensor]:
        from deepspeed.utils import safe_get_local_optimizer_state

        for weight in self._weights:  # one after the other: offloaded state visits the device
            yield safe_get_local_optimizer_state(weight, name)

    def accumulator(self) -> tuple[Reduce, list[Tensor]]:
        """What adds gradients up, and this process's sums: zeros, one for each shard."""
        zeros = [torch.zeros_like(shard, device=self._device) for shard in self.shards()]
        sums = dict(zip(self._weights, zeros, strict=True))

        def reduce(weights: list[Any], gradients: list[Tensor]) -> None:
            for weight, part in zip(weights, internals.reduce_scatter(weights, gradients), strict=True):
                sums[weight][: part.numel()] += part

        return reduce, zeros


class _DeepSpeedEngine(Engine):
    """What the engines for all stages have in common."""

    _checked = False

    @property
    def _engine(self) -> Any:
        """DeepSpeed's, which is there when the training has begun: its names are checked when it is first used."""
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        if not self._checked:
            internals.check_engine(engine)
            self._checked = True
        return engine

    def scale(self, loss: Tensor) -> Tensor:
        return loss * internals.loss_scale(self._engine)

    @contextmanager
    def without_sync(self, model: nn.Module) -> Iterator[nn.Module]:
        # The module inside, because the engine's own forward pass announces a backward pass of the training.
        yield self._engine.module

    def _around_step(
        self, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
    ) -> AbstractContextManager[None]:
        """Inside, DeepSpeed's step has `before` and `after` around it. They can't wait for the end of Accelerate's
        `backward`, which steps."""
        engine = self._engine
        step = engine.step

        def surrounded_step(*args: Any, **kwargs: Any) -> Any:
            before()
            result = step(*args, **kwargs)
            after()
            return result

        return self._cleanup.replaced(engine, "step", surrounded_step)


class WholeDeepSpeedEngine(_DeepSpeedEngine, LocalEngine):
    """ZeRO-0 and, at stages 1 and 2, the scope `rank`: every process ascends, perturbs and restores on its own, with
    gradient and backup whole, as under DDP."""

    detached_weights_stay = True
    forward_can_be_retried = gradients_whole = False  # DeepSpeed follows the passes with hooks of its own

    def _ascending(self, model: nn.Module) -> AbstractContextManager[None]:
        return internals.gradients_to(self._engine, self._cleanup, take=lambda weight: None)

    def second_moments(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> Iterable[SecondMoment | None] | None:
        if internals.shards_optimizer(self._engine):
            raise ValueError(
                "fsam_precondition=True was set after the start with fsam_ascent_scope='rank', where no process "
                "holds the second moment whole: set fsam_precondition=False, or begin with another fsam_ascent_scope."
            )
        return super().second_moments(optimizer, weights)

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        with super().perturbed(perturbation), self._around_step(before=self._swap.restore):
            yield


_Shards = TypeVar("_Shards", _FlatShards, _ShardsOfEach)


class _ShardsEngine(_DeepSpeedEngine, Generic[_Shards]):
    """ZeRO-1, -2 and -3: each process has the moments of its shards alone, and perturbs these."""

    perturbs_shards = True
    _shards: type[_Shards]
    _weights: Sequence[Any] = ()  # that are perturbed

    @property
    def _held(self) -> _Shards:
        return self._shards(self._engine, self._weights, self.accelerator.device)

    def momentum(self, model: nn.Module, weights: Sequence[Tensor], optimizer: Optimizer) -> Ascent | None:
        self.settle()
        self._weights = weights
        if not internals.has_stepped(self._engine):
            return None
        held, name = self._held, momentum_name(internals.inner_optimizer(self._engine))
        shards = held.shards()
        # A copy on the device where gradients would be. State and shards that are offloaded stay where they are.
        moments = [
            moment.to(self.accelerator.device, shard.dtype, copy=True).view_as(shard)
            for moment, shard in zip(held.moments(name), shards, strict=True)
        ]
        return Ascent(lambda loss: None, shards, moments)

    def second_moments(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> Iterator[SecondMoment] | None:
        if not internals.has_stepped(self._engine):
            return None
        return second_moments_of_shards(internals.inner_optimizer(self._engine), self._held.moments("exp_avg_sq"))


class ReplicatedDeepSpeedEngine(_ShardsEngine[_FlatShards], WholeDeepSpeedEngine):
    """ZeRO-1: weights and gradients are whole everywhere, as under DDP, and so are the perturbed weights. But each
    process has the moments, and so the direction, of its own stretch alone."""

    detached_weights_stay = True
    forward_can_be_retried = gradients_whole = False
    _shards = _FlatShards

    @contextmanager
    def ascent(self, model: nn.Module, weights: Sequence[Tensor], *, average: bool, passes: int) -> Iterator[Ascent]:
        if not average:
            raise ValueError(RANK_SET_LATE)
        with super().ascent(model, weights, average=False, passes=passes) as ascent:
            yield ascent
        self._weights = weights
        held, gradient_of = self._held, dict(zip(ascent.weights, ascent.gradients, strict=True))
        reduce, ascent.gradients = held.accumulator()
        ascent.weights = held.shards()
        bucket = Bucket(internals.reduced_at_once(self._engine), reduce)
        for weight in weights:
            gradient = gradient_of.pop(weight, None)  # it is let go of when it has been reduced
            # Another process may have used this weight, and all have to take part in the reduction.
            bucket.add(weight, torch.zeros_like(weight) if gradient is None else gradient)
        bucket.flush()

    def perturb(self, *args: Any, **kwargs: Any) -> Perturbation:
        result, held = super().perturb(*args, **kwargs), self._held
        # θ+ε of all processes. Only the weights that are perturbed get values here, and only they are used.
        wholes = [torch.empty_like(whole) for whole in held.wholes]
        for shard, value in zip(held.shards(held.owned(wholes)), result.values, strict=True):
            shard.copy_(value)
        held.gather(wholes)
        result.weights, result.values = list(self._weights), []
        for weight in self._weights:
            index, begin = held.place(weight)
            result.values.append(wholes[index][begin : begin + weight.numel()].view_as(weight))
        return result


class _ShardingEngine(_ShardsEngine[_Shards]):
    """ZeRO-2 and -3: ascent gradients are reduced to their owners as they arrive and added up there, in the weights'
    dtype. Nothing of them enters ZeRO's own accumulators, and no process has them whole."""

    @contextmanager
    def ascent(self, model: nn.Module, weights: Sequence[Tensor], *, average: bool, passes: int) -> Iterator[Ascent]:
        if not average:
            raise ValueError(RANK_SET_LATE)
        self.settle()
        engine, self._weights, perturbed = self._engine, weights, set(weights)
        reduce, gradients = self._held.accumulator()
        bucket = Bucket(internals.reduced_at_once(engine), reduce)

        def backward(loss: Tensor) -> None:
            self.scale(loss).backward()
            bucket.flush()
            self._end_backward()

        def take(weight: Any) -> None:
            gradient, weight.grad = weight.grad, None
            if weight in perturbed:
                bucket.add(weight, gradient)

        ascent = Ascent(backward)
        with (
            gradients_set_aside(trainable(engine.module), self._cleanup),
            internals.gradients_to(engine, self._cleanup, take),
        ):
            yield ascent
        ascent.weights, ascent.gradients = self._held.shards(), gradients

    def _end_backward(self) -> None:
        """What DeepSpeed does after a backward pass of its own, where the ascent's needs it too."""


class FlatDeepSpeedEngine(_ShardingEngine[_FlatShards]):
    """ZeRO-2: weights are whole everywhere, gradients are not. Each process perturbs the stretch that it owns, and the
    stretches are gathered as after an optimizer step.

    The way back is the same, from the master weights, unless the optimizer's step follows: that overwrites and gathers
    every weight anyway.
    """

    detached_weights_stay = False  # their memory is written to
    forward_can_be_retried = gradients_whole = False
    _shards = _FlatShards

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._own_moved = self._others_moved = False

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        held = self._held
        self._own_moved = self._others_moved = True
        with self._cleanup.after(self._put_back):
            for shard, value in zip(perturbation.weights, perturbation.values, strict=True):
                shard.copy_(value)
            held.gather(held.wholes)
            with self._around_step(after=self._overwritten):
                yield
            self.settle()

    def _overwritten(self) -> None:
        """By the optimizer's step, unless that was skipped."""
        if internals.was_step_applied(self._engine):
            self._own_moved = self._others_moved = False

    def _put_back(self) -> None:
        if self._own_moved:
            held = self._held
            for stretch, group in zip(held.stretches, held.groups, strict=True):
                stretch.copy_(group.master.data)
            self._own_moved = False

    def settle(self) -> None:
        if self._others_moved:
            self._put_back()
            held = self._held
            held.gather(held.wholes)
            self._others_moved = False


class ShardedDeepSpeedEngine(_ShardingEngine[_ShardsOfEach]):
    """ZeRO-3: every process holds a shard of every weight, of its gradient and of the optimizer's state."""

    detached_weights_stay = False  # they are gathered for a moment only, and from shards that are written to
    forward_can_be_retried = gradients_whole = False
    _shards = _ShardsOfEach

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._moved = False

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        self._moved = True
        with self._cleanup.after(self._put_back):
            for weight, value in zip(self._weights, perturbation.values, strict=True):
                internals.shard_of(weight).copy_(value)
            self._have_gathered_anew()
            with self._around_step(before=self._put_back):
                yield

    def restore(self) -> None:
        super().restore()
        if getattr(self.accelerator, "deepspeed_engine_wrapped", None) is not None:  # the training has begun
            # What a pass that was broken off has gathered, of weights that are not trained too.
            internals.release_gathered(self._engine.module.parameters())

    def _put_back(self) -> None:
        """From the master weights, of which the weights are the rounding: there is no backup."""
        from deepspeed.utils import safe_get_local_fp32_param

        if self._moved:
            for weight in self._weights:
                # Not `non_blocking` from the host, where the optimizer's step may come next.
                internals.shard_of(weight).copy_(safe_get_local_fp32_param(weight))
            self._have_gathered_anew()
            self._moved = False

    def _have_gathered_anew(self) -> None:
        """The next pass computes with what has been written into the shards."""
        internals.release_gathered(self._weights)
        internals.gather_after_writes(self._engine)

    def _end_backward(self) -> None:
        internals.end_backward(self._engine)
