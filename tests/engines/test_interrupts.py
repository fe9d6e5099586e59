"""Ctrl-C at any line of an engine leaves nothing that the next step trips over."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.distributed import ENGINES, launch
from tests.toys import same_bits

pytest.importorskip("deepspeed", reason="pip install hf-fsam[deepspeed]")

BASE: dict[str, Any] = {
    "fsam_rho": 0.3,
    "fsam_precondition": False,
    "max_steps": 3,
    "per_device_train_batch_size": 1,
}
CORE = ("zero3", "ddp")


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(engine, marks=() if engine in CORE else pytest.mark.slow)
        for engine in ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")
    ],
)
def test_ctrl_c_at_every_line_of_an_engine(engine: str, tmp_path: Path) -> None:
    cases = [BASE | ENGINES[engine] | {"strikes": strikes} for strikes in ("none", "clean", "all")]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    # A line of an owner's alone would strike one of two processes, which the other one waits for then.
    done = launch(1 if engine.startswith("zero") else 2, "tests.engines.interrupts", str(tmp_path))
    assert done.returncode == 0, done.stderr[-20_000:]
    plain, clean, everywhere = (torch.load(tmp_path / f"{index}.pt", weights_only=False) for index in range(3))
    assert same_bits(clean[1], plain[1])
    assert len(everywhere[2]) >= len(clean[2]) > 20
    module = {"f": "fsdp.py", "d": "local.py", "z": "deepspeed.py"}[engine[0]]
    assert sum(file == module for file, _ in everywhere[2]) > 10
