"""A recipe that takes no time, and the studies of it that the tests of `hf-fsam compare` write and run."""

import json
from pathlib import Path
from typing import Any

import yaml

from hf_fsam.studies.compare import main, run_study
from hf_fsam.studies.runner import Runner
from hf_fsam.studies.study import Study, load_studies

# A recipe that takes no time. Its loss is a parabola in the learning rate and in ρ, with noise that follows the seed.
RECIPE = """
import json, sys, time
from dataclasses import fields
from pathlib import Path
settings = json.loads(Path(sys.argv[1]).read_text())
folder = Path(settings["output_dir"])
with (Path(__file__).parent / "called.txt").open("a") as file:
    file.write(json.dumps(settings) + "\\n")
time.sleep(settings.get("sleep", 0))
if settings.get("fail"):
    sys.exit("no such optimizer")
rate, rho = settings.get("learning_rate", 1), settings.get("fsam_rho", 0)
loss = 2 + (rate - 3) ** 2 + (rho - 0.2) ** 2 + 0.1 * settings["seed"]
if settings.get("diverge"):
    loss = float("nan")
steps = settings.get("max_steps", 2)
history = [{"step": 1, "eval_loss": loss - 1}, {"step": steps, "eval_loss": loss}]
metrics = {"eval_loss": loss, "test_loss": 100 - loss}
results = {"metrics": metrics, "history": history, "steps": steps, "train_seconds": 2.0}
(folder / "results.json").write_text(json.dumps(results))
"""

ARMS = {
    "AdamW": {"fsam_variant": "none", "learning_rate": [1, "3e0", 5]},
    "FSAM": {"like": "AdamW", "fsam_variant": "functional", "fsam_rho": [0.1, 0.2]},
}


def write_study(folder: Path, **keys: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"recipe": "recipe.py", "arms": ARMS, "seeds": [0, 1], **keys}, sort_keys=False))
    return path


def study_of(folder: Path, **keys: Any) -> Study:
    (study,) = load_studies(write_study(folder, **keys))
    return study


def called(folder: Path) -> list[dict[str, Any]]:
    path = folder / "called.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def compare(folder: Path, *argv: str) -> None:
    main([str(folder / "study.yaml"), "--out", str(folder / "out"), *argv])


def run(study: Study, folder: Path, **options: Any) -> list[dict[str, Any]]:
    with Runner(study, folder / "out", **options) as runner:
        return run_study(study, runner)
