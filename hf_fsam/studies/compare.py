"""Run a study (:mod:`~hf_fsam.studies.study`): every arm on the same batches, tuned on its own seeds, then the table.

    hf-fsam compare recipes/studies/core.yaml
    hf-fsam compare recipes/studies/core.yaml --max_steps 20 --seeds 0 1 --out outputs/try    # a try

The recipe is any script that takes one JSON file of settings, as recipes/*.py and transformers' own examples do
(`script.py run.json`), with `output_dir` and `seed` among them, and leaves there `results.json` (`metrics`, and for
curves and costs `history`, `steps`, `train_seconds`) or the Trainer's `all_results.json` and `trainer_state.json`. That
a seed means the same batches for all arms is the Trainer's doing: its sampler draws from `seed` alone.

Runs go to OUT/runs.jsonl as they end, one line each, without tokens and passwords. A run that is there is not repeated,
also by another study, so one that was killed goes on where it was, within a run from its last checkpoint if it writes
any. Script, settings, seed and --launch make a run; what else it reads, a model's folder or modules beside the script,
is not looked at: take another --out where that has changed. Then come OUT/STUDY.md and OUT/STUDY.png.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import yaml
from tqdm import tqdm

from hf_fsam.studies.masking import is_secret, masked, masked_command, without_secrets
from hf_fsam.studies.report import write_report
from hf_fsam.studies.study import Arm, Settings, Study, canonical, fingerprint, load_studies, numbers, training_length

Row = dict[str, Any]

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"


@dataclass(frozen=True)
class Task:
    arm: Arm
    settings: Settings
    seed: int
    stage: str  # tuning or final


class Runner:
    """Runs the tasks of one study and keeps their rows.

    Args:
        out: folder of the rows, and of the runs' own folders while they last.
        launch: the command in front of the recipe's path; None: Python.
        parallel: runs at a time; each gets its share of the CPU's cores, and without `launch` a GPU of its own.
        keep: leave the runs' folders, with their models, where they are.
        advance: called with a task's weight when it has ended, and whether it ran now or was there before.

    Raises:
        RuntimeError: somebody else is at work in `out`.
    """

    def __init__(
        self,
        study: Study,
        out: Path,
        launch: list[str] | None = None,
        parallel: int = 1,
        keep: bool = False,
        advance: Callable[[float, bool], Any] = lambda weight, ran: None,
    ) -> None:
        self.study, self.out, self.launch, self.keep, self.advance = study, out, launch, keep, advance
        self.log = out / "runs.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        self._file = self.log.open("a", encoding="utf-8")
        try:
            # The runs inherit it, so that it holds as long as one that a killed study left behind is still at work.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise RuntimeError(
                f"{self.log} is in use: by another `compare`, or by a run that a killed one left behind. Wait, end it, "
                "or choose another --out."
            ) from error
        if self.log.stat().st_size and not self.log.read_bytes().endswith(b"\n"):  # cut when the machine went down
            self._file.write("\n")
        self.rows: dict[str, Row] = {row["key"]: row for row in read_rows(self.log)}
        self.parallel = parallel
        self._slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(parallel):
            self._slots.put(slot)
        self._writing = threading.Lock()
        self._stopped = False
        self._processes: set[subprocess.Popen] = set()

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def run(self, tasks: Iterable[Task]) -> list[Row]:
        """The rows of `tasks`, in their order; the first failure ends all."""
        tasks = list(tasks)
        distinct = {self.key(task): task for task in tasks}
        with ThreadPoolExecutor(self.parallel) as pool:
            futures = [pool.submit(self._once, task) for task in distinct.values()]
            try:
                for future in as_completed(futures):
                    self.advance(*future.result())
            except BaseException:
                self._stopped = True
                self._end_processes()
                raise
        # Arms and studies may share a run.
        return [
            {
                **self.rows[self.key(task)],
                "study": self.study.name,
                "arm": task.arm.name,
                "stage": task.stage,
                "passes": self.study.passes(task.arm, task.settings),
            }
            for task in tasks
        ]

    def recipe(self, task: Task) -> Path:
        return task.arm.recipe or self.study.recipe

    def key(self, task: Task) -> str:
        """Names what the run computes."""
        recipe = os.path.relpath(self.recipe(task), self.study.path.parent)
        parts = [recipe, task.settings, task.seed, *([self.launch] if self.launch else [])]
        return hashlib.sha256(canonical(parts).encode()).hexdigest()[:16]

    def _once(self, task: Task) -> tuple[float, bool]:
        """Runs the task unless it has been; returns its weight and whether it ran now."""
        key = self.key(task)
        known = self.rows.get(key, {"metrics": {}})
        run = not set(self.study.metrics) <= known["metrics"].keys()
        if run and not self._stopped:
            slot = self._slots.get()
            try:
                row = self._train(task, key, slot)
            finally:
                self._slots.put(slot)
            with self._writing:
                self.rows[key] = row
                self._file.write(json.dumps(row, allow_nan=False) + "\n")
                self._file.flush()
            missing = [name for name in self.study.metrics if name not in row["metrics"]]
            if missing:  # the row is kept: nothing is lost but the name
                raise RuntimeError(
                    f"{self.study.name}: {task.arm.name}, seed {task.seed}, has no metric {missing[0]!r}. It has "
                    f"{', '.join(row['metrics'])}."
                )
        return weight(self.study, task.arm, task.settings), run

    def _train(self, task: Task, key: str, slot: int) -> Row:
        folder = self.out / "runs" / key
        folder.mkdir(parents=True, exist_ok=True)
        recipe = self.recipe(task)
        settings = {"disable_tqdm": True, **task.settings, "seed": task.seed, "output_dir": str(folder)}
        checkpoint = last_checkpoint(folder)
        if checkpoint is not None:
            settings["resume_from_checkpoint"] = str(checkpoint)
        file, output = folder / "run.json", folder / "output.txt"
        file.touch()
        file.chmod(0o600)
        file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        try:
            code = self._call([*(self.launch or [sys.executable]), str(recipe), str(file)], output, slot)
        finally:
            file.write_text(json.dumps(masked(settings), indent=1) + "\n", encoding="utf-8")
            printed = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
            output.write_text(without_secrets(printed, settings), encoding="utf-8")
        if code != 0:
            tail = "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise RuntimeError(
                f"{self.study.name}: {task.arm.name}, seed {task.seed}, ended with code {code}. Its settings are in "
                f"{file}, all that it printed in {output}, which ends with:\n{tail}\nWhat had ended before is kept: "
                "the same command goes on from there."
            )
        row = {
            "study": self.study.name,
            "arm": task.arm.name,
            "stage": task.stage,
            "seed": task.seed,
            "settings": masked(task.settings),
            "resumed": checkpoint is not None,
            **read_results(folder, self.study.metrics[0]),
            "recipe_sha256": fingerprint(recipe),
            "key": key,
        }
        if not self.keep:
            shutil.rmtree(folder)
        return row

    def _call(self, command: list[str], output: Path, slot: int) -> int:
        environment = dict(os.environ)
        if self.parallel > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.parallel))
        gpus = visible_gpus()
        if self.launch is None and len(gpus) > 1:  # or the plain Trainer would take all of them for one run
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        with output.open("a", encoding="utf-8") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[self._file.fileno()],
                start_new_session=True,  # a launcher and its processes are ended together
            )
            self._processes.add(process)
            try:
                if self._stopped:
                    _signal(process, signal.SIGTERM)
                return process.wait()
            finally:
                self._processes.discard(process)

    def _end_processes(self, grace: float = 30.0) -> None:
        processes = list(self._processes)
        for process in processes:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + grace
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            _signal(process, signal.SIGKILL)  # and what its launcher left


def _signal(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest that is whole: the Trainer writes the state last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def run_study(study: Study, runner: Runner) -> list[Row]:
    """Tunes and runs all arms. Returns the rows of all runs."""
    chosen: dict[str, Settings] = {}
    tuned: list[Row] = []
    for arms in study.tuning_order():
        found = {arm.name: arm.candidates(chosen[arm.like] if arm.like else study.settings) for arm in arms}
        tasks = list(tuning_tasks(study, arms, found))
        rows = runner.run(tasks)
        for arm in arms:
            own = [(task, row) for task, row in zip(tasks, rows, strict=True) if task.arm is arm]
            if not own:
                chosen[arm.name] = found[arm.name][0]
                continue
            losses = [
                mean(score(study, row) for task, row in own if task.settings == candidate)
                for candidate in found[arm.name]
            ]
            if min(losses) == math.inf and arm.name == study.baseline:
                raise RuntimeError(f"{study.name}: {arm.name}: no candidate ended with a finite {study.metrics[0]}.")
            # Where another arm diverges with every candidate, that is a result: the first one goes into the table.
            chosen[arm.name] = found[arm.name][losses.index(min(losses))]
        tuned += rows
    # Seed by seed, so that what there is of a study that was stopped compares all arms.
    final = [Task(arm, chosen[name], seed, "final") for seed in study.seeds for name, arm in study.arms.items()]
    return tuned + runner.run(final)


def score(study: Study, row: Row) -> float | None:
    """Of the metric that decides; lower is better. None: it is not finite."""
    value = row["metrics"][study.metrics[0]]
    return -value if study.greater_is_better and value is not None else value


def tuning_tasks(study: Study, arms: list[Arm], candidates: dict[str, list[Settings]]) -> Iterator[Task]:
    for arm in arms:
        if len(candidates[arm.name]) > 1:
            for settings in candidates[arm.name]:
                for seed in study.tuning_seeds:
                    yield Task(arm, settings, seed, "tuning")


def weight(study: Study, arm: Arm, settings: Settings) -> float:
    """What a run takes, for the time that is left: nothing but ratios count."""
    return study.passes(arm, settings) * (training_length(settings) or 1.0)


def total_weight(study: Study) -> float:
    """Of all runs; which candidate is chosen makes no great difference."""
    total = 0.0
    begin: dict[str, Settings] = {}
    for arms in study.tuning_order():
        for arm in arms:
            candidates = arm.candidates(begin[arm.like] if arm.like else study.settings)
            begin[arm.name] = candidates[0]
            weights = [weight(study, arm, each) for each in candidates]
            total += weights[0] * len(study.seeds)
            if len(candidates) > 1:
                total += sum(weights) * len(study.tuning_seeds)
    return total


# ---- What a run leaves behind ----


def read_results(folder: Path, metric: str) -> Row:
    """Of a run's results: all metrics, the curve of `metric`, steps, seconds, versions and machine.

    A metric is one of the results', or the last that was logged of that name (as `fsam/top_curvature`), or
    `best_eval_loss`, the lowest on the way. One that is not finite is None.

    Raises:
        RuntimeError: there are no results.
    """
    history: list[Row]
    if (folder / "results.json").is_file():
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        found, history = dict(results["metrics"]), results.get("history", [])
    elif (folder / "trainer_state.json").is_file():
        history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        path = folder / "all_results.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        results = {}
    else:
        raise RuntimeError(
            f"The run left neither results.json nor trainer_state.json in {folder}: let the recipe write the first, or "
            "call trainer.save_state()."
        )
    for name in {name for entry in history for name in entry}:
        found.setdefault(name, next(entry[name] for entry in reversed(history) if name in entry))
    for name in [name for name in found if name.startswith("eval_") and name.endswith("loss")]:
        values = [found[name], *(entry[name] for entry in history if name in entry)]
        found[f"best_{name}"] = min(filter(_is_finite, values), default=math.nan)
    curve_of = metric.removeprefix("best_")
    steps = results.get("steps") or max((entry.get("step", 0) for entry in history), default=0)
    seconds = results.get("train_seconds")
    if seconds is None:
        seconds = next((entry["train_runtime"] for entry in history if "train_runtime" in entry), None)
    return {
        "metrics": {
            name: value if _is_finite(value) else None
            for name, value in sorted(found.items())
            if isinstance(value, int | float)
        },
        "curve": [[entry["step"], entry[curve_of]] for entry in history if _is_finite(entry.get(curve_of))],
        "steps": steps,
        "train_seconds": seconds,
        **{name: results[name] for name in ("parameters", "corpus_sha256", "versions", "machine") if name in results},
    }


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def mean(values: Iterable[float | None]) -> float:
    """Infinite where one did not end with a finite value."""
    return statistics.fmean(math.inf if value is None else value for value in values)


def read_rows(path: Path) -> list[Row]:
    """All whole lines."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


