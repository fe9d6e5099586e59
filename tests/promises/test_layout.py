"""The rooms of the package: who imports whom, and whose names are used where."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text("utf-8"))
    for path in sorted((ROOT / "hf_fsam").rglob("*.py"))
}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that are imported when this one is, and not only for type checkers or inside of a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported(node)


IMPORTS = {
    name: {each for each in imported(tree) if each in MODULES and each != name} for name, tree in MODULES.items()
}


def reachable(name: str) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for each in IMPORTS[waiting.pop()] - found:
            found.add(each)
            waiting.append(each)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_itself_by_a_detour(name: str) -> None:
    assert name not in reachable(name)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("hf_fsam.passes", {"boundary", "heads.fused_head", "heads.deferred_logits", "heads.trl", "step", "trainer"}),
        ("hf_fsam.heads.fused_head", {"boundary", "engines", "step", "trainer"}),
        ("hf_fsam.heads.trl", {"boundary", "engines", "step", "trainer"}),
        ("hf_fsam.engines", {"boundary", "step", "trainer"}),
        ("hf_fsam.engines.deepspeed", {"boundary", "passes", "heads.trl", "refusals", "step", "trainer"}),
        ("hf_fsam.engines.fsdp", {"boundary", "passes", "heads.trl", "refusals", "step", "trainer"}),
        ("hf_fsam.diagnostics.callback", {"step", "trainer"}),
        ("hf_fsam.counters", {"boundary", "engines", "step", "trainer"}),
        ("hf_fsam.step", {"trainer"}),
        ("hf_fsam.functional_sam", {"diagnostics.probe", "step", "trainer"}),
    ],
)
def test_imports_go_one_way(low: str, high: set[str]) -> None:
    assert not reachable(low) & {f"hf_fsam.{name}" for name in high}


def private_names(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Each private attribute that is used: its name, its line, and whether it is used of oneself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            yield node.attr, node.lineno, ast.unparse(node.value) in ("self", "cls", "super()")


def test_no_module_reads_the_private_names_of_another() -> None:
    own = {
        name: {attribute for attribute, _, of_self in private_names(tree) if of_self} for name, tree in MODULES.items()
    }
    found = [
        f"{name}:{line} {attribute}"
        for name, tree in MODULES.items()
        for attribute, line, of_self in private_names(tree)
        for other, names in own.items()
        if not of_self and other != name and attribute in names and attribute not in own[name]
    ]
    assert not found
    imports = [
        f"{name}:{node.lineno} {alias.name}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_fsam")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not imports


@pytest.mark.parametrize(
    ("words", "home"),
    [
        (("ds_tensor", "bit16_groups_flat", "process_gradients", "ZeroParamStatus"), "engines/deepspeed_internals.py"),
        (("_ChunkedLogProbFunction", "add_fused_lm_head"), "heads/trl.py"),
        (("_stored_metrics", "accum_loss_components"), "counters.py"),
    ],
)
def test_what_others_do_not_document_is_named_in_one_file(words: tuple[str, ...], home: str) -> None:
    for path in (ROOT / "hf_fsam").rglob("*.py"):
        text = path.read_text("utf-8")
        here = path.relative_to(ROOT / "hf_fsam").as_posix() == home
        assert all((word in text) == here for word in words), path


def test_mocks_are_for_tests() -> None:
    for folder in ("hf_fsam", "recipes", "benchmarks", "docker"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text("utf-8")
            assert "unittest.mock" not in text, path
            assert "from unittest" not in text, path
