"""Start processes that train the toy model, and collect what they end with."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]

# `accelerate` and the Trainer take them as they are. "fsdp2" is the Trainer's default version.
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}


def zero(stage: int, persistent: int = 0, **more: Any) -> dict[str, Any]:
    """A DeepSpeed configuration. `more` goes into its ZeRO part where that has such a key, beside it else."""
    parts = ("offload_optimizer", "offload_param", "reduce_bucket_size")
    config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": persistent}
        | {key: more.pop(key) for key in parts if key in more},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own has to be compiled
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    }
    return {"deepspeed": config | more}


CPU = {"device": "cpu", "pin_memory": False}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero0": zero(0),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3, persistent=100),  # biases and norms stay gathered between the passes, matrices do not
    "zero2_offload": zero(2, offload_optimizer=CPU),
    "zero3_offload": zero(3, offload_optimizer=CPU),
    "zero3_offload_all": zero(3, offload_optimizer=CPU, offload_param=CPU),
    "fsdp2": FSDP2,
}


class Shift(nn.Module):
    """Adds its weight to the rows whose turn it is; where there are none, the weight is not in the graph."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 0.1))
        self.turn: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.weight * self.turn[:, None, None] if self.turn.any() else hidden


def gated(model: nn.Module) -> nn.Module:
    """Some rows of :func:`tests.toys.sentences` go through a weight more, as tokens do through an expert: in the first
    six micro-batches of two processes both use it, or one of them."""
    transformer: Any = model.transformer
    transformer.ln_f = nn.Sequential(Shift(transformer.ln_f.weight.numel()), transformer.ln_f)

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        module.transformer.ln_f[0].turn = kwargs["input_ids"][:, 0] > 20

    model.register_forward_pre_hook(look, with_kwargs=True)
    return model


class TokenNorm(nn.BatchNorm1d):
    """Of (B, T, C), over all tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.transpose(1, 2)).transpose(1, 2)


def normed(model: nn.Module) -> nn.Module:
    """A GPT-2 that keeps running statistics."""
    transformer: Any = model.transformer
    transformer.ln_f = nn.Sequential(TokenNorm(transformer.ln_f.weight.numel()), transformer.ln_f)
    return model


def without_labels(rows: list[dict[str, Tensor]], which: Sequence[int]) -> list[dict[str, Tensor]]:
    """The rows, those among them with nothing to learn from."""
    return [
        row | {"labels": torch.full_like(row["labels"], -100)} if index in which else row
        for index, row in enumerate(rows)
    ]


class Trained(NamedTuple):
    """What the first process ends with.

    Attributes:
        weights: by name, whole, as the training holds them.
        masters: the optimizer's float32 copies of them under DeepSpeed; else the same.
        logs: the Trainer's log.
        facts: what else the worker was asked to find out.
    """

    weights: dict[str, Tensor]
    masters: dict[str, Tensor]
    logs: list[dict[str, float]]
    facts: dict[str, Any]


def launch(processes: int, *arguments: str, timeout: int = 300) -> subprocess.CompletedProcess:
    """`python -m arguments` in each of `processes`, on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    surroundings = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "HF_FSAM_TEST_DEVICE": "cpu",
    }
    with subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # not kill: the launcher takes its processes with it
            out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train_distributed(
    folder: Path, processes: int, *cases: dict[str, Any], worker: str = "tests.engines.worker", timeout: int = 300
) -> list[Trained]:
    """One training after the other in the same processes, each with settings of :func:`tests.toys.make_trainer`.

    Beside those, a case may have the keys of the `train` of its worker.

    Raises:
        AssertionError: a process failed; the message is the end of what it said.
    """
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    done = launch(processes, worker, str(folder), timeout=timeout)
    assert done.returncode == 0, done.stderr[-40_000:]
    return [Trained(*torch.load(folder / f"{index}.pt", weights_only=False)) for index in range(len(cases))]
