"""ZeRO on two processes trains like one process with both rows; what ZeRO would get wrong is refused by name."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_fsam.engines.deepspeed import ReplicatedDeepSpeedEngine, ShardedDeepSpeedEngine, select_deepspeed_engine
from tests.distributed import train_distributed
from tests.toys import distance, gpt2, make_trainer, weights_of

pytest.importorskip("deepspeed", reason="pip install hf-fsam[deepspeed]")

PRECONDITIONED = {"fsam_variant": "functional", "fsam_precondition": True, "gradient_accumulation_steps": 2}
WINDOW = {"fsam_precondition": False, "fsam_ascent_scope": "optimizer_step", "gradient_accumulation_steps": 2}
CORE = [
    (0, PRECONDITIONED),
    (1, PRECONDITIONED),
    (2, PRECONDITIONED),
    (3, PRECONDITIONED),
    (3, WINDOW | {"persistent": 10**6, "max_grad_norm": 0.1}),
]
MORE = [
    (stage, settings | {"fsam_variant": variant})
    for stage in (0, 1, 2, 3)
    for variant in ("none", "sam", "functional", "logit")
    for settings in (PRECONDITIONED, WINDOW, {"fsam_precondition": True}, {"fsam_precondition": False})
]


def _config(stage: int, persistent: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": persistent},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    } | more


@pytest.mark.parametrize(("stage", "settings"), CORE + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE])
def test_two_processes_under_zero_train_like_one(tmp_path: Path, stage: int, settings: dict[str, Any]) -> None:
    settings = {"fsam_rho": 0.3, "max_steps": 4} | settings
    config = _config(stage, settings.pop("persistent", 0))
    one = make_trainer(
        tmp_path, gpt2(), train_sampling_strategy="sequential", per_device_train_batch_size=2, **settings
    )
    before = weights_of(one.model)
    one.train()
    weights, logs, world = train_distributed(
        tmp_path / "two", 2, per_device_train_batch_size=1, deepspeed=config, **settings
    )
    assert world == 2
    moved = distance(weights_of(one.model), before)
    assert moved > 1e-2  # an engine that loses the update would otherwise look alike
    assert distance(weights, weights_of(one.model)) < 1e-5
    for key in ("loss", "fsam/sharpness", "fsam/ascent_grad_norm", "fsam/radius"):
        if key in one.state.log_history[0]:
            assert logs[0][key] == pytest.approx(one.state.log_history[0][key], rel=1e-3), key


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_in_bfloat16_the_radius_is_kept_and_the_masters_learn(tmp_path: Path, stage: int) -> None:
    weights, logs, _ = train_distributed(
        tmp_path / "two",
        2,
        deepspeed=_config(stage, bf16={"enabled": True}),
        bf16=True,
        fsam_rho=0.3,
        max_steps=4,
    )
    assert next(iter(weights.values())).dtype == torch.bfloat16
    assert logs[0]["fsam/radius"] == pytest.approx(0.3, rel=0.05)
    assert distance(weights, {name: w.bfloat16() for name, w in weights_of(gpt2()).items()}) > 1e-2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "hpZ"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "MiCS"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}}, "Super"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "NVMe"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload to the CPU"),
        ({"compile": {"deepcompile": True}}, "DeepCompile"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"pipeline": {"stages": 2}}, "pipeline"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"optimizer": {"type": "OneBitAdam"}}, "1-bit"),
    ],
)
def test_what_would_be_silently_wrong_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    def select(config: dict[str, Any], **args: Any):
        defaults = {"fsam_ascent_scope": "micro_batch", "activation_checkpointing": False}
        view = SimpleNamespace(**(defaults | {"activation_checkpointing_kwargs": None} | args))
        plugin = SimpleNamespace(deepspeed_config=config)
        return select_deepspeed_engine(view, SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))

    assert isinstance(select(_config(2)), ReplicatedDeepSpeedEngine)
    assert isinstance(select(_config(3)), ShardedDeepSpeedEngine)
    with pytest.raises(ValueError, match=named):
        select(_config(2) | change)
    with pytest.raises(ValueError, match="fsam_ascent_scope='rank'"):
        select(_config(3), fsam_ascent_scope="rank")
    with pytest.raises(ValueError, match="use_reentrant=True"):
        select(_config(1), activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
