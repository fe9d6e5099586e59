"""`hf-fsam rho`: what it measures, what it suggests, and that it leaves nothing behind."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

from hf_fsam import rho
from hf_fsam.diagnostics.probe import Paths, Probe
from tests.tools.test_diagnostics import RHO, Formulas, expected_paths, tiny
from tests.toys import llama, make_trainer, same_bits, sentences, weights_of

ROOT = Path(__file__).parents[2]
FLAT = Paths(
    loss_change=0.0,
    linear_loss_change=0.0,
    gradient=1.0,
    logit=0.0,
    functional=0.0,
    cosine=0.0,
    stochastic_share=1.0,
    nearest_share=1.0,
)

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.toys import make_trainer
trainer = make_trainer({folder!r}, max_steps=6, logging_steps=1, {arguments})
trainer.train()
open({folder!r} + "/trained_to_the_end", "w").close()
"""


def seen(trainer: Trainer, count: int) -> Probe:
    """A probe that has the first batches."""
    probe = Probe(trainer.fsam, count)
    probe.see(list(trainer.get_train_dataloader()))
    assert len(probe.batches) == count
    return probe


def script(folder: Path, arguments: str = "") -> Path:
    path = folder / "train.py"
    path.write_text(SCRIPT.format(root=str(ROOT), folder=str(folder), arguments=arguments))
    return path


def test_measurements_are_those_of_the_formulas(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        model=tiny(),
        fsam_precondition=False,
        per_device_train_batch_size=24,
        trainer={"train_dataset": sentences(24)},
    )
    trainer.create_optimizer()
    before = weights_of(trainer.model)
    probe = seen(trainer, 1)
    found = rho.measure(probe, (RHO,))[RHO]
    with probe.measuring():
        random_loss_change = probe.random_loss_change(probe.batches[0], RHO)
    directions = [[part.double() for part in probe.random_direction(seed)] for seed in (0, 1)]
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    order = [names[weight] for weight in probe.weights]
    assert same_bits(weights_of(trainer.model), before)
    formulas = Formulas(trainer.model)
    expected = expected_paths(formulas)
    assert found.logit == pytest.approx(expected["logit_path"], rel=1e-3)
    assert found.functional == pytest.approx(expected["functional_path"], rel=1e-3)
    assert found.loss_change == pytest.approx(expected["rise_ascent"], rel=1e-3)
    rises = []
    for direction in directions:
        length = float(torch.cat([part.flatten() for part in direction]).norm())
        away = {name: formulas.theta[name] + RHO * d / length for name, d in zip(order, direction, strict=True)}
        rises.append(float(formulas.loss(away) - formulas.loss(formulas.theta)))
    assert random_loss_change == pytest.approx(sum(rises) / 2, rel=1e-3)
    g = formulas.pulled_back(formulas.theta, formulas.cotangent(formulas.theta))
    size = float(torch.cat([part.flatten() for part in g.values()]).norm())
    assert found.gradient == pytest.approx(size, rel=1e-4)
    assert found.linear_loss_change == pytest.approx(RHO * size, rel=1e-4)
    assert found.stochastic_share == pytest.approx(1, abs=1e-4)
    assert found.nearest_share == pytest.approx(1, abs=1e-4)


def test_the_share_of_the_radius_that_bfloat16_leaves_is_measured(tmp_path: Path) -> None:
    """An ε far below the gap between two numbers is lost when rounded to nearest, and kept on average when rounded
    stochastically. Far above the gap, both keep it."""
    trainer = make_trainer(tmp_path, model=llama().to(torch.bfloat16), fsam_precondition=False)
    trainer.create_optimizer()
    found = rho.measure(seen(trainer, 2), (1e-2, 3.0))
    assert found[1e-2].nearest_share < 0.7
    assert found[1e-2].stochastic_share == pytest.approx(1, abs=0.15)
    assert found[3.0].nearest_share == pytest.approx(1, abs=0.05)


def test_the_suggested_radius_is_the_least_that_changes_the_function() -> None:
    found = {
        0.01: replace(FLAT, functional=0.01, logit=0.02, loss_change=0.01, linear_loss_change=0.01),
        0.1: replace(FLAT, functional=0.12, logit=0.3, loss_change=0.11, linear_loss_change=0.1),
        1.0: replace(FLAT, functional=0.8, logit=2.0, loss_change=3.0, linear_loss_change=1.0),
    }
    suggested, reason = rho.suggest(found)
    assert suggested == 0.1
    assert "another 30%" in reason
    steep, reason = rho.suggest({0.01: found[0.01], 1.0: found[1.0]})
    assert steep == 1.0
    assert "rises by 3.0 times its linear part" in reason
    assert rho.suggest({0.01: found[0.01]})[0] is None
    # A path of the same size at every ρ is rounding.
    assert rho.suggest({each: replace(FLAT, functional=0.2) for each in (0.001, 0.01, 0.1)})[0] is None
    assert rho.suggest({0.1: replace(FLAT, gradient=0.0)})[0] is None


