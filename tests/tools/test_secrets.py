"""Secrets of a study reach its runs, and no file and no output."""

import json
import sys
from pathlib import Path

import pytest

from hf_fsam import FSAMTrainingArguments
from hf_fsam.studies.masking import masked, masked_command
from tests.tools.studies import called, compare, write_study

ROOT = Path(__file__).parents[2]
SECRET = "hf_0deadbeef1e5"
GIVEN = [
    ["--hub_token", SECRET],
    [f"--hub_token={SECRET}"],
    ["--api-key", SECRET, "--password", "0123456"],
    ["--tracker", json.dumps({"token": SECRET, "url": "here"})],
    ["--launch", f"env WANDB_API_KEY={SECRET} {sys.executable}"],
]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: given[0])
def test_secrets_reach_the_run_but_no_file_and_no_output(
    folder: Path, given: list[str], capfd: pytest.CaptureFixture
) -> None:
    write_study(folder, arms={"A": {}, "B": {"learning_rate": [1, 2]}}, seeds=[0])
    compare(folder, *given, "--keep")
    assert sum(SECRET in json.dumps(each) for each in called(folder)) == (0 if "--launch" in given else 4)
    if "--password" in given:
        assert {each["password"] for each in called(folder)} == {"0123456"}  # not the number that YAML reads there
    (folder / "called.txt").unlink()
    compare(folder, *given)
    assert not called(folder)  # the runs are recognized
    shown = capfd.readouterr()
    assert "_TOKEN>" in shown.out or "KEY>" in shown.out or "<TOKEN>" in shown.out
    for text in (shown.out, shown.err, *everything(folder / "out")):
        assert SECRET not in text
        assert "0123456" not in text


def everything(folder: Path) -> list[str]:
    return [path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()]


def test_secrets_in_the_yaml_files_reach_no_file_and_no_output(folder: Path, capfd: pytest.CaptureFixture) -> None:
    (folder / "config.yaml").write_text(f"push_to_hub_token: {SECRET}\nsub: {{secret_key: '5e5'}}\n")
    arms = {"A": {"hub_token": SECRET}, "B": {"access_token": ["one-token", "another-token"], "learning_rate": [2, 3]}}
    write_study(folder, config="config.yaml", arms=arms, seeds=[0])
    compare(folder)
    assert {each["push_to_hub_token"] for each in called(folder)} == {SECRET}
    assert {each["sub"]["secret_key"] for each in called(folder)} == {"5e5"}
    assert {each.get("access_token") for each in called(folder)} == {None, "one-token", "another-token"}
    shown = capfd.readouterr()
    assert "learning_rate 3!" in shown.out  # candidates differ though their masked records are equal
    for text in (shown.out, shown.err, *everything(folder / "out")):
        assert SECRET not in text
        assert "one-token" not in text


def test_a_run_that_fails_shows_no_secret(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "recipe.py").write_text("import sys; sys.exit('refused: ' + open(sys.argv[1]).read())")
    write_study(folder, settings={"hub_token": SECRET}, seeds=[0])
    with pytest.raises(SystemExit):
        compare(folder)
    told = capsys.readouterr().err
    assert "<HUB_TOKEN>" in told
    assert SECRET not in told
    assert not any(SECRET in text for text in everything(folder / "out"))


def test_results_of_the_recipes_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import config as recipe_config
    import report

    args = FSAMTrainingArguments(str(tmp_path), use_cpu=True, hub_token=SECRET, fsam_rho=0.5)
    args.lr_scheduler_kwargs = {"tracker": {"api_key": SECRET}, "power": 2}
    written = report.as_dict(args)
    assert SECRET not in json.dumps(written, default=str)
    assert written["lr_scheduler_kwargs"]["power"] == 2
    assert written["fsam_rho"] == 0.5
    (tmp_path / "a.yaml").write_text(f"hub_token: [{SECRET}]\n")
    parser = recipe_config.RecipeParser(FSAMTrainingArguments)
    with pytest.raises(ValueError, match="hub_token='<HUB_TOKEN>'") as error:
        recipe_config.yaml_to_argv(tmp_path / "a.yaml", parser)
    (tmp_path / "a.yaml").write_text(f"hub_token: {SECRET}: x\n")
    with pytest.raises(ValueError, match="line 1") as broken:
        recipe_config.yaml_to_argv(tmp_path / "a.yaml", parser)
    assert SECRET not in f"{error.value} {broken.value}"


def test_a_value_without_a_name_is_not_printed(folder: Path, capsys: pytest.CaptureFixture) -> None:
    write_study(folder)
    with pytest.raises(SystemExit):
        compare(folder, "--hub_token", "x", SECRET)
    assert SECRET not in (shown := capsys.readouterr().err)
    assert "a value without its name after ['hub_token']" in shown


def test_settings_that_are_no_secrets_are_not_masked() -> None:
    settings = {"tokens": 3, "max_new_tokens": 5, "tokenizer": "a", "key": "b", "text": [{"label_key": "c"}]}
    assert masked(settings) == settings
    line = ["--tokens", "3", "a b'c", "--question=what is it = that", "x=1"]
    assert masked_command(line) == line
