"""Every name of DeepSpeed that its documentation does not promise, as read in DeepSpeed 0.19.8.

Nothing else in hf_fsam uses such a name. All of them are checked: those of DeepSpeed's classes before the training
starts, those of its objects when the first ascent begins. This module imports DeepSpeed in its functions only.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from hf_fsam.cleanup import Cleanup

VERSION = "0.19.8"

# DeepSpeed's hooks on the weights call one of these for each weight whose gradient is complete.
_TAKE_GRADIENT_FLAT = "process_gradients"  # ZeRO-1 and -2
_TAKE_GRADIENT_SHARDED = "reduce_ready_partitions_and_remove_grads"  # ZeRO-3
_BACKWARD = ("clear_backward_seen_flag", "_backward_active_depth", "exit_backward", "loss_scale")

# Class or module: the ZeRO stages at which it is used, and the names that it has to have.
_OF_CLASSES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "deepspeed.runtime.engine.DeepSpeedEngine": ((0, 1, 2, 3), ("was_step_applied", "zero_optimization_stage")),
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": ((1, 2), (_TAKE_GRADIENT_FLAT, *_BACKWARD)),
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        (3,),
        (_TAKE_GRADIENT_SHARDED, *_BACKWARD, "backward_epilogue"),
    ),
    "deepspeed.runtime.zero.partition_parameters.ZeroParamStatus": ((3,), ("AVAILABLE",)),
    "deepspeed.runtime.comm.coalesced_collectives": ((3,), ("reduce_scatter_coalesced",)),
}
_OF_ENGINE = ("optimizer", "basic_optimizer", "global_steps", "skipped_steps")
_OF_FLAT_OPTIMIZER = (
    *(_TAKE_GRADIENT_FLAT, *_BACKWARD, "optimizer", "reduce_bucket_size"),
    *("bit16_groups_flat", "single_partition_of_fp32_groups", "real_dp_process_group"),
)
_OF_SHARDED_OPTIMIZER = (_TAKE_GRADIENT_SHARDED, *_BACKWARD, "optimizer", "reduce_bucket_size", "parameter_offload")
_OF_SHARDED_WEIGHT = ("ds_tensor", "ds_status", "ds_active_sub_modules", "ds_process_group", "partition")


# ---- The check ----


def check_classes(stage: int) -> None:
    """Whether DeepSpeed's classes have what is used of them at this ZeRO stage. Before training.

    Raises:
        RuntimeError: something is missing; the message names it and the cure.
    """
    for path, (stages, names) in _OF_CLASSES.items():
        if stage in stages:
            try:
                owner = resolve_name(path)
            except (ImportError, AttributeError):
                raise _missing(path) from None
            _check(owner, path, names)


def check_engine(engine: Any) -> None:
    """Whether DeepSpeed's engine, the optimizer in it and its weights have what is used of them. At the first ascent.

    Raises:
        RuntimeError: as above.
    """
    _check(engine, "DeepSpeedEngine", _OF_ENGINE)
    if not shards_optimizer(engine):
        return
    optimizer = engine.optimizer
    sharded = engine.zero_optimization_stage() == 3
    _check(optimizer, type(optimizer).__name__, _OF_SHARDED_OPTIMIZER if sharded else _OF_FLAT_OPTIMIZER)
    if sharded:
        for weight in engine.module.parameters():
            _check(weight, "a weight under ZeRO-3", _OF_SHARDED_WEIGHT)


def _check(owner: Any, path: str, names: Iterable[str]) -> None:
    for name in names:
        if not hasattr(owner, name):
            raise _missing(f"{path}: {name}")


def _missing(what: str) -> RuntimeError:
    import deepspeed

    return RuntimeError(
        f"hf_fsam uses a name of DeepSpeed {VERSION}'s that DeepSpeed {deepspeed.__version__} does not have ({what}). "
        f"Run `pip install deepspeed=={VERSION}`, choose another ZeRO stage, or set fsam_variant='none'."
    )


# ---- The engine and its backward pass, at all stages ----


def shards_optimizer(engine: Any) -> bool:
    """Whether DeepSpeed has put an optimizer of its own around the training's, as it does from ZeRO-1 on."""
    return engine.optimizer is not engine.basic_optimizer


def inner_optimizer(engine: Any) -> Optimizer:
    """The training's, inside of ZeRO's."""
    return engine.optimizer.optimizer


