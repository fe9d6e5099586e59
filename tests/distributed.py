"""Start processes that train the toy model, and collect what they end with."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def train_distributed(folder: Path, processes: int, **settings: Any) -> tuple[dict, list, int]:
    """Weights, log and number of processes after training with `settings` (of :func:`tests.toys.make_trainer`).

    Raises:
        AssertionError: a process failed; the message is the end of what it said.
    """
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "tests.distributed_worker", str(folder), json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(folder / "out.pt", weights_only=False)