def test_a_script_runs_up_to_the_measurement(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_fsam.rho", "--after", "3", "--out", str(tmp_path / "rho.png")]
    result = subprocess.run([*command, str(script(tmp_path))], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "fsam_rho" in result.stdout or "no suggestion" in result.stdout
    assert (tmp_path / "rho.png").stat().st_size > 1000
    assert not (tmp_path / "trained_to_the_end").exists()
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()[:2] in ("0.", "1.", "3.")]
    assert len(lines) == len(rho.RADII)
    assert "fsam/" not in result.stdout  # the steps before the measurement are plain
    rises = [float(line[1]) for line in lines]
    assert rises == sorted(rises)  # along the gradient the loss rises


def test_a_script_that_is_shorter_is_measured_where_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rho.main(["--batches", "1", "--out", str(tmp_path / "rho.png"), str(script(tmp_path))])
    out = capsys.readouterr().out
    assert "measured after 6 plain steps, where the training ends" in out
    assert f"plot: {tmp_path / 'rho.png'}" in out


def test_the_verdict_compares_the_paths_and_columns_stand_under_their_headers() -> None:
    found = {0.1: replace(FLAT, functional=0.1, logit=0.29, loss_change=12.5)}
    assert rho.verdict(0.1, found[0.1]) == (
        "The logit path is 2.9 times the functional one at ρ = 0.1: Functional-SAM is the candidate; begin tuning at "
        "fsam_rho=0.1."
    )
    assert "0.5 times" in (less := rho.verdict(0.1, replace(FLAT, functional=0.1, logit=0.05)))
    assert "fsam_variant=sam may serve as well" in less
    header, line = rho.table(found).splitlines()[:2]
    assert len(header) == len(line)
    assert line.index("12.5000") + len("12.5000") == header.index("rise") + len("rise")


def test_the_output_folder_and_trackers_of_the_script_are_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here are checkpoints of an earlier training, which save_total_limit would delete for new ones."""

    class Tracker(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("a run was begun")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    for step in (900, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
    arguments = (
        "save_strategy='steps', save_steps=1, save_total_limit=1, "
        "eval_strategy='steps', eval_steps=1, eval_on_start=True, "
        "load_best_model_at_end=True, metric_for_best_model='loss', report_to=['tensorboard'], "
        "trainer={'eval_dataset': __import__('tests.toys').toys.sentences(), "
        "'callbacks': [__import__('transformers').EarlyStoppingCallback()]}"
    )
    path = script(tmp_path, arguments)
    before = sorted(tmp_path.iterdir())
    rho.main(["--after", "3", "--out", str(tmp_path / "rho.png"), str(path)])
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "rho.png"])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ("optim='sgd', fsam_precondition=True", [], "SGD keeps none"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: str, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rho.main([*options, str(script(tmp_path, arguments))])


def test_a_script_that_does_not_train_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(SystemExit, match="nothing was measured"):
        rho.main([str(tmp_path / "empty.py")])
    with pytest.raises(SystemExit):
        rho.main([str(tmp_path / "nowhere.py")])
    assert "nowhere.py does not exist" in capsys.readouterr().err


def test_a_script_with_the_plain_trainer_is_measured_without_an_edit(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The table is that of the script with our trainer."""
    printed = []
    for classes in ("", "trainer_class=transformers.Trainer, arguments_class=transformers.TrainingArguments"):
        path = script(tmp_path, f"save_strategy='steps', save_steps=1, {classes}")
        path.write_text("import transformers" + path.read_text())
        rho.main(["--after", "3", "--out", str(tmp_path / "rho.png"), str(path)])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert len(printed[0].splitlines()) > len(rho.RADII)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["rho.png", "train.py"]


def test_settings_before_the_script_are_those_that_it_is_measured_with(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    classes = "trainer_class=transformers.Trainer, arguments_class=transformers.TrainingArguments"
    path = script(tmp_path, classes)
    path.write_text("import transformers" + path.read_text())
    printed = []
    for value in ("True", "False"):
        rho.main(["--after", "3", "--out", str(tmp_path / "rho.png"), f"--fsam_precondition={value}", str(path)])
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1]
    with pytest.raises(ValueError, match="--fsam_precondition True did not reach the training arguments"):
        rho.main(["--after", "3", str(path), "--fsam_precondition=True"])


def test_a_script_that_exits_without_training_is_refused(tmp_path: Path) -> None:
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)")
    with pytest.raises(SystemExit, match="nothing was measured"):
        rho.main([str(tmp_path / "exits.py")])
