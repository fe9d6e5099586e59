"""`python -m benchmarks.gpu`: the order of the checks, their limits, which results are kept and which checks are run
again. Every check that a CPU can run is also run here, at toy size."""

import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, wheels
from hf_fsam.heads import deferred_logits

# Checks that take no time, in a module that a check's process imports by its name.
MODULE = '''
import os, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.check import Check, Row

HERE = Path(__file__).parent

def began(name):
    with (HERE / "order").open("a") as file:
        print(name, file=file)

def good(toy):
    """Holds."""
    began("good")
    yield Row("toy", toy, "True", toy)
    yield Row("told", os.environ["HF_FSAM_TEST_DEVICE"])

def bad(toy):
    """Fails: a | b."""
    began("bad")
    yield Row("one", 1, "2", False)
    yield Row("two", 2, "2", True)

def crashes(toy):
    """Raises."""
    began("crashes")
    yield Row("before", 1, "1", True)
    raise RuntimeError("struck")

def hangs(toy):
    """Never ends."""
    began("hangs")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield Row("before", child.pid)
    time.sleep(1000)

def _meets(name, other):
    began(name)
    end = time.monotonic() + 40
    while other not in (HERE / "order").read_text().split() and time.monotonic() < end:
        time.sleep(0.1)
    yield Row("met", time.monotonic() < end, "True", time.monotonic() < end)

def one(toy):
    """Waits for the other."""
    yield from _meets("one", "other")

def other(toy):
    """Waits for the one."""
    yield from _meets("other", "one")

def packageless(toy):
    """Needs what is not there."""
    yield Row("never", 1)

CHECKS = {
    "good": Check(good, 60, timed=True),
    "hangs": Check(hangs, 5),
    "bad": Check(bad, 60),
    "crashes": Check(crashes, 60),
    "packageless": Check(packageless, 60, ("no_such_package",)),
    "elsewhere": Check(packageless, 60, cpu=False),
    "one": Check(one, 60),
    "other": Check(other, 60),
}
'''


