"""`hf-fsam compare`: which runs it makes, that it repeats none, and what it reports."""

import functools
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.stats import ttest_rel
from tqdm import tqdm

from hf_fsam import FSAMTrainingArguments
from hf_fsam.arguments import FSAMArguments, plain_passes
from hf_fsam.studies.compare import main, run_study
from hf_fsam.studies.declared import check_metrics, check_settings
from hf_fsam.studies.masking import masked, masked_command
from hf_fsam.studies.plots import draw, rho_curve
from hf_fsam.studies.report import Difference, cost, setting, table
from hf_fsam.studies.runner import Runner, read_results
from hf_fsam.studies.study import Study, load_studies

ROOT = Path(__file__).parents[2]
COMPARE = [sys.executable, "-m", "hf_fsam", "compare"]

# A recipe that takes no time. Its loss is a parabola in the learning rate and in ρ, with noise that follows the seed.
RECIPE = """
import json, sys, time
from dataclasses import fields
from pathlib import Path
settings = json.loads(Path(sys.argv[1]).read_text())
folder = Path(settings["output_dir"])
with (Path(__file__).parent / "called.txt").open("a") as file:
    file.write(json.dumps(settings) + "\\n")
time.sleep(settings.get("sleep", 0))
if settings.get("fail"):
    sys.exit("no such optimizer")
rate, rho = settings.get("learning_rate", 1), settings.get("fsam_rho", 0)
loss = 2 + (rate - 3) ** 2 + (rho - 0.2) ** 2 + 0.1 * settings["seed"]
if settings.get("diverge"):
    loss = float("nan")
steps = settings.get("max_steps", 2)
history = [{"step": 1, "eval_loss": loss - 1}, {"step": steps, "eval_loss": loss}]
metrics = {"eval_loss": loss, "test_loss": 100 - loss}
results = {"metrics": metrics, "history": history, "steps": steps, "train_seconds": 2.0}
(folder / "results.json").write_text(json.dumps(results))
"""

ARMS = {
    "AdamW": {"fsam_variant": "none", "learning_rate": [1, "3e0", 5]},
    "FSAM": {"like": "AdamW", "fsam_variant": "functional", "fsam_rho": [0.1, 0.2]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.py").write_text(RECIPE)
    return tmp_path


def write_study(folder: Path, **keys: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"recipe": "recipe.py", "arms": ARMS, "seeds": [0, 1], **keys}, sort_keys=False))
    return path


def study_of(folder: Path, **keys: Any) -> Study:
    (study,) = load_studies(write_study(folder, **keys))
    return study


def called(folder: Path) -> list[dict[str, Any]]:
    path = folder / "called.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def compare(folder: Path, *argv: str) -> None:
    main([str(folder / "study.yaml"), "--out", str(folder / "out"), *argv])


def run(study: Study, folder: Path, **options: Any) -> list[dict[str, Any]]:
    with Runner(study, folder / "out", **options) as runner:
        return run_study(study, runner)


def test_tuning_uses_its_own_seeds_and_its_choice_is_handed_on(folder: Path) -> None:
    rows = run(study_of(folder), folder)
    final = [row for row in rows if row["stage"] == "final"]
    assert [(row["arm"], row["seed"]) for row in final] == [("AdamW", 0), ("FSAM", 0), ("AdamW", 1), ("FSAM", 1)]
    assert {row["settings"]["learning_rate"] for row in final} == {3.0}
    assert {row["settings"].get("fsam_rho") for row in final if row["arm"] == "FSAM"} == {0.2}
    assert {row["seed"] for row in rows if row["stage"] == "tuning"} == {100}
    assert len(called(folder)) == 3 + 2 + 4
    assert [row["passes"] for row in final] == [1.0, 2.0, 1.0, 2.0]
    assert not list((folder / "out" / "runs").iterdir())  # no models are left behind


def test_another_metric_than_the_first_can_tune(folder: Path) -> None:
    study = study_of(folder, metrics=["test_loss"], tune_on="eval_loss")
    rows = run(study, folder)
    assert {row["settings"]["learning_rate"] for row in rows if row["stage"] == "final"} == {3.0}
    assert all(row["curve"] for row in rows)  # that of the metric that is evaluated during the training
    opposite = run(study_of(folder, metrics=["test_loss"]), folder)
    assert {row["settings"]["learning_rate"] for row in opposite if row["stage"] == "final"} == {1}


def test_a_study_extends_another(folder: Path) -> None:
    write_study(folder, settings={"max_steps": 3, "sleep": 0}, metrics=["eval_loss", "test_loss"], baseline="FSAM")
    path = folder / "other.yaml"
    path.write_text(yaml.safe_dump({"extends": "study.yaml", "settings": {"max_steps": 4}, "metrics": ["test_loss"]}))
    (other,) = load_studies(path)
    assert (other.name, other.settings, other.metrics) == ("other", {"max_steps": 4, "sleep": 0}, ["test_loss"])
    assert (list(other.arms), other.baseline, other.seeds) == (["AdamW", "FSAM"], "FSAM", [0, 1])
    path.write_text(yaml.safe_dump({"extends": "study.yaml", "arms": ["AdamW"], "baseline": "AdamW"}))
    (fewer,) = load_studies(path)
    assert list(fewer.arms) == ["AdamW"]
    path.write_text(yaml.safe_dump({"extends": "study.yaml", "arms": ["SGD"]}))
    with pytest.raises(ValueError, match=r"'SGD' is not in study\.yaml, which has 'AdamW', 'FSAM'"):
        list(load_studies(path))


