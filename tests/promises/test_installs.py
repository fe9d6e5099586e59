"""What `pip install` brings is enough, for the package alone and for each extra."""

import os
import re
import subprocess
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tools.studies import RECIPE, write_study

ROOT = Path(__file__).parents[2]
A_SCRIPT = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]


def needed(requirement: Requirement, found: dict[tuple[str, str], metadata.Distribution]) -> None:
    """Fills `found` with what pip installs for `requirement`, by name and extra."""
    distribution = metadata.distribution(requirement.name)
    for extra in ("", *requirement.extras):
        key = (canonicalize_name(requirement.name), extra)
        if key in found:
            continue
        found[key] = distribution
        for line in distribution.requires or ():
            more = Requirement(line)
            if more.marker is None or more.marker.evaluate({"extra": extra}):
                needed(more, found)


def make_environment(folder: Path, extra: str) -> None:
    """Makes a virtual environment that has what hf_fsam and its `extra` need, by links to what is installed."""
    found: dict[tuple[str, str], metadata.Distribution] = {}
    needed(Requirement(f"hf-fsam[{extra}]" if extra else "hf-fsam"), found)
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for distribution in found.values():
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__", "hf_fsam"}:
            if not name.endswith(".pth") and not (packages / name).is_symlink():
                (packages / name).symlink_to(str(distribution.locate_file(name)))
    (packages / "hf_fsam").symlink_to(ROOT / "hf_fsam")


def run(folder: Path, extra: str, *program: str) -> str:
    python = folder / "venv/bin/python"
    if not python.exists():
        make_environment(folder / "venv", extra)
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, *program], env={**alone, "OMP_NUM_THREADS": "1"}, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_only_what_is_needed_is_there(tmp_path: Path) -> None:
    find = "from importlib.util import find_spec; print(*map(bool, map(find_spec, ['torch', 'deepspeed', 'peft'])))"
    assert run(tmp_path, "", "-c", find).strip() == "True False False"


def test_the_package_alone_trains(tmp_path: Path) -> None:
    assert run(tmp_path, "", "-c", A_SCRIPT).count("weights moved by 0.10") == 3


def test_the_package_alone_runs_a_script(tmp_path: Path) -> None:
    plain = A_SCRIPT.replace("hf_fsam", "transformers").replace("FSAM", "").replace("fsam_rho=0.1, ", "")
    (tmp_path / "train.py").write_text(plain, encoding="utf-8")
    printed = run(tmp_path, "", "-m", "hf_fsam", "run", "--fsam_rho", "0.2", "train.py")
    assert printed.count("weights moved by 0.20") == 3


def test_studies_brings_what_a_study_needs(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(RECIPE, encoding="utf-8")
    write_study(tmp_path)
    run(tmp_path, "studies", "-m", "hf_fsam", "compare", "study.yaml", "--out", "out")
    assert "FSAM" in (tmp_path / "out/study.md").read_text(encoding="utf-8")
    assert (tmp_path / "out/study.png").stat().st_size


TINY = ["--layers=1", "--hidden_size=32", "--intermediate_size=64", "--heads=2", "--vocab_size=512"]
TINY += ["--corpus_max_bytes=400000", "--validation_fraction=0.2"]
FEW = ["--max_steps=2", "--eval_steps=2", "--validation_blocks=8", "--use_cpu=True"]


def test_recipes_brings_what_the_recipes_need(tmp_path: Path) -> None:
    cache = f"--cache_dir={tmp_path / 'cache'}"
    script, settings = str(ROOT / "recipes/pretrain.py"), str(ROOT / "recipes/configs/pretrain_tiny.yaml")
    run(tmp_path, "recipes", script, settings, "--output_dir=base", cache, *TINY, *FEW)
    for name, config in {"finetune": "finetune_topics", "sft": "sft_docstrings"}.items():
        script, settings = str(ROOT / f"recipes/{name}.py"), str(ROOT / f"recipes/configs/{config}.yaml")
        model = ["--model_name_or_path=base", f"--output_dir={name}"]
        run(tmp_path, "recipes", script, settings, *model, cache, *FEW)
        assert (tmp_path / name / "results.json").stat().st_size