def loss_scale(engine: Any) -> Any:
    return engine.optimizer.loss_scale if shards_optimizer(engine) else 1.0


def has_stepped(engine: Any) -> bool:
    """With fp16 the first steps are skipped, until a loss scale is found."""
    return engine.global_steps != engine.skipped_steps


def was_step_applied(engine: Any) -> bool:
    """Whether its last step changed the weights, and was not skipped by the loss scaler."""
    return engine.was_step_applied()


def reduced_at_once(engine: Any) -> int:
    """How many numbers of the gradients DeepSpeed reduces together."""
    return engine.optimizer.reduce_bucket_size


@contextmanager
def gradients_to(engine: Any, cleanup: Cleanup, take: Callable[[Any], None]) -> Iterator[None]:
    """Inside, a weight whose gradient is complete goes to `take`, and not to ZeRO's reduction and accumulation. There
    is no public way to keep a backward pass from these."""
    optimizer = engine.optimizer
    if not shards_optimizer(engine):  # and then there are no hooks
        yield
        return
    # What the engine calls before each forward pass of its own. Without it, the hooks would enter a backward pass that
    # nothing leaves.
    optimizer.clear_backward_seen_flag()
    # A backward pass that was broken off has not been left, either: DeepSpeed would end it with the ascent's.
    while optimizer._backward_active_depth:
        optimizer.exit_backward()
    method = _TAKE_GRADIENT_SHARDED if engine.zero_optimization_stage() == 3 else _TAKE_GRADIENT_FLAT
    with cleanup.replaced(optimizer, method, lambda weight, *_: take(weight)):
        yield


# ---- ZeRO-1 and -2: weights lie end to end in flat groups ----


@dataclass(frozen=True)
class FlatGroup:
    """One group of weights.

    Attributes:
        whole: the weights end to end and padded, (n,); the weights are views of it.
        master: the float32 weights of this process's part, (n / processes,).
        processes: which of them hold a part, in this order.
    """

    whole: Tensor
    master: Tensor
    processes: ProcessGroup


def flat_groups(engine: Any) -> list[FlatGroup]:
    optimizer = engine.optimizer
    parts = (optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups, optimizer.real_dp_process_group)
    return [FlatGroup(*group) for group in zip(*parts, strict=True)]


# ---- ZeRO-3: each weight is sharded ----


def shard_of(weight: Any) -> Tensor:
    """This process's shard, padded, (n / processes,)."""
    return weight.ds_tensor.data


def reduce_scatter(weights: list[Any], gradients: list[Tensor]) -> list[Tensor]:
    """The mean of each gradient over the processes, of which each gets the part of its shard, (at most n / processes,):
    the last process's parts are shorter than its shards, which end in padding."""
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

    return reduce_scatter_coalesced([gradient.contiguous() for gradient in gradients], weights[0].ds_process_group)


def end_backward(engine: Any) -> None:
    """What DeepSpeed does after a backward pass of its own."""
    engine.optimizer.backward_epilogue()


def release_gathered(weights: Iterable[Any]) -> None:
    """Small weights stay gathered between the passes (stage3_param_persistence_threshold), and a pass that ended early
    leaves those of the modules that it was in. After this they are gathered from the shards when they are next used."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for weight in weights:
        if weight.ds_status == ZeroParamStatus.AVAILABLE:
            weight.ds_active_sub_modules.clear()
            weight.partition(param_list=[weight], has_been_updated=False)


def gathering_stream(engine: Any) -> Any:
    """The stream on which ZeRO-3 gathers weights; None where it is not known. The attribute is private, hence the
    mangled name."""
    return getattr(engine.optimizer.parameter_offload, "_DeepSpeedZeRoOffload__allgather_stream", None)


def gather_after_writes(engine: Any) -> None:
    """Weights that are gathered from now on come after everything that was written into the shards until now.

    With overlap_comm DeepSpeed gathers on a stream of its own, which does not wait for the one that the shards were
    written on. On the CPU there is none, and `synchronize` does nothing; where another version calls it something else,
    the host waits for the device.
    """
    from deepspeed.accelerator import get_accelerator

    gathering = gathering_stream(engine)
    if gathering is None:
        get_accelerator().synchronize()
    else:
        gathering.wait_stream(get_accelerator().current_stream())
