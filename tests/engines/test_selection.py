"""Which engine a run gets, and what would be silently wrong: refused by name, before training."""

import gc
from contextlib import nullcontext
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, TorchDynamoPlugin

from hf_fsam.cleanup import Cleanup
from hf_fsam.engines import deepspeed_internals, select_engine
from hf_fsam.engines.deepspeed import (
    FlatDeepSpeedEngine,
    ReplicatedDeepSpeedEngine,
    ShardedDeepSpeedEngine,
    WholeDeepSpeedEngine,
    select_deepspeed_engine,
)
from hf_fsam.engines.fsdp import FSDPEngine, select_fsdp_engine
from hf_fsam.engines.local import LocalEngine
from tests.engines.distributed import zero
from tests.toys import make_trainer

ARGUMENTS: dict[str, Any] = {
    "fsam_ascent_scope": "micro_batch",
    "fsam_ascent_direction": "gradient",
    "fsam_precondition": True,
    "torch_compile": False,
}


def select(config: dict[str, Any], **arguments: Any) -> object:
    pytest.importorskip("deepspeed", reason="pip install hf-fsam[deepspeed]")
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    return select_deepspeed_engine(SimpleNamespace(**(ARGUMENTS | arguments)), SimpleNamespace(state=state))


def select_fsdp(
    parallelism: Any = None, version: int = 2, offload: Any = None, backend: str = "no", **arguments: Any
) -> object:
    state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(fsdp_version=version, cpu_offload=offload), dynamo_plugin=TorchDynamoPlugin(backend)
    )
    accelerator = SimpleNamespace(state=state, parallelism_config=parallelism)
    return select_fsdp_engine(SimpleNamespace(**(ARGUMENTS | arguments)), accelerator)


def config(stage: int, **more: Any) -> dict[str, Any]:
    return zero(stage, **more)["deepspeed"]


def test_the_engine_follows_stage_and_scope() -> None:
    for stage, engine in enumerate(
        (WholeDeepSpeedEngine, ReplicatedDeepSpeedEngine, FlatDeepSpeedEngine, ShardedDeepSpeedEngine)
    ):
        assert type(select(config(stage))) is engine
    assert type(select(config(2), fsam_ascent_scope="rank", fsam_precondition=False)) is WholeDeepSpeedEngine
    assert type(select({})) is WholeDeepSpeedEngine
    assert type(select(config(2, bf16={"enabled": True}))) is FlatDeepSpeedEngine
    assert type(select(config(2, optimizer={"type": "AdamW"}))) is FlatDeepSpeedEngine
    assert type(select_fsdp()) is FSDPEngine


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "hpZ"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "qwZ"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "qgZ"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "MiCS"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}}, "Super"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "NVMe"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "NVMe"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "Twin-Flow"),
        ({"compile": {"deepcompile": True}}, "DeepCompile"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"pipeline": {"stages": 2}}, "pipeline"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"optimizer": {"type": "OneBitAdam"}}, "1-bit"),
        ({"optimizer": {"type": "Lion"}}, "fsam_precondition=True with the optimizer 'lion'"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "bf16 at ZeRO stage 0"),
        ({"zero_optimization": {"stage": 0}, "fp16": {"enabled": "auto"}}, "fp16 at ZeRO stage 0"),
        (
            {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            "grad_accum_dtype='fp32' with bf16 at ZeRO stage 1",
        ),
    ],
)
def test_unsupported_settings_of_deepspeed_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        select(config(2) | change)


