"""With `overlap_comm`, the default on an accelerator, ZeRO-3 gathers weights on a stream of its own, which waits for
nobody: whatever is written into the shards has to be ordered before that. What a CPU cannot show, clocks can."""

import json
from typing import Any

import pytest

from tests.engines.distributed import launch, zero

pytest.importorskip("deepspeed", reason="pip install hf-fsam[deepspeed]")

BASE: dict[str, Any] = {"fsam_rho": 0.3, "max_steps": 2, "per_device_train_batch_size": 1}
CASES: dict[str, dict[str, Any]] = {
    "none": {"fsam_variant": "none"},
    "functional": {"fsam_variant": "functional"},
    "accumulated": {"fsam_variant": "functional", "gradient_accumulation_steps": 2},
    "logit": {"fsam_variant": "logit", "fsam_precondition": False},
    "momentum": {"fsam_variant": "functional", "fsam_ascent_direction": "momentum"},
    "window": {
        "fsam_variant": "sam",
        "gradient_accumulation_steps": 2,
        "fsam_ascent_scope": "optimizer_step",
        "fsam_precondition": False,
    },
}
UNCURED = ("functional", "logit")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was read and what raced, of each case as it is and, as "… uncured", without the engine's own ordering."""
    folder = tmp_path_factory.mktemp("streams")
    settings = zero(3, persistent=100)
    settings["deepspeed"]["zero_optimization"]["overlap_comm"] = True
    # DeepSpeed's clock makes the host wait for the device at the end of each step, and so hides what waits for nothing.
    settings["deepspeed"]["timers"] = {"throughput": {"enabled": False}}
    cases = {name: BASE | settings | case for name, case in CASES.items()}
    cases |= {f"{name} uncured": cases[name] | {"cured": False} for name in UNCURED}
    (folder / "cases.json").write_text(json.dumps(list(cases.values())))
    done = launch(2, "tests.engines.streams", str(folder))
    assert done.returncode == 0, done.stderr[-10_000:]
    return dict(zip(cases, json.loads((folder / "results.json").read_text()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_weights_are_gathered_after_their_shards_are_written(case: str, watched: dict[str, dict[str, Any]]) -> None:
    assert watched[case]["reads"] > 50
    assert watched[case]["races"] == {}


@pytest.mark.parametrize("case", UNCURED)
def test_without_the_engines_ordering_the_clocks_see_races(case: str, watched: dict[str, dict[str, Any]]) -> None:
    """Or the clocks see nothing."""
    assert any("written at deepspeed.py" in race for race in watched[f"{case} uncured"]["races"])
