"""Checks what only a GPU can show, in order of value, each check in a process of its own with a time limit of its own.

    make gpu                                               # all checks, without those that have been done
    make gpu GPU_ARGS="--budget 1800"                      # the most valuable checks, in half an hour
    make gpu GPU_ARGS="--jobs 6"                           # six at a time; those that measure time last, one by one
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --only head theta --redo head
    python -m benchmarks.gpu --device cpu --toy            # tries the checks themselves, without a GPU
    python -m benchmarks.gpu --wheels                      # what to carry to a machine without a network

After each check OUT.json and OUT.md are written, by default benchmarks/results/gpu_DEVICE. A check that is there with
the same sources (hf_fsam, tests, benchmarks), device and versions is not run again, whether it passed, failed or
reached its time limit; --redo runs it all the same. A check that the budget cut short or that lacked a package is run
again.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import Check
from benchmarks.gpu.wheels import print_wheels

ROOT = Path(__file__).parents[2]
CHECKS = "benchmarks.gpu.checks"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "trl", "liger-kernel", "triton")
DONE = ("passed", "failed", "crashed", "timed out")  # the others are: missing, not here, out of budget
GRACE = 15  # seconds between asking a process to end and ending it
Entry = dict[str, Any]


def main(argv: list[str] | None = None, module: str = CHECKS) -> int:
    """Runs those of the CHECKS in `module` that `argv` asks for. Returns 0 if none failed."""
    args = parse(argv)
    if args.wheels is not None:
        print_wheels(args.wheels)
        return 0
    checks: dict[str, Check] = importlib.import_module(module).CHECKS
    unknown = [name for name in (*args.only, *args.redo) if name not in checks]
    if unknown:
        sys.exit(f"benchmarks.gpu: no such check: {', '.join(unknown)}. There are: {', '.join(checks)}.")
    if args.list:
        for name, check in checks.items():
            print(f"{name:20} {check.limit:>6} s  {check.about}")
        return 0

    machine = find_machine(args.device, args.toy)
    here = {"machine": machine, "sources": hash_of_sources(), "commit": commit()}
    slug = re.sub(r"\W+", "_", machine["device"].lower()).strip("_") + ("_toy" if args.toy else "")
    out = args.out or ROOT / ("outputs" if args.toy else "benchmarks/results") / f"gpu_{slug}"
    entries: dict[str, Entry] = read(out)
    end = time.monotonic() + args.budget if args.budget else float("inf")
    writing, processes = threading.Lock(), Processes()

    def do(name: str) -> None:
        known = entries.get(name, {})
        same = all(known.get(key) == here[key] for key in ("machine", "sources"))
        if same and known["status"] in DONE and name not in args.redo:
            print(f"{name}: {known['status']}, as before", flush=True)
            return
        left = end - time.monotonic()
        if left < 1:
            print(f"{name}: not begun, the budget of {args.budget} s is spent", flush=True)
            return
        print(f"{name}: at most {min(checks[name].limit, left):.0f} s", flush=True)
        entry = here | run(module, name, checks[name], args, machine["type"], left, processes)
        if processes.stopped:
            return
        with writing:
            entries[name] = entry
            write(out, {name: entries[name] for name in checks if name in entries}, argv)
        print(f"{name}: {entry['status']}, {entry['seconds']} s", flush=True)

    chosen = [name for name in checks if not args.only or name in args.only]
    together = [name for name in chosen if args.jobs > 1 and not checks[name].timed]
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(do, together))
        except BaseException:  # also Ctrl-C, which the checks, in sessions of their own, do not see
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    for name in chosen:
        if name not in together:
            do(name)
    print(f"{out}.md")
    asked = [entries[name]["status"] for name in args.only or checks if name in entries]
    return int(any(status in ("failed", "crashed", "timed out") for status in asked))


class Processes:
    """Those of the checks that run, several at a time. Once they are stopped none begins, and none is recorded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self.stopped = False

    def start(self, command: list[str], **arguments: Any) -> subprocess.Popen:
        with self._lock:
            if self.stopped:
                raise RuntimeError("The checks have been stopped.")
            process = subprocess.Popen(command, start_new_session=True, **arguments)
            self._running.add(process)
        return process

    def ended(self, process: subprocess.Popen) -> None:
        with self._lock:
            self._running.discard(process)

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            running = tuple(self._running)
        with ThreadPoolExecutor() as pool:
            list(pool.map(end_session, running))


def run(
    module: str, name: str, check: Check, args: argparse.Namespace, device: str, left: float, processes: Processes
) -> Entry:
    """Runs one check within its limit and the seconds that are `left`. Returns its result."""
    entry: Entry = {"about": check.about, "status": "", "seconds": 0.0, "limit": check.limit, "rows": [], "said": ""}
    missing = [package for package in check.needs if importlib.util.find_spec(package) is None]
    if missing:
        return entry | {"status": "missing", "said": f"{', '.join(missing)} not installed"}
    if device == "cpu" and not check.cpu:
        return entry | {"status": "not here", "said": "nothing to be seen on a CPU"}
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder, "rows.jsonl"), Path(folder, "log")
        command = [sys.executable, "-m", "benchmarks.gpu.check", module, name, str(rows), "toy" if args.toy else "full"]
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            process = processes.start(command, cwd=ROOT, env=environment(device), stdout=file, stderr=file)
            try:
                code = process.wait(min(check.limit, left))
                cut = ""
            except subprocess.TimeoutExpired:
                cut = "timed out" if check.limit <= left else "out of budget"
            finally:  # also after Ctrl-C, and in case a check that has ended left processes behind
                end_session(process)
                processes.ended(process)
        entry["seconds"] = round(time.monotonic() - started, 1)
        entry["rows"] = [json.loads(line) for line in rows.read_text("utf-8").splitlines()] if rows.exists() else []
        failed = any(row["ok"] is False for row in entry["rows"])
        entry["status"] = cut or ("crashed" if code or not entry["rows"] else "failed" if failed else "passed")
        if entry["status"] != "passed":
            entry["said"] = log.read_text("utf-8", errors="replace")[-20_000:]
    return entry


