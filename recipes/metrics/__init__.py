"""Metric modules for `evaluate` that come with the recipes, so that no run has to download one."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluate import EvaluationModule

ROOT = Path(__file__).parent
NAMES = tuple(sorted(path.parent.name for path in ROOT.glob("*/__init__.py")))


def load(name: str) -> "EvaluationModule":
    """`evaluate.load` on the module of this name; the values stay in memory, so processes share no file.

    Raises:
        ImportError: `evaluate` is not installed.
        ValueError: no metric of this name ships with the recipes.
    """
    if name not in NAMES:
        raise ValueError(f"The metric {name!r} is none of the recipes: choose one of {', '.join(NAMES)}.")
    try:
        import evaluate  # optional: training needs no metric
    except ImportError as error:
        raise ImportError("The metrics need `evaluate`: pip install 'hf-fsam[recipes]'.") from error
    return evaluate.load(str(ROOT / name / f"{name}.py"), keep_in_memory=True)
