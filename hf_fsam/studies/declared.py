"""What a recipe says of itself, so that a mistyped name is found before the first run of a study.

A recipe may have the variables SETTINGS, the dataclasses whose fields its settings are, and METRICS, the names of the
metrics in its results, where `*` stands for any text. Without them a name is taken as it is.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from hf_fsam.mistakes import did_you_mean
from hf_fsam.studies.study import Study

# What the Trainer and this package log by themselves.
_LOGGED = ("loss", "grad_norm", "learning_rate", "epoch", "step", "total_flos", "train_loss", "train_runtime", "fsam/*")
_TELL = """
import json, runpy, sys
from dataclasses import fields
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
said = runpy.run_path(sys.argv[1])
print(json.dumps([[each.name for kind in said["SETTINGS"] for each in fields(kind)], list(said.get("METRICS", ()))]))
"""


def check_names(study: Study) -> None:
    """
    Raises:
        ValueError: a setting or a metric of the study is unknown to its recipe.
    """
    for path in {arm.recipe.path for arm in study.arms.values() if not arm.recipe.unedited}:
        settings, metrics = _declared(path)
        if settings:
            check_settings(study, path, settings)
        if metrics:
            check_metrics(study, path, metrics)


def check_settings(study: Study, recipe: Path, known: Sequence[str]) -> None:
    for arm in study.arms.values():
        for name in {**study.settings, **arm.settings} if arm.recipe.path == recipe else ():
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(f"{study.path}: {arm.name}: {name!r} is no setting of {recipe.name}.{hint}")


def check_metrics(study: Study, recipe: Path, metrics: Sequence[str]) -> None:
    lowest = (f"best_{name}" for name in metrics if name.startswith("eval_") and name.endswith("loss"))
    known = [*metrics, *lowest, *_LOGGED]
    for name in study.measured:
        if not any(fnmatchcase(name, each) for each in known):
            hint = did_you_mean(name, known)
            raise ValueError(
                f"{study.path}: {name!r} is no metric of {recipe.name}, which has {', '.join(metrics)}.{hint}"
            )


def _declared(recipe: Path) -> tuple[list[str], list[str]]:
    """The names of its settings and metrics, both empty where it does not say. Another process imports it."""
    assigned = [
        target.id
        for node in ast.parse(recipe.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    if "SETTINGS" not in assigned:
        return [], []
    told = subprocess.run([sys.executable, "-c", _TELL, str(recipe)], capture_output=True, text=True, check=False)
    if told.returncode != 0:
        return [], []  # the first run will say why
    settings, metrics = json.loads(told.stdout.splitlines()[-1])
    return settings, metrics
