"""What Functional-SAM adds to a process's peak memory and to what passes between the processes, counted."""

from pathlib import Path
from typing import Any

import pytest

from tests.engines.distributed import ENGINES, FSDP2, Trained, train_distributed, zero
from tests.toys import WIDE, llama

pytest.importorskip("deepspeed", reason="pip install hf-fsam[deepspeed]")

BASE: dict[str, Any] = {
    "fsam_precondition": True,
    "max_steps": 3,
    "per_device_train_batch_size": 1,
    "wide": True,
    "measured": True,
}
PLAIN = {"fsam_variant": "none"}
WINDOW = {"fsam_ascent_scope": "optimizer_step"}
TWICE = {"gradient_accumulation_steps": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # what is measured, what it is measured against
    "micro_batch": ({}, PLAIN),
    "sam": ({"fsam_variant": "sam", "fsam_precondition": False}, PLAIN),
    "window": (WINDOW | TWICE, PLAIN | TWICE),
}
SMALL = {"reduce_bucket_size": 20_000}  # beside a million weights, as half a milliard is beside many
SHARDED = {
    "zero2": zero(2, **SMALL),
    "zero3": zero(3, **SMALL),
    "zero2_bf16": zero(2, bf16={"enabled": True}, **SMALL) | {"bf16": True},
    "zero3_bf16": zero(3, bf16={"enabled": True}, **SMALL) | {"bf16": True},
    "fsdp2": FSDP2,
}


def run(folder: Path, processes: int, engine: dict[str, Any]) -> dict[str, tuple[Trained, Trained]]:
    """Each case with its plain one."""
    settings = [case for pair in CASES.values() for case in pair]
    ended = train_distributed(folder, processes, *(BASE | each | engine for each in settings))
    return dict(zip(CASES, zip(ended[::2], ended[1::2], strict=True), strict=True))


CORE = ("zero3_bf16", "fsdp2")


@pytest.mark.parametrize(
    ("engine", "processes"),
    [
        pytest.param(engine, processes, marks=() if processes == 2 and engine in CORE else pytest.mark.slow)
        for engine in SHARDED
        for processes in (1, 2, 4)
        if not (engine == "fsdp2" and processes == 1)  # not distributed
    ],
)
def test_memory_grows_by_a_shard_of_the_weights(engine: str, processes: int, tmp_path: Path) -> None:
    width = 2 if engine.endswith("bf16") else 4
    shard = sum(parameter.numel() for parameter in llama(**WIDE).parameters()) * width / processes
    for case, (split, plain) in run(tmp_path / "run", processes, SHARDED[engine]).items():
        grown = (split.facts["peak"] - plain.facts["peak"]) / shard
        assert grown < 1.2, (case, grown)
        assert grown > 0.5 or case == "window", (case, grown)  # or the count sees nothing


@pytest.mark.parametrize(
    "engine",
    [pytest.param(e, marks=() if e in ("ddp", "zero2", "zero3", "fsdp2") else pytest.mark.slow) for e in ENGINES],
)
def test_a_step_sends_at_most_twice_the_plain_bytes(engine: str, tmp_path: Path) -> None:
    """What a step of `micro_batch` sends, and a window of `optimizer_step`."""
    for case, (split, plain) in run(tmp_path / "run", 2, ENGINES[engine]).items():
        assert plain.facts["bytes"] > 0
        assert split.facts["bytes"] <= 2.001 * plain.facts["bytes"], case


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero0", "zero1", "zero2"])
def test_rank_scope_sends_nothing_more(engine: str, tmp_path: Path) -> None:
    alone = {"fsam_ascent_scope": "rank", "fsam_precondition": False}
    split, plain = train_distributed(tmp_path / "run", 2, *(BASE | case | ENGINES[engine] for case in (alone, PLAIN)))
    assert split.facts["bytes"] == plain.facts["bytes"]
    assert split.facts["calls"] == plain.facts["calls"]
