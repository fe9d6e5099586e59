"""The files of recipes/launch: two nodes end where one does, and every launcher starts what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch import Tensor

from hf_fsam.engines.deepspeed import FlatDeepSpeedEngine, ShardedDeepSpeedEngine, select_deepspeed_engine
from tests.toys import distance

pytest.importorskip("deepspeed", reason="pip install hf-fsam[deepspeed]")

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "launch"
RECIPE = ["recipes/pretrain.py", "recipes/configs/pretrain_tiny.yaml"]
TINY: dict[str, Any] = {
    "corpus_max_bytes": 400_000,
    "validation_fraction": 0.2,
    "validation_blocks": 8,
    "sequence_length": 32,
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 1,
    "heads": 2,
    "max_steps": 3,
    "eval_strategy": "no",
    "warmup_steps": 0,
    "per_device_train_batch_size": 2,
    "fsam_rho": 0.2,
    "adam_epsilon": 1e-3,
    "use_cpu": True,
}


def environment(**variables: Any) -> dict[str, str]:
    venv = str(Path(sys.executable).parent)
    names = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{venv}:{os.environ['PATH']}"}
    return os.environ | names | {name: str(value) for name, value in variables.items()}


def run_nodes(script: str, output: Path, nodes: int, processes: int, port: int, *more: str, **variables: Any) -> None:
    """The script on every "node", all of them on this machine."""
    line = [f"--{name}={value}" for name, value in TINY.items()]
    line += [f"--output_dir={output}", f"--cache_dir={output.parent / 'cache'}", *more]
    agents = [
        subprocess.Popen(
            [str(LAUNCH / script), *RECIPE, *line],
            cwd=ROOT,
            env=environment(NNODES=nodes, NODE_RANK=node, PROCESSES=processes, MASTER_PORT=port, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(nodes)
    ]
    try:
        said = [agent.communicate(timeout=400)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    for agent, text in zip(agents, said, strict=True):
        assert agent.returncode == 0, text[-6000:]


def trained(output: Path, processes: int) -> dict[str, Tensor]:
    results = json.loads((output / "results.json").read_text())
    assert results["machine"]["processes"] == processes
    return load_file(output / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_nodes_of_two_end_where_one_of_four_does(stage: str, tmp_path: Path) -> None:
    """Two launch agents on one machine, as on two nodes; through the pretraining recipe."""
    flags = ["--deepspeed", f"recipes/launch/{stage}.json"]
    run_nodes("torchrun.sh", tmp_path / "one", 1, 4, 29631, *flags)
    run_nodes("torchrun.sh", tmp_path / "two", 2, 2, 29632, *flags)
    one, two = (trained(tmp_path / name, 4) for name in ("one", "two"))
    assert distance(two, one) < 1e-6


@pytest.mark.slow
def test_accelerate_starts_deepspeed(tmp_path: Path) -> None:
    run_nodes("accelerate.sh", tmp_path / "run", 1, 2, 29634, ENGINE="zero2")
    trained(tmp_path / "run", 2)


@pytest.mark.slow
def test_the_deepspeed_launcher_reads_the_hostfile(tmp_path: Path) -> None:
    """Of one node, which it asks for by ssh (a stand-in here) and then starts by itself."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / "ssh").write_text("#!/usr/bin/env bash\necho 127.0.0.1\n")
    (tmp_path / "ssh").chmod(0o755)
    path = f"{tmp_path}:{environment()['PATH']}"
    flags = ["--deepspeed", "recipes/launch/zero2.json"]
    run_nodes("deepspeed.sh", tmp_path / "run", 1, 2, 29635, *flags, HOSTFILE=tmp_path / "hosts", PATH=path)
    trained(tmp_path / "run", 2)


def test_slurm_starts_one_torchrun_a_node(tmp_path: Path) -> None:
    """With stand-ins for srun, which runs a task a node, and scontrol."""
    tasks = 'while [[ "$1" == --* ]]; do shift; done; for id in 0 1; do SLURM_NODEID=$id "$@"; done'
    programs = {
        "srun": tasks,
        "scontrol": "printf 'first\\nsecond\\n'",
        "python": 'echo "$@"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    surroundings = environment(SLURM_NNODES=2, SLURM_JOB_NODELIST="x", SLURM_JOB_ID=7)
    surroundings["PATH"] = f"{tmp_path}:{surroundings['PATH']}"
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "a recipe.py", "--x=1"],
        cwd=ROOT,
        env=surroundings,
        capture_output=True,
        text=True,
        check=True,
    )
    shared = "--nproc_per_node=gpu --master_addr=first --master_port=20007 a recipe.py --x=1"
    assert done.stdout.splitlines() == [
        f"-m torch.distributed.run --nnodes=2 --node_rank={node} {shared}" for node in (0, 1)
    ]


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_the_deepspeed_configurations_are_supported(name: str) -> None:
    config = json.loads((LAUNCH / f"{name}.json").read_text())
    args = SimpleNamespace(fsam_ascent_scope="micro_batch", fsam_precondition=True)
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    engine = select_deepspeed_engine(args, SimpleNamespace(state=state))
    assert type(engine) is (FlatDeepSpeedEngine if name == "zero2" else ShardedDeepSpeedEngine)


@pytest.mark.parametrize("path", sorted((LAUNCH / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path: Path) -> None:
    config = load_config_from_file(str(path))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == kinds.get(path.stem, "DEEPSPEED")
    if config.distributed_type == "DEEPSPEED":
        assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()