find_machine = functools.cache(gpu.find_machine)  # which starts a process with torch


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(gpu, "find_machine", find_machine)
    (tmp_path / "toy_checks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield "toy_checks"
    sys.modules.pop("toy_checks", None)


def run(out: Path, module: str, *arguments: str) -> tuple[int, dict[str, dict]]:
    code = gpu.main(["--device", "cpu", "--toy", "--out", str(out), *arguments], module)
    path = out.with_name(f"{out.name}.json")
    return code, json.loads(path.read_text())["checks"] if path.exists() else {}


def order(out: Path) -> list[str]:
    return (out.parent / "order").read_text().split()


def test_a_check_that_hangs_or_crashes_does_not_stop_the_others(tmp_path: Path, module: str) -> None:
    out = tmp_path / "gpu_here"
    code, entries = run(out, module, "--only", "good", "hangs", "bad", "crashes", "packageless", "elsewhere")
    assert code == 1
    assert order(out) == ["good", "hangs", "bad", "crashes"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "good": "passed",
        "hangs": "timed out",
        "bad": "failed",
        "crashes": "crashed",
        "packageless": "missing",
        "elsewhere": "not here",
    }
    assert [row["measured"] for row in entries["good"]["rows"]] == [True, "cpu"]
    assert entries["good"]["machine"]["device"].startswith("CPU")
    assert entries["hangs"]["seconds"] < 5 + gpu.GRACE
    child = entries["hangs"]["rows"][0]["measured"]  # what it had measured by then is kept
    assert not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text()
    assert "RuntimeError: struck" in entries["crashes"]["said"]
    assert entries["crashes"]["rows"] == [{"what": "before", "measured": 1, "expected": "1", "ok": True}]

    table = (tmp_path / "gpu_here.md").read_text()
    assert "| good | passed | toy | True | True |" in table
    assert "| bad | **failed** | one | **1** | 2 |" in table
    assert "RuntimeError: struck" in table
    assert "no_such_package not installed" in table


def test_a_check_that_is_done_is_not_run_again(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu_here"
    assert run(out, module, "--only", "good", "bad")[0] == 1
    assert run(out, module, "--only", "good", "bad")[0] == 1  # it failed still
    assert order(out) == ["good", "bad"]
    assert run(out, module, "--only", "good", "--redo", "good")[0] == 0
    assert order(out) == ["good", "bad", "good"]
    monkeypatch.setattr(gpu, "hash_of_sources", lambda: "others")
    _, entries = run(out, module, "--only", "bad")
    assert order(out) == ["good", "bad", "good", "bad"]
    assert entries["bad"]["sources"] == "others" != entries["good"]["sources"]
    assert list(entries) == ["good", "bad"]


def test_the_budget_is_for_all_together(tmp_path: Path, module: str) -> None:
    out = tmp_path / "gpu_here"
    started = time.monotonic()
    _, entries = run(out, module, "--only", "hangs", "bad", "--budget", "2.5")
    assert time.monotonic() - started < 30
    assert {name: entry["status"] for name, entry in entries.items()} == {"hangs": "out of budget"}
    _, entries = run(out, module, "--only", "hangs")  # which is no answer
    assert order(out) == ["hangs", "hangs"]
    assert entries["hangs"]["status"] == "timed out"


def test_jobs_run_at_once_and_those_that_measure_time_after_them(tmp_path: Path, module: str) -> None:
    _, entries = run(tmp_path / "gpu_here", module, "--only", "good", "one", "other", "--jobs", "2")
    assert order(tmp_path / "gpu_here")[-1] == "good"  # the first of the list, had it not measured time
    assert {name: entry["status"] for name, entry in entries.items()} == dict.fromkeys(
        ["good", "one", "other"], "passed"
    )


def test_jobs_that_are_interrupted_end_and_are_not_recorded(tmp_path: Path, module: str) -> None:
    out = tmp_path / "gpu_here"
    arguments = ["--device", "cpu", "--toy", "--out", str(out), "--only", "one", "--jobs", "2"]
    # Or it would ignore the signal where the tests were started in the background of a shell.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from benchmarks.gpu.__main__ import main; main({arguments}, {module!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu.ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "order").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert "KeyboardInterrupt" in said
    assert order(out) == ["one"]
    assert not out.with_name("gpu_here.json").exists()  # so that it is run again


def test_arguments(tmp_path: Path, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"no such check: nothing\. There are: good, hangs"):
        run(tmp_path / "x", module, "--only", "nothing")
    with pytest.raises(SystemExit, match="On a CPU add --toy"):
        gpu.main(["--device", "cpu"], module)
    with pytest.raises(SystemExit):
        run(tmp_path / "x", module, "--jobs", "0")
    assert "at least one check" in capsys.readouterr().err
    gpu.main(["--list"], module)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][:2] == ["good", "hangs"]


def test_wheels_are_those_that_are_wanted_and_not_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheels.print_wheels("")
    missing, *commands = capsys.readouterr().out.splitlines()
    names = missing.removeprefix("# missing there: ").split(", ")
    assert {"deepspeed", "datasets", "pyarrow", "aiohttp", "trl", "pytest", "liger-kernel"} <= set(names)
    assert not {"torch", "transformers", "numpy", "tokenizers", "networkx"} & set(
        names
    )  # torch and its like bring them
    text = "\n".join(commands)
    assert all(f" {wheels.pinned(name)}" in text for name in names)
    assert "pip wheel --no-deps --no-build-isolation -w wheels deepspeed==" in text  # it is no wheel on the registry

    (tmp_path / "freeze.txt").write_text("".join(f"{name.replace('-', '_')}==1.0\n" for name in names[1:]))
    (tmp_path / "freeze.txt").open("a").writelines(f"{name}\n" for name in wheels.closure(wheels.BASE))
    wheels.print_wheels(str(tmp_path / "freeze.txt"))
    assert capsys.readouterr().out.splitlines()[0] == f"# missing there: {names[0]}"


# The checks themselves ------------------------------------------------------------------------------------------------

QUICK = ("head", "theta", "waits", "memory", "cost_0.5B", "head_cost")
APART = [name for name, check in checks.CHECKS.items() if check.cpu and name not in QUICK]


@pytest.mark.parametrize("name", QUICK)
def test_a_check_runs_at_toy_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred_logits, "leaving_out_is_free", deferred_logits.leaving_out_is_free)  # `waits` sets it
    rows = list(checks.CHECKS[name].rows(True))
    assert rows
    assert [row for row in rows if row.ok is False] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", APART)
def test_a_check_runs_in_its_process_at_toy_size(name: str, tmp_path: Path) -> None:
    code, entries = run(tmp_path / "gpu_here", gpu.CHECKS, "--only", name)
    assert code == 0, entries[name]["said"]
    assert all(row["ok"] is not False for row in entries[name]["rows"])
