"""Runs the recipe of a study once for each arm, candidate and seed, and keeps what every run found in runs.jsonl."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from hf_fsam.studies.declared import check_names
from hf_fsam.studies.masking import masked, without_secrets
from hf_fsam.studies.study import Arm, Settings, Study, canonical, fingerprint

Row = dict[str, Any]

# Has Linux send SIGTERM to a run when the study that began it is gone, even by SIGKILL (1: PR_SET_PDEATHSIG).
_DIES = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"
ENDS_WITH_PARENT = [sys.executable, "-c", _DIES] if sys.platform == "linux" else []


@dataclass(frozen=True)
class Task:
    arm: Arm
    settings: Settings
    seed: int
    stage: str  # tuning or final


class Runner:
    """Runs the tasks of one study and keeps their rows.

    Args:
        out: the folder of the rows, and of the runs' own folders while they last.
        launch: the command in front of the recipe's path; None: Python.
        parallel: how many runs go on at a time. Each gets its share of the CPU's cores and, without `launch`, a GPU of
            its own.
        keep: leave the runs' folders, with their models, where they are.
        advance: called when a task has ended, with the task's weight and whether it ran now or was there before.

    Raises:
        RuntimeError: another process works in `out`.
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
            # The runs inherit the lock. So it holds for as long as a run that a killed study left behind is at work.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise RuntimeError(
                f"{self.log} is in use by another `compare`, or by a run that a killed one left behind. Wait for it, "
                "end it, or choose another --out."
            ) from error
        if self.log.stat().st_size and not self.log.read_bytes().endswith(b"\n"):  # the machine went down in a line
            self._file.write("\n")
        self.rows: dict[str, Row] = {row["key"]: row for row in read_rows(self.log)}
        self.parallel = parallel
        self._slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(parallel):
            self._slots.put(slot)
        self._writing = threading.Lock()
        self._files: dict[str, str | None] = {}
        self._stopped = self._checked = False
        self._processes: set[subprocess.Popen] = set()

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def run(self, tasks: Iterable[Task]) -> list[Row]:
        """Returns the rows of `tasks`, in their order. The first failure ends all runs."""
        tasks = list(tasks)
        distinct = {self.key(task): task for task in tasks}  # arms and studies may share a run
        if not self._checked and any(map(self._is_missing, distinct)):
            check_names(self.study)
            self._checked = True
        with ThreadPoolExecutor(self.parallel) as pool:
            futures = [pool.submit(self._run_once, key, task) for key, task in distinct.items()]
            try:
                for future in as_completed(futures):
                    self.advance(*future.result())
            except BaseException:
                self._stopped = True
                self._end_processes()
                raise
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

    def key(self, task: Task) -> str:
        """Identifies what the run computes."""
        recipe = task.arm.recipe
        name = recipe.module or os.path.relpath(recipe.path, self.study.path.parent)
        parts = [
            *(["run"] if recipe.unedited else []),
            name,
            task.settings,
            task.seed,
            *([self.launch] if self.launch else []),
        ]
        return hashlib.sha256(canonical(parts).encode()).hexdigest()[:16]

    def _is_missing(self, key: str) -> bool:
        row = self.rows.get(key)
        if row is None or not set(self.study.measured) <= row["metrics"].keys():
            return True
        # Older rows don't say. A file that a run has written itself was not there before it.
        return any(self._contents(row["settings"][name]) != before for name, before in row.get("files", {}).items())

    def _contents(self, name: str) -> str | None:
        """A hash of the file of that name, as it was when this study first looked; None where there is none."""
        if name not in self._files:
            path = os.path.expanduser(name)
            self._files[name] = fingerprint(Path(path)) if os.path.isfile(path) else None
        return self._files[name]

    def _run_once(self, key: str, task: Task) -> tuple[float, bool]:
        """Runs the task unless its row is there. Returns its weight and whether it ran now."""
        run = self._is_missing(key)
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
            if not self.keep:  # not before: a study that is killed here has its row
                shutil.rmtree(self.out / "runs" / key)
            missing = [name for name in self.study.measured if name not in row["metrics"]]
            if missing:  # the row is written all the same: with the right name, the study need not run this again
                raise RuntimeError(
                    f"{self.study.name}: {task.arm.name}, seed {task.seed}, has no metric {missing[0]!r}. It has "
                    f"{', '.join(row['metrics'])}. List some of these under `metrics`."
                )
        return self.study.weight(task.arm, task.settings), run

    def _train(self, task: Task, key: str, slot: int) -> Row:
        folder = self.out / "runs" / key
        read = {name: self._contents(value) for name, value in task.settings.items() if isinstance(value, str)}
        known = folder / "files.json"
        if known.is_file() and any(read[name] != before for name, before in json.loads(known.read_text()).items()):
            shutil.rmtree(folder)  # its checkpoints are of other data
        folder.mkdir(parents=True, exist_ok=True)
        read = {name: contents for name, contents in read.items() if contents is not None}
        new = known.with_suffix(".new")
        new.write_text(json.dumps(read))
        new.replace(known)  # complete or not at all
        settings = {"disable_tqdm": True, **task.settings, "seed": task.seed, "output_dir": str(folder)}
        # The newest complete checkpoint of a run that was killed: the Trainer writes the state last.
        complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
        checkpoint = max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)
        if checkpoint is not None:
            settings["resume_from_checkpoint"] = str(checkpoint)
        file, output = folder / "run.json", folder / "output.txt"
        file.touch()
        file.chmod(0o600)  # before a token or a password is in it
        # As it is written, because a recipe may read the file as YAML, where JSON's pairs of escapes are no characters.
        file.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        try:
            code = self._call(task.arm.recipe.command(file, self.launch), output, slot)
        finally:
            file.write_text(json.dumps(masked(settings), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            printed = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
            output.write_text(without_secrets(printed, settings), encoding="utf-8")
        if self._stopped:  # it may have ended early, with a checkpoint and without an error
            raise CancelledError
        if code != 0:
            tail = "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise RuntimeError(
                f"{self.study.name}: {task.arm.name}, seed {task.seed}, ended with code {code}. Its settings are in "
                f"{file} and all that it printed is in {output}, which ends with:\n{tail}\nThe results of the runs "
                "before it are kept. Once the cause is removed, the same command goes on from there."
            )
        return {
            "study": self.study.name,
            "arm": task.arm.name,
            "stage": task.stage,
            "seed": task.seed,
            "settings": masked(task.settings),
            "files": read,
            "resumed": checkpoint is not None,
            **read_results(folder, self.study.tune_on),
            "recipe_sha256": fingerprint(task.arm.recipe.path),
            "key": key,
        }

    def _call(self, command: list[str], output: Path, slot: int) -> int:
        environment = dict(os.environ)
        if self.parallel > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.parallel))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        if self.launch is None and len(gpus) > 1:  # or the plain Trainer would take all of them for one run
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        with output.open("a", encoding="utf-8") as stream:
            process = subprocess.Popen(
                [*ENDS_WITH_PARENT, *command],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[self._file.fileno()],
                start_new_session=True,  # so that a launcher and its processes can be ended together
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
            _signal(process, signal.SIGKILL)  # also to the processes that a launcher has left


def _signal(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def read_results(folder: Path, metric: str) -> Row:
    """Reads what a run left in `folder`: all metrics, the curve of `metric`, steps, seconds, versions and machine.

    The metrics are those of the results, the last logged value of every name in the history (such as
    `fsam/top_curvature`), and `best_eval_loss`, the lowest evaluation loss during the run. A value that is not finite
    becomes None.

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
    if not any(curve_of in entry for entry in history):
        curve_of = f"eval_{curve_of}"  # as the Trainer logs what a recipe calls `accuracy` in its results
    seconds = results.get("train_seconds")
    if seconds is None:
        seconds = next((entry["train_runtime"] for entry in history if "train_runtime" in entry), None)
    return {
        "metrics": {
            name: value if _is_finite(value) else None
            for name, value in sorted(found.items())
            if isinstance(value, int | float)
        },
        "curve_of": curve_of,
        "curve": [[entry["step"], entry[curve_of]] for entry in history if _is_finite(entry.get(curve_of))],
        "steps": results.get("steps") or max((entry.get("step", 0) for entry in history), default=0),
        "train_seconds": seconds,
        **{name: results[name] for name in ("parameters", "corpus_sha256", "versions", "machine") if name in results},
    }


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def read_rows(path: Path) -> list[Row]:
    """The rows of all lines that were written to their end."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