def test_rank_scope_is_refused_where_gradients_or_moments_are_sharded() -> None:
    with pytest.raises(ValueError, match=r"fsam_ascent_scope='rank' at ZeRO stage 3"):
        select(config(3), fsam_ascent_scope="rank", fsam_precondition=False)
    with pytest.raises(ValueError, match=r"'rank' with fsam_ascent_direction='momentum' at ZeRO stage 2"):
        select(config(2), fsam_ascent_scope="rank", fsam_precondition=False, fsam_ascent_direction="momentum")
    with pytest.raises(ValueError, match=r"'rank' with fsam_precondition=True at ZeRO stage 1"):
        select(config(1), fsam_ascent_scope="rank")
    with pytest.raises(ValueError, match=r"fsam_ascent_scope='rank'.* under FSDP"):
        select_fsdp(fsam_ascent_scope="rank")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 1}, "FSDP1"),
        ({"offload": torch.distributed.fsdp.CPUOffloadPolicy()}, "offload to the CPU"),
        ({"parallelism": SimpleNamespace(dp_replicate_enabled=True)}, "hybrid sharding"),
        ({"torch_compile": True}, "torch_compile"),
        ({"backend": "inductor"}, "torch_compile"),  # by Accelerate's own configuration
    ],
)
def test_unsupported_settings_of_fsdp_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        select_fsdp(**change)


@pytest.mark.parametrize(
    ("owner", "name", "stages"),
    [
        ("deepspeed.runtime.engine.DeepSpeedEngine", "was_step_applied", (0, 1, 2, 3)),
        ("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer", "process_gradients", (1, 2)),
        ("deepspeed.runtime.base_optimizer.ZeROOptimizer", "_backward_active_depth", (1, 2, 3)),
        ("deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3", "backward_epilogue", (3,)),
        ("deepspeed.runtime.comm.coalesced_collectives", "reduce_scatter_coalesced", (3,)),
        ("deepspeed.runtime.zero.partition_parameters", "ZeroParamStatus", (3,)),
    ],
)
def test_a_deepspeed_without_a_name_that_is_used_is_refused_before_training(
    owner: str, name: str, stages: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed", reason="pip install hf-fsam[deepspeed]")
    for base in getattr(resolve_name(owner), "__mro__", [resolve_name(owner)]):
        if name in vars(base):
            monkeypatch.delattr(base, name)
    for stage in range(4):
        refused = pytest.raises(
            RuntimeError, match=rf"{name}\)\. Run `pip install deepspeed==0\.19\.8`, choose another"
        )
        with refused if stage in stages else nullcontext():
            select(config(stage))


class BF16Like:
    """What DeepSpeed may put around an optimizer, with hooks that are not those of ZeRO."""

    def clear_backward_seen_flag(self) -> None: ...


class ZeroLike(BF16Like):
    _backward_active_depth = 2  # two backward passes were broken off

    def process_gradients(self, *args: Any) -> None: ...

    def exit_backward(self) -> None:
        self._backward_active_depth -= 1


def wrapped(optimizer: Any) -> Any:
    names = {"basic_optimizer": "AdamW", "global_steps": 1, "skipped_steps": 0, "module": torch.nn.Linear(1, 1)}
    return SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 1, **names)


def test_what_deepspeed_puts_around_an_optimizer_is_known_or_refused() -> None:
    pytest.importorskip("deepspeed", reason="pip install hf-fsam[deepspeed]")
    with pytest.raises(RuntimeError, match=r"DeepSpeed 0\.19\.8's .*\(BF16Like: process_gradients\)"):
        deepspeed_internals.check_engine(wrapped(BF16Like()))
    with pytest.raises(RuntimeError, match=r"\(DeepSpeedEngine: basic_optimizer\)"):
        deepspeed_internals.check_engine(SimpleNamespace(optimizer=BF16Like()))


def test_gradients_of_an_ascent_do_not_reach_zero() -> None:
    taken: list[Any] = []
    known = ZeroLike()
    with deepspeed_internals.gradients_to(wrapped(known), Cleanup(), taken.append):
        known.process_gradients("weight", 0)
    known.process_gradients("another", 0)
    assert taken == ["weight"]
    assert known._backward_active_depth == 0
    assert vars(known).keys() == {"_backward_active_depth"}
    plain = SimpleNamespace(optimizer="AdamW", basic_optimizer="AdamW")  # stage 0
    with deepspeed_internals.gradients_to(plain, Cleanup(), taken.append):
        pass


