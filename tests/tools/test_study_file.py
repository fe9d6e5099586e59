"""What the file of a study may say, which mistakes are named before the first run, and the repository's own studies."""

import importlib.util
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_fsam.studies.compare import main
from hf_fsam.studies.declared import check_metrics, check_settings
from hf_fsam.studies.study import load_studies
from tests.tools.studies import RECIPE, called, compare, run, study_of, write_study

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "recipes" / "studies").glob("*.yaml"))


def test_a_study_extends_another(folder: Path) -> None:
    write_study(folder, settings={"max_steps": 3, "sleep": 0}, metrics=["eval_loss", "test_loss"], baseline="FSAM")
    path = folder / "other.yaml"
    path.write_text(yaml.safe_dump({"extends": "study.yaml", "settings": {"max_steps": 4}, "metrics": ["test_loss"]}))
    (other,) = load_studies(path)
    assert (other.name, other.settings, other.metrics) == ("other", {"max_steps": 4, "sleep": 0}, ["test_loss"])
    assert (list(other.arms), other.baseline, other.seeds) == (["AdamW", "FSAM"], "FSAM", [0, 1])
    path.write_text(yaml.safe_dump({"extends": "study.yaml", "arms": ["AdamW"], "baseline": "AdamW"}))
    (fewer,) = load_studies(path)
    assert list(fewer.arms) == ["AdamW"]
    path.write_text(yaml.safe_dump({"extends": "study.yaml", "arms": ["SGD"]}))
    with pytest.raises(ValueError, match=r"'SGD' is not in study\.yaml, which has 'AdamW', 'FSAM'"):
        list(load_studies(path))
    path.write_text(yaml.safe_dump({"extends": "third.yaml"}))
    (folder / "third.yaml").write_text(yaml.safe_dump({"extends": path.name}))
    with pytest.raises(ValueError, match=f"extends: {path.name} → third.yaml → {path.name} is a circle"):
        list(load_studies(path))


