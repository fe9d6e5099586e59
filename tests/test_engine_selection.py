"""Which engine a run gets, and what would be silently wrong: refused by name, before training."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_fsam.engines.deepspeed import (
    FlatDeepSpeedEngine,
    ReplicatedDeepSpeedEngine,
    ShardedDeepSpeedEngine,
    WholeDeepSpeedEngine,
    _gradients_to,
    select_deepspeed_engine,
)
from hf_fsam.engines.fsdp import FSDPEngine, select_fsdp_engine
from tests.distributed import zero

ARGUMENTS: dict[str, Any] = {
    "fsam_ascent_scope": "micro_batch",
    "fsam_ascent_direction": "gradient",
    "fsam_precondition": True,
    "torch_compile": False,
}


def select(config: dict[str, Any], **arguments: Any) -> object:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    return select_deepspeed_engine(SimpleNamespace(**(ARGUMENTS | arguments)), SimpleNamespace(state=state))


def select_fsdp(parallelism: Any = None, version: int = 2, offload: Any = None, **arguments: Any) -> object:
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version, cpu_offload=offload))
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
        ({"compile": {"deepcompile": True}}, "DeepCompile"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"pipeline": {"stages": 2}}, "pipeline"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"optimizer": {"type": "OneBitAdam"}}, "1-bit"),
        ({"optimizer": {"type": "Lion"}}, "fsam_precondition=True with the optimizer 'lion'"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "bf16 at ZeRO stage 0"),
        ({"zero_optimization": {"stage": 0}, "fp16": {"enabled": "auto"}}, "fp16 at ZeRO stage 0"),
    ],
)
def test_under_deepspeed(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        select(config(2) | change)


def test_rank_scope_needs_what_it_reads_in_one_place() -> None:
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
    ],
)
def test_under_fsdp(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        select_fsdp(**change)


def test_a_deepspeed_without_the_methods_that_are_intercepted_is_refused() -> None:
    taken: list[Any] = []
    unknown = SimpleNamespace(reduce_bucket_size=1, process_gradients=print)
    with (
        pytest.raises(RuntimeError, match=r"0\.19\.8.*lacks.*clear_backward_seen_flag"),
        _gradients_to(unknown, taken.append),
    ):
        pass
    known = SimpleNamespace(reduce_bucket_size=1, process_gradients=print, clear_backward_seen_flag=lambda: None)
    with _gradients_to(known, taken.append):
        known.process_gradients("weight", 0)
    assert taken == ["weight"]
