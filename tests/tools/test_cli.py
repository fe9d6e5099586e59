"""The command `hf-fsam`, and the lazy import of the package that makes its help quick."""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import hf_fsam
from hf_fsam import cli

ROOT = Path(__file__).parents[2]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hf-fsam", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize("run", ["--help", "--version", "compar", None])
def test_help_and_the_import_of_the_package_need_neither_torch_nor_transformers(run: str | None) -> None:
    program = "import contextlib, runpy, sys\nimport hf_fsam\n"
    if run is not None:
        program += f"sys.argv = ['hf-fsam', {run!r}]\n"
        program += "with contextlib.suppress(SystemExit):\n    runpy.run_module('hf_fsam', run_name='__main__')\n"
    program += "assert not {'torch', 'transformers', 'accelerate', 'numpy'} & sys.modules.keys()"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_the_public_names_are_found_listed_and_pickled() -> None:
    for name in hf_fsam.__all__:
        found = getattr(hf_fsam, name)
        assert pickle.loads(pickle.dumps(found)) is found
        assert found is getattr(importlib.import_module(found.__module__), name)
    assert {*hf_fsam.__all__, "__version__"} <= set(dir(hf_fsam))
    names: dict[str, object] = {}
    exec("from hf_fsam import *", names)
    assert set(hf_fsam.__all__) <= names.keys()
    with pytest.raises(AttributeError, match="module 'hf_fsam' has no attribute 'FSAMTrainr'"):
        _ = hf_fsam.FSAMTrainr
    with pytest.raises(ImportError, match="cannot import name 'FSAMTrainr'"):
        exec("from hf_fsam import FSAMTrainr")


def test_the_command_says_what_it_can_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert call(monkeypatch) == 0
    assert "compare STUDY.yaml" in capsys.readouterr().out
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"hf-fsam {hf_fsam.__version__}\n"
    assert call(monkeypatch, "compare", "--help") == 0
    assert "--parallel" in capsys.readouterr().out
    assert call(monkeypatch, "rho", "--help") == 0
    assert "--after" in capsys.readouterr().out
    assert call(monkeypatch, "run", "--help") == 0
    assert "--fsam_rho" in capsys.readouterr().out


def test_an_unknown_command_ends_with_the_names_of_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, "compar") == 2
    assert "there is no command 'compar'; choose one of run, rho, compare." in capsys.readouterr().err


def test_python_runs_the_package_as_the_command() -> None:
    command = [sys.executable, "-m", "hf_fsam", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, f"hf-fsam {hf_fsam.__version__}\n")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "hf_fsam.studies.compare", raising=False)
    monkeypatch.delitem(sys.modules, "hf_fsam.studies.study", raising=False)
    monkeypatch.setattr(sys, "argv", ["hf-fsam", "compare", "x.yaml"])
    with pytest.raises(SystemExit, match=r"needs yaml: pip install 'hf-fsam\[studies\]'"):
        cli.main()
