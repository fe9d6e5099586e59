"""The README and the docs: every Python block runs, every command has a test or says what it needs, and every public
name is documented.

The blocks of a page run one after the other and share their names. `model` and `dataset` are there from the start: the
toy language model and its sentences. A block behind `<!-- not run: reason -->` is left out.
"""

import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import hf_fsam
from hf_fsam import cli
from hf_fsam.cli import COMMANDS as COMMANDS_OF_OURS
from hf_fsam.seam import Seam
from tests.toys import llama, sentences

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
FENCE = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
COMMANDS: dict[str, str] = yaml.safe_load((ROOT / "tests" / "promises" / "commands.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    code: str
    reason: str | None


BLOCKS = [
    Block(name, text.count("\n", 0, match.start("code")), match["language"], match["code"], match["reason"])
    for name, path in PAGES.items()
    for text in [path.read_text(encoding="utf-8")]
    for match in FENCE.finditer(text)
]
PYTHON = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON if block.reason is None}))
def test_the_python_blocks_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "recipes")  # averaging.py, which a page has its readers copy
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # or the classes of a page could not be pickled
    names = vars(module)
    names |= {"model": llama(), "dataset": sentences()}
    for block in PYTHON:
        if block.page == page and block.reason is None:
            exec(compile("\n" * block.line + block.code, PAGES[page], "exec"), names)
    if page == "README.md":
        assert losses(capsys.readouterr().out) == pytest.approx(losses(PAGES[page].read_text()), abs=0.5)


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+),", text, re.M)]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_offline_and_holds_no_outputs(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)


def test_few_blocks_are_left_out() -> None:
    assert {block.page for block in PYTHON if block.reason} == {"axolotl.md", "precision.md"}


def commands() -> Iterator[str]:
    """The lines of the shell blocks, without comments and with continued lines joined."""
    for block in BLOCKS:
        if block.language == "bash":
            for line in block.code.replace("\\\n", "").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] not in ("for", "done"):
                    yield " ".join(words)


def row_of(command: str) -> str | None:
    return max((row for row in COMMANDS if command.startswith(row)), key=len, default=None)


def test_every_command_has_a_test_or_says_what_it_needs() -> None:
    found = {command: row_of(command) for command in commands()}
    assert [command for command, row in found.items() if row is None] == []
    assert set(COMMANDS) - set(found.values()) == {"make docs"}  # which stands in a sentence


def test_the_tests_of_the_commands_exist() -> None:
    for by in COMMANDS.values():
        named = re.search(r"(tests/\S+\.py)(?:::(\w+))?", by)
        assert named or by.startswith("needs ") or "`make " in by, by
        if named:
            assert f"def {named[2] or 'test_'}" in (ROOT / named[1]).read_text(encoding="utf-8"), by


def test_the_files_in_commands_exist() -> None:
    for command in commands():
        for word in re.findall(r"(?<![\w/.])(?:recipes|benchmarks|docker|tests)/[\w./$-]+", command):
            assert "$" in word or (ROOT / word).exists(), command


def test_every_public_name_and_argument_is_documented() -> None:
    for name in hf_fsam.__all__:
        assert (getattr(hf_fsam, name).__dict__["__doc__"] or "").strip(), name
    for name, method in vars(Seam).items():
        assert name.startswith("_") or not inspect.isfunction(method) or method.__doc__, name
    for parameter in list(inspect.signature(hf_fsam.FSAMDiagnosticsCallback).parameters):
        assert f"{parameter}: " in (hf_fsam.FSAMDiagnosticsCallback.__doc__ or ""), parameter
    table = PAGES["arguments.md"].read_text(encoding="utf-8")
    for field in fields(hf_fsam.FSAMArguments):
        assert field.metadata["help"], field.name
        default = "found" if field.default is None else f"`{field.default}`"
        assert f"| `{field.name}` | {default} | " in table, field.name
    api = PAGES["api.md"].read_text(encoding="utf-8")
    assert set(re.findall(r"^::: hf_fsam\.(\w+)$", api, re.M)) == set(hf_fsam.__all__)


@pytest.mark.parametrize("command", COMMANDS_OF_OURS)
def test_every_option_of_a_command_is_in_the_docs(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["hf-fsam", command, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    options = set(re.findall(r"^  (?:-\w, )?--(\w+)", capsys.readouterr().out, re.M))
    ours = {option for option in options if not re.match("(no_)?fsam_|help$", option)}
    assert ours
    page = PAGES["commands.md"].read_text(encoding="utf-8")
    assert [option for option in ours if not re.search(rf"`--{option}\b", page)] == []


def test_the_readme_is_read_in_four_minutes() -> None:
    text = PAGES["README.md"].read_text(encoding="utf-8")
    assert len(FENCE.sub("", text).split()) <= 1100