def test_longer_multiplies_the_length_in_the_settings(folder: Path) -> None:
    arms = {"A": {"fsam_variant": "none"}, "A2": {"like": "A", "longer": 2}, "A3": {"like": "A2", "longer": 1.5}}
    study = study_of(folder, arms=arms, settings={"max_steps": 10, "warmup_steps": 1}, seeds=[0])
    rows = run(study, folder)
    assert [row["settings"]["max_steps"] for row in rows] == [10, 20, 30]
    assert [row["settings"]["warmup_steps"] for row in rows] == [1, 2, 3]
    assert "longer" not in rows[1]["settings"]
    study = study_of(folder, arms=arms, settings={"max_steps": -1, "num_train_epochs": 1, "warmup_steps": 0.1})
    (settings,) = study.arms["A3"].candidates(study.settings)
    assert settings["num_train_epochs"] == 1.5  # not whole, and not none
    assert (settings["max_steps"], settings["warmup_steps"]) == (-1, 0.1)  # no length, a share
    study = study_of(folder, arms=arms, settings={"max_steps": None, "num_train_epochs": 1, "warmup_steps": None})
    assert study.arms["A2"].candidates(study.settings)[0]["num_train_epochs"] == 2
    assert study.total_weight() > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"recipe": "nowhere.py"}, "recipe: .*nowhere.py does not exist"),
        ({"seedz": [1]}, "'seedz' is not a key of a study"),
        ({"arms": {}}, "needs the key 'arms'"),
        ({"baseline": "Adam"}, "baseline: 'Adam' is not an arm; there are 'AdamW', 'FSAM'"),
        ({"arms": {"A": {"like": "B"}, "B": {"like": "A"}}}, "in a circle"),
        ({"arms": {"A": {"like": "C"}}}, "A: like: 'C' is not an arm"),
        ({"seeds": [0.5]}, r"seeds=\[0.5\] is not a list of whole numbers"),
        ({"tuning_seeds": [0]}, r"tuning_seeds=\[0\] and seeds=\[0, 1\] overlap"),
        ({"arms": {"A": {"fsam_rho": [0.1, -1]}}}, "fsam_rho=-1 is not a radius"),
        ({"arms": {"A": {"fsam_variant": "vanilla"}}}, "fsam_variant='vanilla' is unknown"),
        ({"arms": {"A": {"fsam_rho": []}}}, "fsam_rho has no candidates"),
        ({"arms": {"A": {"passes": "two"}}}, "passes='two' is not a number above 0"),
        ({"arms": {"A": {"longer": 0}}}, "longer=0 is not a number above 0"),
        ({"arms": {"A": {"longer": 2}}}, "A: longer=2 needs max_steps or num_train_epochs"),
        (
            {"arms": {"A": {"longer": 2, "num_train_epochs": [3, 6]}}},
            r"A: longer=2 does not multiply the values of num_train_epochs=\[3, 6\].* leave `longer` out",
        ),
        ({"arms": {"A": {"fsam_rh": 0.1}}}, "A: 'fsam_rh' is none of fsam_"),
        ({"arms": {"A": "none"}}, "A is str, not a mapping"),
        ({"arms": ["A", "B"]}, "arms is list, not a mapping"),
        ({"settings": [1]}, "settings is list, not a mapping"),
        ({"metrics": "eval_loss"}, "metrics='eval_loss' is not a list"),
        ({"extends": "../study.yaml"}, "extends='../study.yaml' is not the name of a file beside it"),
        (
            {"tune_on": "eval_accuracy"},
            "tune_on='eval_accuracy' and 'eval_loss', .* are not better in the same direction",
        ),
        ({"config": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ({"arms": {"A": {"seed": 3}}}, "'seed' is set by `compare` for every run: list them under `seeds`"),
    ],
)
def test_mistakes_are_named_before_the_first_run(
    folder: Path, keys: dict[str, Any], message: str, capsys: pytest.CaptureFixture
) -> None:
    write_study(folder, **keys)
    with pytest.raises(SystemExit) as ended:
        compare(folder)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert re.search(message, told)
    assert len(told.splitlines()) == 1
    assert not called(folder)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"arms": {"A": {}, "B": {"rat": 1}}}, r"B: 'rat' is no setting of recipe\.py\. Did you mean 'rate'\?"),
        (
            {"arms": {"A": {}}, "metrics": ["eval_los"], "greater_is_better": False},
            r"'eval_los' is no metric of .* Did you mean 'eval_loss'",
        ),
    ],
)
def test_names_that_a_recipe_does_not_have_are_told_before_its_first_run(
    folder: Path, keys: dict[str, Any], message: str
) -> None:
    declares = "from dataclasses import make_dataclass\n"
    declares += "SETTINGS = (make_dataclass('Settings', ['rate', 'sleep']),)\nMETRICS = ('eval_loss', 'test_loss')\n"
    guarded = "if __name__ == '__main__':\n" + "\n".join(f"    {line}" for line in RECIPE.splitlines())
    (folder / "recipe.py").write_text(declares + guarded)
    with pytest.raises(ValueError, match=message):
        run(study_of(folder, seeds=[0], **keys), folder)
    assert not called(folder)
    good = study_of(folder, seeds=[0], arms={"A": {"rate": 1}}, metrics=["best_eval_loss", "test_loss"])
    assert run(good, folder)
    assert len(called(folder)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rate", "1"], "--learning_rate would apply to all arms, but AdamW set it"),
        (["--parallel", "2", "--launch", "torchrun"], "--parallel with --launch"),
        (["--seed", "1"], "'seed' is set by `compare` for every run: list them under `seeds`, or use --seeds"),
        (["--output_dir", "here"], "'output_dir' is set by `compare` for every run: use --out"),
    ],
)
def test_options_without_effect_or_with_harm_are_refused(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    write_study(folder)
    with pytest.raises(SystemExit) as error:
        compare(folder, *options)
    assert message in str(error.value) + capsys.readouterr().err
    assert not called(folder)


def test_the_study_comes_before_its_options(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--max_steps", "20", str(write_study(folder))])
    assert "20 does not exist: the study's YAML file comes before other settings" in capsys.readouterr().err


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_repository_is_accepted_by_its_recipe(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All candidates of all arms go through the recipe's own parser."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import config as recipe_config

    studies = list(load_studies(path))
    parsed: list[tuple] = []

    class Parsed(Exception):
        pass

    original = recipe_config.parse
    monkeypatch.setattr(recipe_config, "parse", lambda *args: stop(*args))

    def stop(*args: Any) -> tuple:
        parsed.append(original(*args))
        raise Parsed

    for study in studies:
        assert study.question
        assert len(study.seeds) >= 3
        chosen: dict[str, dict] = {}
        for arms in study.tuning_order():
            for arm in arms:
                candidates = arm.candidates(chosen[arm.like] if arm.like else study.settings)
                chosen[arm.name] = candidates[0]
                script = arm.recipe.path
                for name in ("pretrain", "finetune"):
                    monkeypatch.delitem(sys.modules, name, raising=False)
                spec = importlib.util.spec_from_file_location(f"studied_{script.stem}", script)
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                check_settings(study, script, [each.name for kind in module.SETTINGS for each in fields(kind)])
                check_metrics(study, script, module.METRICS)
                if hasattr(module, "quantizations"):  # they need torchao, the parser does not
                    monkeypatch.setattr(module, "quantizations", dict)
                for settings in candidates:
                    file = tmp_path / "run.json"
                    here = {"seed": 1, "output_dir": str(tmp_path / "x"), "use_cpu": True, "bf16": False}
                    file.write_text(json.dumps(settings | here))
                    with pytest.raises(Parsed):
                        module.run([str(file)])
    assert parsed