def test_momentum_is_copied_to_the_device_of_the_gradients() -> None:
    """However little of it is there: moments and shards may both be offloaded."""
    moments, shards = [torch.ones(4, dtype=torch.float32)], [torch.zeros(2, 2, dtype=torch.bfloat16)]
    of_deepspeed = wrapped(SimpleNamespace(optimizer=SimpleNamespace(state={0: {"exp_avg": moments[0]}})))
    of_deepspeed.basic_optimizer = of_deepspeed.optimizer  # so that it is not looked into
    wrapper = SimpleNamespace(engine=of_deepspeed)
    accelerator = SimpleNamespace(deepspeed_engine_wrapped=wrapper, device=torch.device("meta"))
    engine: Any = ShardedDeepSpeedEngine(accelerator)
    engine._shards = lambda *args: SimpleNamespace(shards=lambda: shards, moments=lambda name: moments)
    ascent = engine.momentum(None, [], None)
    assert ascent is not None
    (copy,) = ascent.gradients
    assert (copy.device.type, copy.dtype, copy.shape) == ("meta", torch.bfloat16, (2, 2))


ENGINES = [LocalEngine, WholeDeepSpeedEngine, ReplicatedDeepSpeedEngine, FlatDeepSpeedEngine]
ENGINES += [ShardedDeepSpeedEngine, FSDPEngine]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pass_is_made_again_only_where_it_has_no_side_effects(engine: Any) -> None:
    assert engine.forward_can_be_retried == engine.gradients_whole == (engine is LocalEngine)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_says_what_it_can_do(engine: Any) -> None:
    """And does not take it over from another one, of which it may not be true."""
    said = [vars(kind) for kind in engine.__mro__[: 1 if issubclass(engine, LocalEngine) else 2]]
    for capability in ("detached_weights_stay", "forward_can_be_retried", "gradients_whole"):
        assert any(capability in names for names in said), capability
    moves = (FlatDeepSpeedEngine, ShardedDeepSpeedEngine, FSDPEngine)
    assert engine.detached_weights_stay == (not issubclass(engine, moves))


@pytest.mark.parametrize(("kind", "refused"), [(DistributedType.MULTI_CPU, True), (DistributedType.NO, False)])
def test_a_static_graph_is_refused_where_ddp_would_follow_it(
    kind: DistributedType, refused: bool, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, fsam_variant="none", ddp_static_graph=True)
    trainer.accelerator.state.distributed_type = kind
    try:
        with pytest.raises(ValueError, match="ddp_static_graph=True") if refused else nullcontext():
            select_engine(trainer)
    finally:
        trainer.accelerator.state.distributed_type = DistributedType.NO


# What an interrupted step leaves --------------------------------------------------------------------------------------


def test_cleanup_happens_once_and_in_reverse() -> None:
    cleanup, done = Cleanup(), []
    with cleanup.after(lambda: done.append("outer")):
        with cleanup.after(lambda: done.append("inner")):
            pass
        assert done == ["inner"]
        with cleanup.after(lambda: done.append("inner")):
            cleanup.run()
            assert done == ["inner", "inner", "outer"]
    assert done == ["inner", "inner", "outer"]


def test_what_has_been_cleaned_up_is_not_undone_later() -> None:
    """A generator whose exit never came ends when the traceback goes: in the middle of another step, maybe."""
    owner, cleanup = SimpleNamespace(), Cleanup()
    interrupted = cleanup.replaced(owner, "step", "interrupted")
    interrupted.__enter__()
    assert owner.step == "interrupted"
    cleanup.run()
    assert vars(owner) == {}
    with cleanup.replaced(owner, "step", "next"):
        del interrupted
        gc.collect()
        assert owner.step == "next"
    assert vars(owner) == {}
    owner.step = "the user's"
    with cleanup.replaced(owner, "step", "ours"):
        pass
    assert owner.step == "the user's"


def test_an_interrupted_cleanup_is_finished_by_the_next_one() -> None:
    cleanup, tries = Cleanup(), []

    def undo() -> None:
        tries.append(len(tries))
        if len(tries) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), cleanup.after(undo):
        pass
    cleanup.run()
    cleanup.run()
    assert tries == [0, 1]
