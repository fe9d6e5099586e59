"""The Docker image: what its Dockerfile promises, what its entry point starts and, as a slow test, the whole build."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parents[2] / "docker"))
import check
import entrypoint

ROOT = Path(__file__).parents[2]
STEPS = check.instructions((ROOT / "Dockerfile").read_text())
NAMES = [name for name, _ in STEPS]
RUNS = [rest for name, rest in STEPS if name == "RUN"]
COPIES = [rest.split() for name, rest in STEPS if name == "COPY"]
DEFAULTS = dict(rest.split("=", 1) for name, rest in STEPS if name == "ARG")
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


def position(name: str, part: str) -> int:
    return next(number for number, (other, rest) in enumerate(STEPS) if other == name and part in rest)


def sources() -> list[str]:
    """What is copied into the image, with the default build arguments."""
    words = [word for *origins, _ in COPIES for word in origins]
    return [re.sub(r"\$\{(\w+)\}", lambda match: DEFAULTS[match[1]], word) for word in words]


# ---- Dockerfile ----


def test_the_base_is_pinned() -> None:
    bases = [rest for name, rest in STEPS if name == "FROM"]
    assert NAMES[0] == "FROM"
    for base in bases:
        assert re.fullmatch(r"[\w./-]+:\d[\w.-]*(@sha256:[0-9a-f]{64})?", base), base


def test_the_image_runs_as_a_user_who_is_not_root() -> None:
    users = [rest for name, rest in STEPS if name == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    assert NAMES.index("ENTRYPOINT") > NAMES.index("USER")
    assert any("useradd" in run and f" {users[-1]} " in run for run in RUNS)


def test_system_packages_leave_no_lists_behind() -> None:
    for run in RUNS:
        assert not re.search(r"apt-get\s+(dist-)?upgrade|\bsudo\b|curl .*\|", run)
        if "apt-get install" in run:
            assert "apt-get update" in run  # in one layer, or a cached list of packages goes stale
            assert "--no-install-recommends" in run
            assert run.rstrip().endswith("rm -rf /var/lib/apt/lists/*")


def test_python_packages_are_pinned_and_not_cached() -> None:
    installs = [run for run in RUNS if "pip install" in run]
    assert len(installs) == 3
    for run in installs:
        assert run.count("pip install --no-cache-dir") == run.count("pip install")
        assert "-c /opt/constraints.txt" in run


def test_files_that_change_often_are_copied_last() -> None:
    order = [
        position("RUN", "apt-get install"),
        position("COPY", "${CONSTRAINTS}"),
        position("RUN", "constraints.txt torch"),
        position("COPY", "pyproject.toml"),
        position("RUN", "requirements.txt"),
        position("COPY", "hf_fsam"),
        position("COPY", "recipes"),
    ]
    assert order == sorted(order)


def test_copied_files_exist_and_are_in_the_context() -> None:
    patterns = check.ignore_patterns()
    for source in [*sources(), "constraints.txt"]:
        assert (ROOT / source).exists(), source
        assert not check.ignored(source, patterns), source


@pytest.mark.parametrize(
    "path", [".git", ".venv/bin/python", "outputs/x", "tests/toys.py", "hf_fsam/__pycache__/a.pyc", ".env"]
)
def test_files_that_the_image_does_not_need_stay_out_of_the_context(path: str) -> None:
    assert check.ignored(path, check.ignore_patterns())


def test_ignore_patterns_are_read_as_docker_reads_them() -> None:
    assert check.ignored("a/b", ["a"])
    assert not check.ignored("b/a", ["a"])
    assert check.ignored("b/a", ["**/a"])
    assert not check.ignored("a/b", ["*", "!a"])
    assert check.ignored("a/c/b", ["*", "!a", "**/c"])


def test_comments_and_continued_lines_are_read_as_docker_reads_them() -> None:
    assert check.instructions("# a\nFROM x:1\n\nrun a \\\n# b\n  && c\n") == [("FROM", "x:1"), ("RUN", "a   && c")]


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
    assert Version(pins["nvidia-cuda-runtime"]).major == 13  # as the base image


# ---- Entry point ----


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_finds_its_recipe(config: Path) -> None:
    # Each names its own command in its first lines.
    assert f"recipes/{entrypoint.recipe_of(config)} recipes/configs/{config.name}" in config.read_text()


def test_one_process_for_each_gpu(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model_name_or_path: somewhere\n")
    argv = [str(config), "--seed", "1"]
    script = str(ROOT / "recipes" / "finetune.py")
    for gpus in (0, 1):
        assert entrypoint.command(argv, gpus) == [sys.executable, script, *argv]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    assert entrypoint.command(argv, 4) == [sys.executable, *launcher, script, *argv]


@pytest.mark.parametrize("text", ["", "seed: 1", "- architecture", "architecture: llama\nmodel_name_or_path: x"])
def test_a_configuration_of_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    config = tmp_path / "pretrain.yaml"  # a name says nothing
    config.write_text(text)
    with pytest.raises(ValueError, match=r"architecture or model_config for pretrain\.py.*model_name_or_path"):
        entrypoint.recipe_of(config)


def test_a_mistake_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"(?s)'absent\.yaml' does not exist.*recipes/configs/pretrain_tiny\.yaml"):
        entrypoint.main(["absent.yaml"])
    for argv in ([], ["--help"]):
        entrypoint.main(argv)
        assert "usage: docker run" in capsys.readouterr().out


def test_a_read_only_output_folder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SystemExit, match=r"outputs/ cannot be written by user .* --build-arg UID"):
        entrypoint.main([str(CONFIGS[0])])


# ---- The build ----


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("debootstrap") is None, reason="needs root and debootstrap")
def test_the_image_builds_and_trains() -> None:
    subprocess.run([sys.executable, ROOT / "docker" / "check.py"], check=True)
