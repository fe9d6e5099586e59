"""`hf-fsam compare`: which runs it makes, that it repeats none, and how they end."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from tqdm import tqdm

from hf_fsam.studies.compare import main, run_study
from hf_fsam.studies.report import table
from hf_fsam.studies.runner import Runner, read_results
from tests.tools.studies import RECIPE, called, compare, run, study_of, write_study

ROOT = Path(__file__).parents[2]
COMPARE = [sys.executable, "-m", "hf_fsam", "compare"]


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


def terminate_a_study(folder: Path) -> None:
    """Start the study of a run that takes a minute, and end it once the run has begun."""
    write_study(folder, settings={"sleep": 60}, arms={"A": {}}, seeds=[0])
    command = [*COMPARE, str(folder / "study.yaml"), "--out", str(folder / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not called(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=20) != 0


def test_sigterm_ends_the_runs_with_the_study(folder: Path) -> None:
    terminate_a_study(folder)
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


def test_a_table_that_has_changed_is_trained_on_anew(folder: Path) -> None:
    table, text = folder / "labels.csv", "text,label\n"
    table.write_text(text)
    study = {"settings": {"dataset": str(table), "long": "x" * 5000}}
    run(study_of(folder, **study), folder)
    before = len(called(folder))
    run(study_of(folder, **study), folder)
    assert len(called(folder)) == before
    table.write_text(text + "a,b\n")
    run(study_of(folder, **study), folder)
    assert len(called(folder)) == 2 * before
    run(study_of(folder, **study), folder)
    assert len(called(folder)) == 2 * before


def test_a_checkpoint_of_a_table_that_has_changed_is_not_gone_on_from(folder: Path) -> None:
    table = folder / "labels.csv"
    for text, resumed in (("a", False), ("a", True), ("b", False)):
        table.write_text(text)
        (row,) = run(study_of(folder, arms={"A": {"dataset": str(table)}}, seeds=[0]), folder, keep=True)
        assert row["resumed"] == resumed
        (left,) = (folder / "out" / "runs").iterdir()
        (left / "checkpoint-3").mkdir(exist_ok=True)
        (left / "checkpoint-3" / "trainer_state.json").write_text("{}")
        if not resumed:
            (folder / "out" / "runs.jsonl").write_text("")


def test_a_run_that_a_stopped_study_ended_early_has_no_row(folder: Path) -> None:
    """On SIGTERM a script may save a checkpoint, report, and end without an error."""
    recipe = (folder / "recipe.py").read_text()
    early = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: settings.update(sleep=0, early=True))\n"
    wait = "while settings['sleep'] > 0 and not settings.get('early'): time.sleep(0.02)"
    recipe = recipe.replace("with (Path", early + "with (Path", 1).replace('time.sleep(settings.get("sleep", 0))', wait)
    (folder / "recipe.py").write_text(recipe)
    terminate_a_study(folder)
    assert list((folder / "out" / "runs").glob("*/results.json"))  # it had come to its end
    assert (folder / "out" / "runs.jsonl").read_text() == ""


def test_a_file_that_is_written_during_a_study_changes_no_run(folder: Path) -> None:
    recipe = (folder / "recipe.py").read_text()
    (folder / "recipe.py").write_text(recipe + "Path(settings['predictions']).write_text(str(settings))\n")
    (folder / "table.csv").write_text("a")
    study = {"settings": {"predictions": str(folder / "out.txt"), "dataset": str(folder / "table.csv")}}
    with Runner(study_of(folder, **study), folder / "out") as runner:
        runner.advance = lambda weight, ran: (folder / "table.csv").write_text("b")  # the user edits it
        run_study(runner.study, runner)
    before = len(called(folder))
    (folder / "table.csv").write_text("a")
    run(study_of(folder, **study), folder)
    assert len(called(folder)) == before


def test_a_recipe_that_reads_yaml_gets_every_character(folder: Path) -> None:
    recipe = (folder / "recipe.py").read_text().replace("json.loads(Path", "__import__('yaml').safe_load(Path")
    (folder / "recipe.py").write_text(recipe.replace("folder = Path", "settings['column'].encode()\nfolder = Path"))
    run(study_of(folder, settings={"column": "☺ 🙂 ü"}), folder)
    assert {each["column"] for each in called(folder)} == {"☺ 🙂 ü"}


def test_studies_share_runs_and_another_metric_repeats_none(folder: Path) -> None:
    first = study_of(folder, arms={"A": {"rate": 1}}, seeds=[0])
    run(first, folder)
    second = study_of(folder, arms={"B": {"rate": 1, "passes": 3}}, seeds=[0], metrics=["best_eval_loss", "eval_loss"])
    (found,) = run(second, folder)
    assert (found["arm"], found["passes"]) == ("B", 3)
    assert found["metrics"]["best_eval_loss"] == found["metrics"]["eval_loss"] - 1
    assert len(called(folder)) == 1


def test_a_module_of_the_working_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "their_trainings").mkdir()
    (folder / "their_trainings" / "train.py").touch()
    study = study_of(folder, recipe=None, script="-m their_trainings.train", arms={"A": {}})
    command = study.arms["A"].recipe.command(folder / "run.json", None)
    assert command == [*COMPARE[:3], "run", "--settings", str(folder / "run.json"), "-m", "their_trainings.train"]


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
    assert "2 without a value" in "\n".join(table(study, rows))
    assert "no value 2/2" in "\n".join(table(study, rows))
    study = study_of(folder, arms={"A": {"rate": 3}, "B": {"diverge": [True], "rate": [3, 4]}}, seeds=[0, 1])
    assert "no value 2/2" in "\n".join(table(study, run(study, folder)))  # with every candidate: a result, too
    study = study_of(folder, arms={"A": {"diverge": [True], "rate": [1, 2]}})
    with pytest.raises(RuntimeError, match="no candidate ended with a finite eval_loss"):
        run(study, folder)


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
    study = study_of(folder, metrics=["eval_los"], greater_is_better=False, arms={"A": {}}, seeds=[0])
    with pytest.raises(RuntimeError, match=r"A, seed 0, has no metric 'eval_los'\. It has .*best_eval_loss"):
        run(study, folder)
    run(study_of(folder, arms={"A": {}}, seeds=[0]), folder)
    assert len(called(folder)) == 1


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
