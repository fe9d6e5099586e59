"""Two processes with one row each train like one process with both."""

from pathlib import Path

import pytest

from tests.distributed import train_distributed
from tests.toys import distance, gpt2, make_trainer, weights_of


@pytest.mark.parametrize(
    ("scope", "accumulation", "precondition"), [("micro_batch", 1, True), ("optimizer_step", 2, False)]
)
def test_two_processes_train_like_one(tmp_path: Path, scope: str, accumulation: int, precondition: bool) -> None:
    settings = {
        "fsam_rho": 0.3,
        "fsam_ascent_scope": scope,
        "fsam_precondition": precondition,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 4,
    }
    one = make_trainer(
        tmp_path, gpt2(), train_sampling_strategy="sequential", per_device_train_batch_size=2, **settings
    )
    one.train()
    weights, logs, world = train_distributed(tmp_path / "two", 2, per_device_train_batch_size=1, **settings)
    assert world == 2
    assert distance(weights, weights_of(one.model)) < 1e-5
    for key in ("loss", "fsam/sharpness", "fsam/ascent_grad_norm", "fsam/radius"):
        assert logs[0][key] == pytest.approx(one.state.log_history[0][key], rel=1e-3), key


def test_rank_scope_perturbs_each_process_by_its_own_rows(tmp_path: Path) -> None:
    """One process is its own `micro_batch`; two with `rank` are m-SAM, which is something else."""
    settings = {"fsam_rho": 0.3, "fsam_precondition": False, "max_steps": 2, "per_device_train_batch_size": 1}
    own, logs, _ = train_distributed(tmp_path / "rank", 2, fsam_ascent_scope="rank", **settings)
    joint, _, _ = train_distributed(tmp_path / "joint", 2, fsam_ascent_scope="micro_batch", **settings)
    assert logs[0]["fsam/radius"] == pytest.approx(0.3, rel=1e-3)
    assert distance(own, joint) > 1e-4
