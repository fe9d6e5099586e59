"""Which errors end a command in one line, and which keep their traceback."""

from pathlib import Path

import pytest

from hf_fsam import FSAMTrainingArguments
from hf_fsam.mistakes import did_you_mean, refused_by_libraries, told_in_one_line

HERE = Path(__file__).parent


def refuses() -> None:
    raise FileNotFoundError("there is no such file: give one")


def is_wrong() -> None:
    int("no number")


def test_what_a_raise_statement_of_ours_raises_ends_in_one_line_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended, told_in_one_line("recipe.py", HERE):
        refuses()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "recipe.py: there is no such file: give one\n"
    with pytest.raises(SystemExit), told_in_one_line("recipe.py"):
        FSAMTrainingArguments(output_dir=str(tmp_path), fsam_rho=-1)
    assert capsys.readouterr().err.startswith("recipe.py: fsam_rho=-1 is not a radius")


def test_all_else_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="invalid literal"), told_in_one_line("recipe.py", HERE):
        is_wrong()
    with pytest.raises(FileNotFoundError, match="give one"), told_in_one_line("recipe.py", tmp_path):
        refuses()  # raised elsewhere


def test_what_libraries_refuse_of_the_settings_becomes_ours() -> None:
    for kind in (ImportError, RuntimeError):
        with pytest.raises(SystemExit), told_in_one_line("recipe.py"), refused_by_libraries():
            raise kind("--report_to tensorboard needs a package:\n  pip install tensorboard")
    with pytest.raises(ValueError, match="invalid literal"), told_in_one_line("recipe.py"), refused_by_libraries():
        is_wrong()


def test_a_name_that_is_close_is_asked_for() -> None:
    known = ("fsam_rho", "fsam_variant")
    assert did_you_mean("fsam_rh", known) == " Did you mean 'fsam_rho'?"
    assert did_you_mean("seed", known) == ""