# ---- The command ----


def main(argv: list[str] | None = None, prog: str = "python -m hf_fsam.studies.compare") -> None:
    argv = sys.argv[1:] if argv is None else argv
    args, overrides = parse(argv, prog)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so end the runs, too
    try:
        studies = list(load_studies(args.study, overrides, args.seeds, args.baseline))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{prog}: {error}")
    with tqdm(total=sum(map(total_weight, studies)), bar_format=BAR, smoothing=0) as bar:

        def advance(weight: float, ran: bool) -> None:
            if not ran:  # it took no time, so it says nothing about the time that is left
                bar.initial += weight
            bar.update(weight)

        for study in studies:
            bar.set_description(study.name)
            with Runner(study, args.out, args.launch, args.parallel, args.keep, advance) as runner:
                rows = run_study(study, runner)
            command = without_secrets(f"{prog} {shlex.join(masked_command(argv))}", overrides)
            report = write_report(study, rows, args.out / study.name, command)
            bar.write(f"\n{report}\n", file=sys.stdout)


def parse(argv: list[str], prog: str) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other --name value, after the file, is a setting of all arms, unless an arm sets it itself.",
        allow_abbrev=False,
    )
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument("--out", type=Path, default=Path("outputs/studies"), help="folder of rows, tables and plots")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the study's")
    parser.add_argument("--baseline", help="the arm to compare with, in place of the study's")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folders, with their models")
    parser.add_argument(
        "--launch",
        type=shlex.split,
        help='what starts a recipe, as "torchrun --nproc_per_node 8"; Python by itself, on one GPU, by default',
    )
    args, rest = parser.parse_known_args(argv)
    if not args.study.is_file():
        parser.error(f"{args.study} does not exist: the study's YAML file comes before other settings.")
    if args.parallel < 1:
        parser.error(f"--parallel {args.parallel}: give 1 or more.")
    if args.launch and args.parallel > 1:
        parser.error("--parallel with --launch: launched runs would meet on the same port and GPUs; leave one out.")
    overrides: Settings = {}
    while rest:
        name, *value = rest.pop(0).split("=", 1)
        if not name.startswith("--"):
            parser.error(f"a value without its name after {list(overrides)[-1:] or args.study}: give `--name value`.")
        if not (value or rest):
            parser.error(f"{name!r} has no value: give `{name} value`.")
        text, name = value[0] if value else rest.pop(0), name.removeprefix("--")
        overrides[name] = text if is_secret(name) else numbers(yaml.safe_load(text))
    return args, overrides


if __name__ == "__main__":
    main()