def end_session(process: subprocess.Popen) -> None:
    """Ends the process and all that it has started. SIGTERM comes first, so that a study can end its runs itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def environment(device: str) -> dict[str, str]:
    """The environment of a check: one device, on which the Trainers of the tests train, and no network."""
    names = {
        "HF_FSAM_TEST_DEVICE": device,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_BUILD_OPS": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        # With several the Trainer would use DataParallel, which is refused.
        "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    }
    if device == "cpu":
        names["OMP_NUM_THREADS"] = "1"
    return os.environ | names


def find_machine(device: str | None, toy: bool) -> dict[str, str]:
    """The device's type and name, and the versions of the packages that matter.

    A process of its own asks for them. If this one opened the GPU, the checks could not use it where a GPU is
    restricted to one process.
    """
    ask = (
        "import json, platform, torch\n"
        "on = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None\n"
        "module = on and torch.get_device_module(on)\n"
        "print(json.dumps([on and on.type, module and module.get_device_name()]))"
    )
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, env=environment(device or ""))
    if found.returncode:
        sys.exit(f"benchmarks.gpu: torch does not start:\n{found.stderr}")
    kind, name = json.loads(found.stdout.splitlines()[-1])
    if device == "cpu":
        if not toy:
            sys.exit("benchmarks.gpu: the checks are of a GPU's size. On a CPU add --toy.")
        kind, name = "cpu", f"CPU {platform.machine()}"
    elif kind is None:
        sys.exit("benchmarks.gpu: torch sees no accelerator. --device cpu --toy tries the checks on the CPU.")
    machine = {"type": kind, "device": name, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            machine[package] = "none"
    return machine


def hash_of_sources() -> str:
    files = [path for folder in ("hf_fsam", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit of the repository, with a "+" if files differ from it."""
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return "no git here"
    return asked.stdout.strip() or "no git here"


def read(out: Path) -> dict[str, Entry]:
    path = out.with_name(f"{out.name}.json")
    return json.loads(path.read_text("utf-8"))["checks"] if path.exists() else {}


def write(out: Path, entries: dict[str, Entry], argv: list[str] | None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)])
    text = json.dumps({"command": command, "checks": entries}, indent=1, ensure_ascii=False)
    for suffix, content in (("json", text), ("md", markdown(entries, command))):
        path = out.with_name(f"{out.name}.{suffix}")
        path.with_suffix(".part").write_text(content + "\n", "utf-8")
        path.with_suffix(".part").replace(path)  # so that the table is complete even if this process is killed


def markdown(entries: dict[str, Entry], command: str) -> str:
    lines = ["| check | result | what | measured | expected | seconds | commit |", "|---|---|---|---|---|---|---|"]
    for name, entry in entries.items():
        first = f"{name} | **{entry['status']}**" if entry["status"] != "passed" else f"{name} | passed"
        last = f"{entry['seconds']:.0f} | {entry['commit']}"
        rows = entry["rows"] or [{"what": entry["about"], "measured": _end(entry["said"]), "expected": "", "ok": None}]
        for row in rows:
            bad = "**" if row["ok"] is False else ""
            cells = (f"{bad}{row['measured']}{bad}", row["expected"])
            lines.append(f"| {first} | {_cell(row['what'])} | {' | '.join(map(_cell, cells))} | {last} |")
            first, last = " | ", " | "
        if entry["rows"] and entry["status"] not in ("passed", "failed"):
            lines.append(f"|  |  | then | {_cell(_end(entry['said']))} |  |  |  |")
    machines = {json.dumps(entry["machine"]): entry["machine"] for entry in entries.values()}
    for machine in machines.values():
        lines += ["", "- " + ", ".join(f"{key} {value}" for key, value in machine.items() if value != "none")]
    return "\n".join([*lines, f"- `{command}`"])


def _end(said: str) -> str:
    """The last line, which is the error if the text ends with a traceback."""
    return (said.strip().splitlines() or [""])[-1][:200]


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list the checks with their time limits")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these checks only")
    parser.add_argument("--redo", nargs="+", default=[], metavar="NAME", help="run these again")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="seconds for all checks together")
    parser.add_argument(
        "--jobs", type=int, default=1, help="checks at a time, but for those that measure time (default: 1)"
    )
    parser.add_argument("--device", choices=["cpu"], help="device (default: the accelerator that PyTorch finds)")
    parser.add_argument("--toy", action="store_true", help="run at a size that a CPU takes minutes for")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument(
        "--wheels",
        nargs="?",
        const="",
        metavar="FREEZE",
        help="print what to download for a machine that has torch, transformers, accelerate, peft and what they need, "
        "or the packages in the file FREEZE, which is its `pip freeze`",
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: at least one check has to run")
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the check is ended, too
    sys.exit(main())
