"""The Docker image: its base, its pins, what its entry point starts, and what a stopped training leaves behind.

docker/check.sh builds and runs the image itself.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parents[2] / "docker"))
import entrypoint

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


# ---- Dockerfile ----


def test_the_base_is_pinned_and_process_1_hands_signals_on() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^FROM (.+)$", text, re.MULTILINE) == re.findall(r"\S+:\d\S+@sha256:[0-9a-f]{64}", text)
    assert re.search(r'^ENTRYPOINT \["tini", "--", "python",', text, re.MULTILINE)


# ---- Constraints ----


def test_the_constraints_pin_the_packages_of_pyproject() -> None:
    lines = (ROOT / "docker" / "constraints-gpu.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = [Requirement(text) for text in requires("hf-fsam") or []]
    extras = ("recipes", "studies", "deepspeed")
    wanted = [
        requirement
        for requirement in wanted
        if requirement.name != "hf-fsam"  # one extra in another
        and (not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in extras))
    ]
    assert {"torch", "deepspeed", "datasets"} <= {requirement.name for requirement in wanted}
    for requirement in wanted:
        assert requirement.specifier.contains(pins[requirement.name]), requirement


# ---- Entry point ----


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_finds_its_recipe(config: Path) -> None:
    # Each names its own command in its first lines.
    assert f"recipes/{entrypoint.recipe_of(config)} recipes/configs/{config.name}" in config.read_text()


def test_one_process_for_each_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model_name_or_path: somewhere\n")
    recipe = [str(ROOT / "recipes" / "finetune.py"), str(config), "--enable_jit_checkpoint=true", "--seed", "1"]
    launch = str(ROOT / "recipes" / "launch" / "torchrun.sh")
    argv = [str(config), "--seed", "1"]
    for gpus in (0, 1):
        assert entrypoint.recipe_command(argv, gpus) == [sys.executable, *recipe]
    assert entrypoint.recipe_command(argv, 4) == [launch, *recipe]
    monkeypatch.setenv("NNODES", "2")
    assert entrypoint.recipe_command(argv, 1) == [launch, *recipe]


@pytest.mark.parametrize("text", ["", "seed: 1", "method: ppo"])
def test_a_configuration_of_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    config = tmp_path / "pretrain.yaml"  # a name says nothing
    config.write_text(text)
    with pytest.raises(
        ValueError, match=r"architecture or model_config for pretrain\.py.*model_name_or_path.*hf-fsam compare"
    ):
        entrypoint.recipe_of(config)


def test_a_mistake_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"(?s)'absent\.yaml' does not exist.*recipes/configs/pretrain_tiny\.yaml"):
        entrypoint.main(["absent.yaml"])
    with pytest.raises(SystemExit, match=r"(?s)'pretrain_tiny' is neither a configuration.*nor a command.*usage:"):
        entrypoint.main(["pretrain_tiny"])
    for argv in ([], ["--help"]):
        entrypoint.main(argv)
        assert "usage: docker run" in capsys.readouterr().out


def test_anything_but_a_configuration_is_a_command() -> None:
    started = subprocess.run([sys.executable, entrypoint.__file__, "sh", "-c", "exit 7"], check=False)
    assert started.returncode == 7


def test_a_token_of_the_command_line_is_not_printed() -> None:
    command = [sys.executable, entrypoint.__file__, "echo", "--hub_token", "hf_1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed == "+ echo --hub_token '<HUB_TOKEN>'\n--hub_token hf_1\n"


def test_a_read_only_output_folder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SystemExit, match=r"outputs/ cannot be written by user .* --user"):
        entrypoint.main([str(CONFIGS[0])])


# ---- docker stop ----


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.skipif(shutil.which("tini") is None or os.geteuid() != 0, reason="needs root and tini")
def test_a_stopped_container_leaves_a_checkpoint(processes: int, tmp_path: Path) -> None:
    """As `docker stop` does it: SIGTERM goes to process 1 of a PID namespace."""
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "tini", "--", sys.executable]
    recipe = f"{ROOT}/recipes/configs/pretrain_tiny.yaml --use_cpu true --max_steps 100000 --logging_steps 1"
    tiny = "--hidden_size 16 --layers 1 --heads 2 --vocab_size 300 --sequence_length 16 --validation_blocks 4"
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    if processes > 1:
        environment["PROCESSES"] = str(processes)
    started = subprocess.Popen(
        [*container, entrypoint.__file__, *recipe.split(), *tiny.split(), "--disable_tqdm=true", "--eval_strategy=no"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    try:
        while "'loss'" not in said:  # until the first step
            line = started.stdout.readline()
            assert line, said
            said += line
        first = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text()
        os.kill(int(first), signal.SIGTERM)
        said += started.communicate(timeout=300)[0]
    finally:
        started.kill()
    (saved,) = tmp_path.glob("outputs/pretrain_tiny/checkpoint-*")
    assert (saved / "trainer_state.json").is_file(), said  # the Trainer writes it last
    assert len(list(saved.glob("rng_state*.pth"))) == processes