def test_a_run_that_has_ended_is_not_run_again(folder: Path, capsys: pytest.CaptureFixture) -> None:
    write_study(folder)
    compare(folder)
    first, table_before = len(called(folder)), (folder / "out" / "study.md").read_text()
    log = folder / "out" / "runs.jsonl"
    log.write_text(log.read_text() + '{"key": "cut off whe')  # the machine went down
    compare(folder)
    assert len(called(folder)) == first
    assert (folder / "out" / "study.md").read_text() == table_before
    compare(folder, "--seeds", "0", "1", "2")
    compare(folder, "--seeds", "0", "1", "2")
    assert len(called(folder)) == first + 2
    compare(folder, "--max_steps", "7")  # other settings, other runs
    assert {each.get("max_steps") for each in called(folder)[first + 2 :]} == {7}
    assert "minus AdamW" in capsys.readouterr().out
    compare(folder, "--baseline", "FSAM")
    assert "minus FSAM" in capsys.readouterr().out
    assert (folder / "out" / "study.png").stat().st_size > 1000


def test_runs_that_were_there_do_not_shorten_the_estimated_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tqdm] = []
    monkeypatch.setattr("hf_fsam.studies.compare.tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    write_study(folder, seeds=[0])
    compare(folder)
    compare(folder)
    compare(folder, "--seeds", "0", "1")
    first, again, more = bars
    assert (first.initial, first.n) == (0, pytest.approx(study_of(folder, seeds=[0]).total_weight()))
    assert again.initial == again.n == first.n
    assert (more.initial, more.n) == (first.n, pytest.approx(study_of(folder, seeds=[0, 1]).total_weight()))


def test_a_study_with_a_point_in_its_name_gets_a_report_of_that_name(folder: Path) -> None:
    write_study(folder, seeds=[0]).rename(folder / "size_1.2b.yaml")
    main([str(folder / "size_1.2b.yaml"), "--out", str(folder / "out")])
    assert {path.name for path in (folder / "out").glob("size*")} == {"size_1.2b.md", "size_1.2b.png"}


def test_a_killed_study_goes_on_where_it_was(folder: Path) -> None:
    write_study(folder, settings={"sleep": 3}, arms={"A": {"rate": 1}, "B": {"rate": 2}}, seeds=[0])
    command = [*COMPARE, str(folder / "study.yaml"), "--out", str(folder / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(called(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len((folder / "out" / "runs.jsonl").read_text().splitlines()) == 1
    while time.monotonic() < deadline:
        try:
            compare(folder)
            break
        except SystemExit:  # the run that was left behind ends with its parent, and has the lock until then
            time.sleep(0.1)
    assert [each["rate"] for each in called(folder)] == [1, 2, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_runs_end_with_a_study_that_is_killed(folder: Path) -> None:
    (folder / "recipe.py").write_text("import os\nopen('PID', 'w').write(str(os.getpid()))\n" + RECIPE)
    write_study(folder, settings={"sleep": 60}, arms={"A": {}}, seeds=[0])
    command = [*COMPARE, str(folder / "study.yaml"), "--out", str(folder / "out")]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not called(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    child = Path("/proc") / (folder / "PID").read_text()
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.exists()


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(folder: Path) -> None:
    write_study(folder, settings={"sleep": 60}, arms={"A": {}}, seeds=[0])
    command = [*COMPARE, str(folder / "study.yaml"), "--out", str(folder / "out")]
    # A shell starts its background jobs with the signal ignored, and these tests may be in one.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, process_group=0, preexec_fn=heard)
    deadline = time.monotonic() + 60
    while not called(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in told
    assert "interrupted." in told.splitlines()[-1]
    assert told.splitlines()[-1].endswith("the same command goes on from there.")


def test_sigterm_ends_the_runs_with_the_study(folder: Path) -> None:
    write_study(folder, settings={"sleep": 60}, arms={"A": {}}, seeds=[0])
    command = [*COMPARE, str(folder / "study.yaml"), "--out", str(folder / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not called(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=20) != 0
    study = study_of(folder, settings={"sleep": 0}, arms={"A": {}}, seeds=[0])
    run(study, folder)  # the lock is free


def test_a_run_goes_on_from_its_last_checkpoint(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}}, seeds=[0])
    run(study, folder, keep=True)
    (left,) = (folder / "out" / "runs").iterdir()
    for step, whole in ((3, True), (20, True), (100, False)):  # the last was cut off while it was written
        (left / f"checkpoint-{step}").mkdir()
        if whole:
            (left / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (folder / "out" / "runs.jsonl").write_text("")
    (row,) = run(study, folder, keep=True)
    assert called(folder)[-1]["resume_from_checkpoint"] == str(left / "checkpoint-20")
    assert row["resumed"]
    assert not called(folder)[0].get("resume_from_checkpoint")


def test_the_error_of_a_failed_run_says_which_run_and_why(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}, "B": {"fail": True}}, seeds=[0])
    with pytest.raises(RuntimeError, match=r"(?s)study: B, seed 0, ended with code 1.*no such optimizer"):
        run(study, folder)
    assert len((folder / "out" / "runs.jsonl").read_text().splitlines()) == 1


def test_runs_in_parallel_get_their_share_of_the_cores(folder: Path) -> None:
    recipe = RECIPE.replace("import json,", "import os, json,").replace(
        "file.write(", 'file.write(os.environ.get("OMP_NUM_THREADS", "") + "|" + '
    )
    times = '\nat = Path(__file__).parent / f"at_{settings[\'rate\']}"\nat.write_text(f"{began} {time.monotonic()}")\n'
    (folder / "recipe.py").write_text(recipe.replace("settings =", "began = time.monotonic()\nsettings =", 1) + times)
    study = study_of(folder, settings={"sleep": 5}, arms={"A": {"rate": 1}, "B": {"rate": 2}}, seeds=[0])
    rows = run(study, folder, parallel=2)
    assert [row["arm"] for row in rows] == ["A", "B"]
    threads = [line.split("|")[0] for line in (folder / "called.txt").read_text().splitlines()]
    assert threads == [str(max(1, (os.cpu_count() or 1) // 2))] * 2
    began, ended = zip(*(map(float, each.read_text().split()) for each in folder.glob("at_*")), strict=True)
    assert max(began) < min(ended)  # side by side


def test_arms_with_the_same_settings_share_a_run(folder: Path) -> None:
    study = study_of(folder, arms={"A": {"rate": 1}, "B": {"rate": 1}}, seeds=[0])
    rows = run(study, folder)
    assert [row["arm"] for row in rows] == ["A", "B"]
    assert len(called(folder)) == 1


def test_another_script_of_the_same_name_or_another_launch_is_another_run(folder: Path) -> None:
    (folder / "x").mkdir()
    (folder / "x" / "recipe.py").write_text(
        RECIPE.replace("loss = 2 +", "loss = 9 +").replace(".parent /", ".parent.parent /")
    )
    study = study_of(folder, arms={"A": {}, "B": {"recipe": "x/recipe.py"}}, seeds=[0])
    first, second = run(study, folder)
    assert second["metrics"]["eval_loss"] == first["metrics"]["eval_loss"] + 7
    run(study, folder, launch=[sys.executable, "-B"])
    assert len(called(folder)) == 4


def test_studies_share_runs_and_another_metric_repeats_none(folder: Path) -> None:
    first = study_of(folder, arms={"A": {"rate": 1}}, seeds=[0])
    run(first, folder)
    second = study_of(folder, arms={"B": {"rate": 1, "passes": 3}}, seeds=[0], metrics=["best_eval_loss", "eval_loss"])
    (found,) = run(second, folder)
    assert (found["arm"], found["passes"]) == ("B", 3)
    assert found["metrics"]["best_eval_loss"] == found["metrics"]["eval_loss"] - 1
    assert len(called(folder)) == 1


def test_runs_of_another_recipe_or_corpus_are_pointed_out(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}}, seeds=[0])
    rows = run(study, folder)
    assert "CAUTION" not in "\n".join(setting(study, rows, "command"))
    (folder / "recipe.py").write_text(RECIPE + "\n# changed\n")
    assert "their recipe, which has changed since" in "\n".join(setting(study, rows, "command"))
    rows[0]["corpus_sha256"] = "other"
    assert "the runs differ in corpus_sha256" in "\n".join(setting(study, rows, "command"))
    tuning = row("A", 100, 1.0, stage="tuning", recipe_sha256="of an older recipe")
    final = row("A", 0, 1.0)
    assert "CAUTION" not in "\n".join(setting(study, [final], "command"))
    assert "their recipe, which has changed since" in "\n".join(setting(study, [tuning, final], "command"))


def test_a_module_of_the_working_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "their_trainings").mkdir()
    (folder / "their_trainings" / "train.py").touch()
    study = study_of(folder, recipe=None, script="-m their_trainings.train", arms={"A": {}})
    command = study.arms["A"].recipe.command(folder / "run.json", None)
    assert command == [*COMPARE[:3], "run", "--settings", str(folder / "run.json"), "-m", "their_trainings.train"]


def test_longer_multiplies_the_length_in_the_settings(folder: Path) -> None:
    arms = {"A": {"fsam_variant": "none"}, "A2": {"like": "A", "longer": 2}, "A3": {"like": "A2", "longer": 1.5}}
    study = study_of(folder, arms=arms, settings={"max_steps": 10, "warmup_steps": 1}, seeds=[0])
    rows = run(study, folder)
    assert [row["settings"]["max_steps"] for row in rows] == [10, 20, 30]
    assert [row["settings"]["warmup_steps"] for row in rows] == [1, 2, 3]
    assert "longer" not in rows[1]["settings"]
    study = study_of(folder, arms=arms, settings={"max_steps": -1, "num_train_epochs": 1, "warmup_steps": 0.1})
    (settings,) = study.arms["A3"].candidates(study.settings)
    assert settings["num_train_epochs"] == 1.5  # not whole, and not none
    assert (settings["max_steps"], settings["warmup_steps"]) == (-1, 0.1)  # no length, a share
    assert study.total_weight() > 0


def test_a_launcher_is_ended_with_the_processes_that_it_started(folder: Path, request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test runner may ignore
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    launcher = folder / "launcher.py"
    launcher.write_text("import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:]])\n")
    study = study_of(folder, settings={"sleep": 60}, arms={"A": {}}, seeds=[0])
    launch = [sys.executable, str(launcher)]
    with Runner(study, folder / "out", launch=launch) as runner:

        def interrupt() -> None:
            while not called(folder):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            run_study(study, runner)
    run(study_of(folder, settings={"sleep": 0}, arms={"A": {}}, seeds=[0]), folder)  # the lock is free


def test_each_run_gets_one_of_the_visible_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "recipe.py").write_text(
        "import os, sys\nopen(sys.argv[1] + '.gpu', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])\n" + RECIPE
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    study = study_of(folder, arms={"A": {"rate": 1}, "B": {"rate": 2}}, seeds=[0], settings={"sleep": 1})
    run(study, folder, parallel=2, keep=True)
    assert {path.read_text() for path in (folder / "out" / "runs").glob("*/run.json.gpu")} == {"2", "3"}
    run(study, folder, launch=[sys.executable, "-B"], keep=True)
    seen = [path.read_text() for path in (folder / "out" / "runs").glob("*/run.json.gpu")]
    assert seen.count("2,3") == 2  # a launcher divides them itself


def test_candidates_that_diverge_are_not_chosen(folder: Path) -> None:
    arms = {"A": {"diverge": [True, False]}, "B": {"diverge": [True]}}
    study = study_of(folder, arms=arms, seeds=[0, 1])
    rows = run(study, folder)
    assert [row["settings"]["diverge"] for row in rows if row["stage"] == "final"] == [False, True, False, True]
    assert rows[0]["metrics"]["eval_loss"] is None
    assert "2 diverged" in "\n".join(table(study, rows))
    assert "diverged 2/2" in "\n".join(table(study, rows))
    study = study_of(folder, arms={"A": {"rate": 3}, "B": {"diverge": [True], "rate": [3, 4]}}, seeds=[0, 1])
    assert "diverged 2/2" in "\n".join(table(study, run(study, folder)))  # with every candidate: a result, too
    study = study_of(folder, arms={"A": {"diverge": [True], "rate": [1, 2]}})
    with pytest.raises(RuntimeError, match="no candidate ended with a finite eval_loss"):
        run(study, folder)


# ---- The table ----


def row(arm: str, seed: int, loss: float | None, **more: Any) -> dict[str, Any]:
    base = {"stage": "final", "settings": {}, "passes": 1.0, "steps": 100, "train_seconds": 10.0, "resumed": False}
    return {"arm": arm, "seed": seed, "metrics": {"eval_loss": loss}, "curve": [], **base, **more}


def test_differences_are_paired_by_seed_with_students_interval(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}}, seeds=[0, 1, 2])
    rows = [row("A", seed, 2.0 + seed) for seed in range(3)]
    rows += [row("B", seed, 2.0 + seed + 0.1 * (seed + 1), passes=2.0, train_seconds=19.0) for seed in range(3)]
    line = next(line for line in table(study, rows) if line.startswith("| B"))
    # 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t(0.975, 2) = 4.3027: 4.3027 × 0.1 / √3 = 0.2484
    assert "+0.2000 [-0.0484, +0.4484]" in line
    assert "undecided" in line
    assert "3.2000 ± 1.1000" in line
    assert "| 2.00 " in line
    assert "| 1.90 " in line
    # The clock of a resumed run started anew.
    for each in rows:
        each["resumed"], each["train_seconds"] = (
            each["seed"] == 0,
            each["train_seconds"] * (1 + 9 * (each["seed"] == 0)),
        )
    rows[3]["train_seconds"] = rows[4]["train_seconds"] = 1.0
    rows[5]["train_seconds"] = 21.0
    line = next(line for line in table(study, rows) if line.startswith("| B"))
    assert "| 1.10 " in line  # of 0.1 and 2.1, without the first seed's 0.01
    assert Difference.of([-0.1, -0.12, -0.11]).verdict() == "better"
    assert Difference.of([0.1, 0.12, 0.11]).verdict() == "worse"
    assert Difference.of([0.1, 0.12, 0.11]).verdict(greater_is_better=True) == "better"
    assert Difference.of([0.1]).verdict() == "undecided"


def test_an_arm_that_diverged_with_one_seed_is_not_called_better(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}}, seeds=[0, 1, 2])
    rows = [row("A", seed, 2.0) for seed in range(3)] + [row("B", seed, 1.0 + 0.01 * seed) for seed in range(2)]
    rows.append(row("B", 2, None))
    line = next(line for line in table(study, rows) if line.startswith("| B"))
    assert "diverged 1/3" in line
    assert "better" not in line
    rows = [row("A", seed, 2.0 if seed else None) for seed in range(3)]
    rows += [row("B", seed, 2.5 + 0.01 * seed) for seed in range(3)]
    line = next(line for line in table(study, rows) if line.startswith("| B"))
    assert "A diverged 1/3" in line
    assert "worse" not in line


def test_tuning_and_verdict_follow_greater_is_better(folder: Path) -> None:
    (folder / "recipe.py").write_text(RECIPE.replace('metrics = {"eval_loss": loss', 'metrics = {"eval_f1": -loss'))
    keys = {"metrics": ["eval_f1"], "arms": {"A": {"rate": 3, "learning_rate": [1, 2]}, "B": {"learning_rate": 3}}}
    study = study_of(folder, **keys, greater_is_better=True)
    rows = run(study, folder)
    final = [each for each in rows if each["stage"] == "final"]
    assert {each["settings"]["learning_rate"] for each in final if each["arm"] == "A"} == {2}
    assert any(line.startswith("| B") and "better" in line for line in table(study, rows))
    with pytest.raises(ValueError, match="add `greater_is_better: true`"):
        study_of(folder, **keys)


def test_cost_counts_steps_and_passes() -> None:
    base = {0: row("A", 0, 1.0)}
    assert cost({0: row("B", 0, 1.0, settings={"per_device_train_batch_size": 16})}, base) == 2.0
    assert cost({0: row("B", 0, 1.0, steps=50, passes=2.0)}, base) == 1.0
    assert cost({0: row("B", 0, 1.0, settings={"gradient_accumulation_steps": 4})}, base) == 4.0
    assert plain_passes(FSAMArguments(fsam_variant="none")) == 1
    assert plain_passes(FSAMArguments(fsam_variant="sam")) == 2
    assert plain_passes(FSAMArguments(fsam_rho=0.0)) == 1
    assert plain_passes(FSAMArguments(fsam_ascent_direction="momentum")) == pytest.approx(4 / 3)
    assert plain_passes(FSAMArguments(fsam_every_steps=4)) == 1.25
    assert plain_passes(FSAMArguments(fsam_variant="logit")) == pytest.approx(7 / 3)


def test_tuned_values_at_the_edge_are_marked_and_the_radius_has_a_curve(folder: Path) -> None:
    study = study_of(folder)
    rows = run(study, folder)
    lines = table(study, rows)
    assert any("learning_rate 3 " in line for line in lines)  # of 1, 3, 5
    assert any("rho 0.2!" in line for line in lines)  # of 0.1, 0.2
    curve = rho_curve(rows, "FSAM", "eval_loss")
    assert [rho for rho, _ in curve] == [0.1, 0.2]
    assert curve[0][1] == pytest.approx(12 + 0.01)  # 2 + (0.1 - 0.2)² + 0.1 · 100


def test_results_of_the_examples_of_transformers_are_read(tmp_path: Path) -> None:
    history = [
        {"step": 2, "fsam/top_curvature": 3},
        {"step": 5, "eval_loss": 1.5},
        {"step": 5, "fsam/top_curvature": 7},
        {"step": 10, "eval_loss": float("nan")},
        {"step": 10, "train_runtime": 8.0, "train_loss": 2.0},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "all_results.json").write_text(json.dumps({"eval_accuracy": 0.5}))
    found = read_results(tmp_path, "eval_loss")
    expected = {"eval_loss": None, "best_eval_loss": 1.5, "eval_accuracy": 0.5, "fsam/top_curvature": 7}
    assert expected.items() <= found["metrics"].items()
    assert found["curve"] == [[5, 1.5]]
    assert (found["steps"], found["train_seconds"]) == (10, 8.0)
    (tmp_path / "all_results.json").write_text(json.dumps({"eval_loss": 1.25}))  # evaluated after the training
    assert read_results(tmp_path, "best_eval_loss")["metrics"]["best_eval_loss"] == 1.25
    (tmp_path / "results.json").write_text(
        json.dumps({"metrics": {"best_f1": 0.5}, "history": [{"step": 3, "eval_f1": 0.5}]})
    )
    found = read_results(tmp_path, "best_f1")
    assert (found["curve_of"], found["curve"]) == ("eval_f1", [[3, 0.5]])
    with pytest.raises(RuntimeError, match=r"neither results\.json nor trainer_state.json"):
        read_results(tmp_path / "nowhere", "eval_loss")


def test_a_run_whose_metric_was_mistyped_is_not_lost(folder: Path) -> None:
    study = study_of(folder, metrics=["eval_los"], arms={"A": {}}, seeds=[0])
    with pytest.raises(RuntimeError, match=r"A, seed 0, has no metric 'eval_los'\. It has .*best_eval_loss"):
        run(study, folder)
    run(study_of(folder, arms={"A": {}}, seeds=[0]), folder)
    assert len(called(folder)) == 1


def test_results_that_hold_only_metrics_make_a_table(folder: Path) -> None:
    """The table then has no curve, cost and time."""
    (folder / "recipe.py").write_text(
        "import json, sys\n"
        "settings = json.load(open(sys.argv[1]))\n"
        "results = {'metrics': {'eval_loss': settings['loss'] + settings['seed']}}\n"
        "json.dump(results, open(settings['output_dir'] + '/results.json', 'w'))\n"
    )
    write_study(folder, arms={"A": {"loss": 1.0}, "B": {"loss": 2.0}})
    compare(folder)
    line = next(line for line in (folder / "out" / "study.md").read_text().splitlines() if line.startswith("| B"))
    assert "+1.0000 [+1.0000, +1.0000] | worse" in line
    assert "nan" not in line
    assert (folder / "out" / "study.png").stat().st_size > 1000


# ---- The plots ----

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#808080"


def dots(forest: Axes) -> dict[str, tuple[float, list[float], str]]:
    """The arm's name at every dot: the dot's place on the x-axis, the ends of its bar, its colour."""
    names = dict(zip(forest.get_yticks(), texts(forest.get_yticklabels()), strict=True))
    found = {}
    for dot, _, bars in (container.lines for container in forest.containers):
        ((x, y),) = dot.get_xydata()
        found[names[y]] = x, [end for bar in bars for end, _ in bar.get_segments()[0]], to_hex(dot.get_color())
    return found


def texts(labels: list[Text]) -> list[str]:
    return [label.get_text() for label in labels]


@pytest.mark.parametrize(
    ("greater_is_better", "side", "colors"), [(False, "left", [BLUE, ORANGE]), (True, "right", [ORANGE, BLUE])]
)
def test_the_forest_has_the_difference_of_every_arm_with_its_interval(
    folder: Path, greater_is_better: bool, side: str, colors: list[str]
) -> None:
    seeds, values = (
        range(4),
        {
            "lower": [1.5, 1.4, 1.7, 1.6],
            "base": [2.0, 2.1, 2.2, 2.1],
            "higher": [2.6, 2.5, 2.9, 2.6],
            "much alike": [2.1, 2.2, 2.0, 2.0],
        },
    )
    arms: dict[str, dict] = {name: {} for name in values}
    study = study_of(folder, arms=arms, seeds=[*seeds], baseline="base", greater_is_better=greater_is_better)
    passes = {"lower": 2.0, "much alike": 4 / 3}
    rows = [row(arm, seed, values[arm][seed], passes=passes.get(arm, 1.0)) for seed in seeds for arm in reversed(arms)]
    forest = draw(study, rows).axes[0]
    assert texts(forest.get_yticklabels()) == ["lower", "higher", "much alike"]
    assert texts(forest.child_axes[0].get_yticklabels()) == ["2.00x", "1.00x", "1.33x"]
    assert forest.yaxis_inverted()  # the first is on top
    found = dots(forest)
    for arm, color in zip(("lower", "higher", "much alike"), (*colors, GREY), strict=True):
        test = ttest_rel(values[arm], values["base"])
        interval = test.confidence_interval(0.95)
        mean, ends, shade = found[arm]
        assert mean == pytest.approx((interval.low + interval.high) / 2)
        assert ends == pytest.approx([interval.low, interval.high])
        assert shade == color
    assert any(set(line.get_xdata()) == {0} for line in forest.lines)
    assert f": {side} is better" in forest.get_title()
    assert "eval_loss minus that of base, mean of 4 seeds and its 95 % interval" in forest.get_xlabel()


def test_the_forest_says_that_an_arm_or_the_baseline_diverged(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}, "C": {}}, seeds=[0, 1, 2])
    rows = [row(arm, seed, 1.0 + seed**2) for arm in "AB" for seed in range(3)]
    rows += [row("C", seed, None if seed == 1 else 1.5) for seed in range(3)]
    forest = draw(study, rows).axes[0]
    assert list(dots(forest)) == ["B"]
    (text,) = forest.texts
    assert (text.get_text(), text.get_position()[1]) == ("diverged 1/3", 1)
    rows[0]["metrics"]["eval_loss"] = None
    forest = draw(study, rows).axes[0]
    assert not dots(forest)
    assert texts(forest.texts) == ["A diverged 1/3", "diverged 1/3"]


def test_a_single_seed_has_a_dot_and_no_interval(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}}, seeds=[0])
    forest = draw(study, [row("A", 0, 1.0), row("B", 0, 1.5)]).axes[0]
    assert dots(forest) == {"B": (0.5, [], GREY)}
    assert forest.get_xlabel().endswith("A, one seed")


