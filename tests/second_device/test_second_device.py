"""Checks on a stand-in for an accelerator, of what a CPU cannot show: which tensors are on the wrong device, and where
the host would wait. `tests/second_device/device.cpp` is that device; a machine without a compiler skips these tests.

The device changes torch for a whole process, so each file of checks runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.second_device.compiled import missing

ROOT = Path(__file__).parents[2]
CHECKS = sorted((ROOT / "tests" / "second_device").glob("check_*.py"))


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("checks", CHECKS, ids=lambda path: path.stem)
def test_the_checks_pass_on_a_second_device(checks: Path, tmp_path: Path) -> None:
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}", str(checks)]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=550)
    if done.returncode != 0:
        pytest.fail(f"{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}", pytrace=False)