def test_the_curves_are_named_after_the_metric_that_they_show(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}}, seeds=[0], metrics=["test_loss"], tune_on="best_eval_loss")
    curves = draw(study, [row("A", 0, 1.0, metrics={"test_loss": 1.0}, curve=[[1, 3.0], [2, 2.0]])]).axes[0]
    assert curves.get_ylabel() == "eval_loss"


@pytest.mark.parametrize(("names", "lines"), [(["eval_loss", "test_loss"], 1), (["test_loss"] * 2, 0), ([None] * 2, 2)])
def test_curves_of_another_metric_are_left_out(folder: Path, names: list[str | None], lines: int) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}}, seeds=[0])
    rows = [
        row(arm, 0, 1.0, curve=[[1, 3.0], [2, 2.0]], **({"curve_of": name} if name else {}))
        for arm, name in zip("AB", names, strict=True)
    ]
    panels = [axes for axes in draw(study, rows).axes if axes.get_title().startswith("Curves")]
    assert sum(len(axes.lines) for axes in panels) == lines


def apart(labels: list[Text]) -> bool:
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    return not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_many_arms_with_long_names_can_be_read(folder: Path) -> None:
    long = r"of a long name, as $\frac$, "  # TeX would not take it
    arms = {"AdamW": {}, **{f"arm {index}, {long * (index % 4)}": {} for index in range(21)}}
    curve = [[1, 3.0], [2, 2.0]]

    def drawn(count: int, *radii: float) -> Figure:
        chosen = dict(itertools.islice(arms.items(), count))
        study = study_of(folder, arms=chosen, seeds=[0, 1], question="Is any of them better? " * 9)
        rows = [row(arm, seed, 2.0 + seed, curve=curve, passes=2.0) for arm in chosen for seed in (0, 1)]
        rows += [row("AdamW", 9, 2.0, stage="tuning", settings={"fsam_rho": rho}) for rho in radii]
        figure = draw(study, rows)
        figure.draw_without_rendering()
        return figure

    figure = drawn(22, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.3, 3)
    forest, curves, costs, radius = figure.axes
    assert all(axes.get_title() for axes in figure.axes)
    assert all(axes.get_legend() is None for axes in figure.axes)
    (legend,) = figure.legends
    names = [text.replace("\n", " ").replace("\\$", "$") for text in texts(legend.get_texts())]
    assert names == [name.strip() for name in arms]
    assert len({(line.get_color(), line.get_linestyle()) for line in curves.lines}) == 22
    handles = [(line.get_color(), line.get_linestyle()) for line in legend.get_lines()]
    assert handles == [(line.get_color(), line.get_linestyle()) for line in curves.lines]
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)

    title = figure.get_suptitle()
    assert title.replace("\n", " ") == ("Is any of them better? " * 9).strip()
    every = [*legend.get_texts(), *forest.get_yticklabels(), *forest.child_axes[0].get_yticklabels()]
    for label in [*every, *figure.texts, *radius.get_xticklabels(), *(axes.title for axes in figure.axes)]:
        box = label.get_window_extent()
        assert box.x0 >= 0, label
        assert box.y0 >= 0, label
        assert box.x1 <= figure.bbox.x1, label
        assert box.y1 <= figure.bbox.y1, label
    assert apart(every)
    assert apart(radius.get_xticklabels())
    assert texts(radius.get_xticklabels()) == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.3", "3"]
    means = [line for line in costs.lines if line.get_marker() != "x"]
    assert {line.get_xdata()[0] for line in means} == {2.0}
    assert len({line.get_transform().transform(line.get_xydata())[0, 0] for line in means}) == 22  # side by side

    small = drawn(5, 0.1, 0.2, 0.3)
    assert not any(texts(small.axes[3].get_xticklabels(minor=True)))
    assert figure.get_figheight() > small.get_figheight() + 17 * 0.25
    for panel in (radius, small.axes[3]):  # the legend leaves them their height
        assert panel.get_window_extent().height > 2.6 * figure.dpi


def test_an_arm_alone_has_no_forest(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}}, seeds=[0])
    (costs,) = draw(study, [row("A", 0, 1.0)]).axes
    assert costs.get_title().startswith("Cost")


# ---- The file ----


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"recipe": "nowhere.py"}, "recipe: .*nowhere.py does not exist"),
        ({"seedz": [1]}, "'seedz' is not a key of a study"),
        ({"arms": {}}, "needs the key 'arms'"),
        ({"baseline": "Adam"}, "baseline: 'Adam' is not an arm; there are 'AdamW', 'FSAM'"),
        ({"arms": {"A": {"like": "B"}, "B": {"like": "A"}}}, "in a circle"),
        ({"arms": {"A": {"like": "C"}}}, "A: like: 'C' is not an arm"),
        ({"seeds": [0.5]}, r"seeds=\[0.5\] is not a list of whole numbers"),
        ({"tuning_seeds": [0]}, r"tuning_seeds=\[0\] and seeds=\[0, 1\] overlap"),
        ({"arms": {"A": {"fsam_rho": [0.1, -1]}}}, "fsam_rho=-1 is not a radius"),
        ({"arms": {"A": {"fsam_variant": "vanilla"}}}, "fsam_variant='vanilla' is unknown"),
        ({"arms": {"A": {"fsam_rho": []}}}, "fsam_rho has no candidates"),
        ({"arms": {"A": {"passes": "two"}}}, "passes='two' is not a number above 0"),
        ({"arms": {"A": {"longer": 0}}}, "longer=0 is not a number above 0"),
        ({"arms": {"A": {"longer": 2}}}, "A: longer=2 needs max_steps or num_train_epochs"),
        (
            {"arms": {"A": {"longer": 2, "num_train_epochs": [3, 6]}}},
            r"A: longer=2 does not multiply the values of num_train_epochs=\[3, 6\].* leave `longer` out",
        ),
        ({"arms": {"A": {"fsam_rh": 0.1}}}, "A: 'fsam_rh' is none of fsam_"),
        ({"arms": {"A": "none"}}, "A is str, not a mapping"),
        ({"arms": ["A", "B"]}, "arms is list, not a mapping"),
        ({"settings": [1]}, "settings is list, not a mapping"),
        ({"metrics": "eval_loss"}, "metrics='eval_loss' is not a list"),
        ({"extends": "../study.yaml"}, "extends='../study.yaml' is not the name of a file beside it"),
        (
            {"tune_on": "eval_accuracy"},
            "tune_on='eval_accuracy' and 'eval_loss', .* are not better in the same direction",
        ),
        ({"config": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ({"arms": {"A": {"seed": 3}}}, "'seed' is set by `compare` for every run: list them under `seeds`"),
    ],
)
def test_mistakes_are_named_before_the_first_run(
    folder: Path, keys: dict[str, Any], message: str, capsys: pytest.CaptureFixture
) -> None:
    write_study(folder, **keys)
    with pytest.raises(SystemExit) as ended:
        compare(folder)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert re.search(message, told)
    assert len(told.splitlines()) == 1
    assert not called(folder)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"arms": {"A": {}, "B": {"rat": 1}}}, r"B: 'rat' is no setting of recipe\.py\. Did you mean 'rate'\?"),
        ({"arms": {"A": {}}, "metrics": ["eval_los"]}, r"'eval_los' is no metric of .* Did you mean 'eval_loss'"),
    ],
)
def test_names_that_a_recipe_does_not_have_are_told_before_its_first_run(
    folder: Path, keys: dict[str, Any], message: str
) -> None:
    declares = "from dataclasses import make_dataclass\n"
    declares += "SETTINGS = (make_dataclass('Settings', ['rate', 'sleep']),)\nMETRICS = ('eval_loss', 'test_loss')\n"
    guarded = "if __name__ == '__main__':\n" + "\n".join(f"    {line}" for line in RECIPE.splitlines())
    (folder / "recipe.py").write_text(declares + guarded)
    with pytest.raises(ValueError, match=message):
        run(study_of(folder, seeds=[0], **keys), folder)
    assert not called(folder)
    good = study_of(folder, seeds=[0], arms={"A": {"rate": 1}}, metrics=["best_eval_loss", "test_loss"])
    assert run(good, folder)
    assert len(called(folder)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rate", "1"], "--learning_rate would apply to all arms, but AdamW set it"),
        (["--parallel", "2", "--launch", "torchrun"], "--parallel with --launch"),
        (["--seed", "1"], "'seed' is set by `compare` for every run: list them under `seeds`, or use --seeds"),
        (["--output_dir", "here"], "'output_dir' is set by `compare` for every run: use --out"),
    ],
)
def test_options_without_effect_or_with_harm_are_refused(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    write_study(folder)
    with pytest.raises(SystemExit) as error:
        compare(folder, *options)
    assert message in str(error.value) + capsys.readouterr().err
    assert not called(folder)


def test_the_study_comes_before_its_options(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--max_steps", "20", str(write_study(folder))])
    assert "20 does not exist: the study's YAML file comes before other settings" in capsys.readouterr().err


SECRET = "hf_0deadbeef1e5"
GIVEN = [
    ["--hub_token", SECRET],
    [f"--hub_token={SECRET}"],
    ["--api-key", SECRET, "--password", "0123456"],
    ["--tracker", json.dumps({"token": SECRET, "url": "here"})],
    ["--launch", f"env WANDB_API_KEY={SECRET} {sys.executable}"],
]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: given[0])
def test_secrets_reach_the_run_but_no_file_and_no_output(
    folder: Path, given: list[str], capfd: pytest.CaptureFixture
) -> None:
    write_study(folder, arms={"A": {}, "B": {"learning_rate": [1, 2]}}, seeds=[0])
    compare(folder, *given, "--keep")
    assert sum(SECRET in json.dumps(each) for each in called(folder)) == (0 if "--launch" in given else 4)
    if "--password" in given:
        assert {each["password"] for each in called(folder)} == {"0123456"}  # not the number that YAML reads there
    (folder / "called.txt").unlink()
    compare(folder, *given)
    assert not called(folder)  # the runs are recognized
    shown = capfd.readouterr()
    assert "_TOKEN>" in shown.out or "KEY>" in shown.out or "<TOKEN>" in shown.out
    for text in (shown.out, shown.err, *everything(folder / "out")):
        assert SECRET not in text
        assert "0123456" not in text


def everything(folder: Path) -> list[str]:
    return [path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()]


def test_secrets_in_the_yaml_files_reach_no_file_and_no_output(folder: Path, capfd: pytest.CaptureFixture) -> None:
    (folder / "config.yaml").write_text(f"push_to_hub_token: {SECRET}\nsub: {{secret_key: '5e5'}}\n")
    arms = {"A": {"hub_token": SECRET}, "B": {"access_token": ["one-token", "another-token"], "learning_rate": [2, 3]}}
    write_study(folder, config="config.yaml", arms=arms, seeds=[0])
    compare(folder)
    assert {each["push_to_hub_token"] for each in called(folder)} == {SECRET}
    assert {each["sub"]["secret_key"] for each in called(folder)} == {"5e5"}
    assert {each.get("access_token") for each in called(folder)} == {None, "one-token", "another-token"}
    shown = capfd.readouterr()
    assert "learning_rate 3!" in shown.out  # candidates differ though their masked records are equal
    for text in (shown.out, shown.err, *everything(folder / "out")):
        assert SECRET not in text
        assert "one-token" not in text


def test_a_run_that_fails_shows_no_secret(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "recipe.py").write_text("import sys; sys.exit('refused: ' + open(sys.argv[1]).read())")
    write_study(folder, settings={"hub_token": SECRET}, seeds=[0])
    with pytest.raises(SystemExit):
        compare(folder)
    told = capsys.readouterr().err
    assert "<HUB_TOKEN>" in told
    assert SECRET not in told
    assert not any(SECRET in text for text in everything(folder / "out"))


def test_results_of_the_recipes_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import config as recipe_config
    import report

    args = FSAMTrainingArguments(str(tmp_path), use_cpu=True, hub_token=SECRET, fsam_rho=0.5)
    args.lr_scheduler_kwargs = {"tracker": {"api_key": SECRET}, "power": 2}
    written = report.as_dict(args)
    assert SECRET not in json.dumps(written, default=str)
    assert written["lr_scheduler_kwargs"]["power"] == 2
    assert written["fsam_rho"] == 0.5
    (tmp_path / "a.yaml").write_text(f"hub_token: [{SECRET}]\n")
    parser = recipe_config.RecipeParser(FSAMTrainingArguments)
    with pytest.raises(ValueError, match="hub_token='<HUB_TOKEN>'") as error:
        recipe_config.yaml_to_argv(tmp_path / "a.yaml", parser)
    (tmp_path / "a.yaml").write_text(f"hub_token: {SECRET}: x\n")
    with pytest.raises(ValueError, match="line 1") as broken:
        recipe_config.yaml_to_argv(tmp_path / "a.yaml", parser)
    assert SECRET not in f"{error.value} {broken.value}"


def test_a_value_without_a_name_is_not_printed(folder: Path, capsys: pytest.CaptureFixture) -> None:
    write_study(folder)
    with pytest.raises(SystemExit):
        compare(folder, "--hub_token", "x", SECRET)
    assert SECRET not in (shown := capsys.readouterr().err)
    assert "a value without its name after ['hub_token']" in shown


def test_settings_that_are_no_secrets_are_not_masked() -> None:
    settings = {"tokens": 3, "max_new_tokens": 5, "tokenizer": "a", "key": "b", "text": [{"label_key": "c"}]}
    assert masked(settings) == settings
    line = ["--tokens", "3", "a b'c", "--question=what is it = that", "x=1"]
    assert masked_command(line) == line


STUDIES = sorted((ROOT / "recipes" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_repository_is_accepted_by_its_recipe(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All candidates of all arms go through the recipe's own parser."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import config as recipe_config

    studies = list(load_studies(path))
    parsed: list[tuple] = []

    class Parsed(Exception):
        pass

    original = recipe_config.parse
    monkeypatch.setattr(recipe_config, "parse", lambda *args: stop(*args))

    def stop(*args: Any) -> tuple:
        parsed.append(original(*args))
        raise Parsed

    for study in studies:
        assert study.question
        assert len(study.seeds) >= 3
        chosen: dict[str, dict] = {}
        for arms in study.tuning_order():
            for arm in arms:
                candidates = arm.candidates(chosen[arm.like] if arm.like else study.settings)
                chosen[arm.name] = candidates[0]
                script = arm.recipe.path
                for name in ("pretrain", "finetune"):
                    monkeypatch.delitem(sys.modules, name, raising=False)
                spec = importlib.util.spec_from_file_location(f"studied_{script.stem}", script)
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                check_settings(study, script, [each.name for kind in module.SETTINGS for each in fields(kind)])
                check_metrics(study, script, module.METRICS)
                if hasattr(module, "quantizations"):  # they need torchao, the parser does not
                    monkeypatch.setattr(module, "quantizations", dict)
                for settings in candidates:
                    file = tmp_path / "run.json"
                    here = {"seed": 1, "output_dir": str(tmp_path / "x"), "use_cpu": True, "bf16": False}
                    file.write_text(json.dumps(settings | here))
                    with pytest.raises(Parsed):
                        module.run([str(file)])
    assert parsed


def test_a_real_recipe_gives_all_arms_the_same_batches(tmp_path: Path) -> None:
    """With ρ = 0 the training is plain. It has the baseline's loss to the last bit, so weights and batches agree."""
    path = tmp_path / "real.yaml"
    small = {"max_steps": 2, "warmup_steps": 0, "eval_steps": 1, "validation_blocks": 2, "corpus_max_bytes": 400000}
    study = {
        "recipe": str(ROOT / "recipes" / "pretrain.py"),
        "config": str(ROOT / "recipes" / "configs" / "study.yaml"),
        "settings": {
            **small,
            "validation_fraction": 0.3,
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 16,
            "layers": 1,
        },
        "arms": {
            "AdamW": {"fsam_variant": "none"},
            "rho 0": {"fsam_rho": 0.0},
            "rho 1": {"fsam_rho": 1.0},
        },
        "seeds": [5],
    }
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    main([str(path), "--out", str(tmp_path / "out"), "--parallel", "2"])
    rows = {each["arm"]: each for each in map(json.loads, (tmp_path / "out" / "runs.jsonl").read_text().splitlines())}
    losses = {arm: each["metrics"]["eval_loss"] for arm, each in rows.items()}
    assert losses["rho 0"] == losses["AdamW"]
    assert losses["rho 1"] != losses["AdamW"]
    assert [step for step, _ in rows["AdamW"]["curve"]] == [1, 2, 2]
    assert rows["AdamW"]["corpus_sha256"]
