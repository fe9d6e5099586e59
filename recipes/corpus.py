"""Data sets of text that comes with every Python installation, so that no network is needed.

    stdlib                the standard library's own .py files, for pretraining
    stdlib-topics         the English language reference behind `help()` (pydoc_data.topics), another domain
    stdlib-packages       snippets of the standard library, labelled with the package they come from, to classify
    stdlib-instructions   prompt and completion: a function of the standard library, and what it does
    stdlib-preferences    the same, with another function's docstring as the rejected answer
    debian-packages       one line about a package of Debian or Ubuntu, labelled with its section, to classify

The last one is on every machine with `apt`. Each is split into training and validation by whole documents: files,
topics or source packages.
"""

import ast
import copy
import hashlib
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets.utils import tqdm

# Left out of the corpus: other people's code, CPython's own tests (half of the library, and repetitive), the folders of
# the build's configuration and extensions, code tables (encodings), and the English text that fine-tuning trains on.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload", "encodings", "pydoc_data"}
)
# Packages of ten files or more that every Python from 3.11 on has, without optional packages of the system.
PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
# Sections of Debian that a line of English can tell apart, though not always; a section of a programming language or of
# fonts could be told by the package's name alone.
SECTIONS = ("admin", "devel", "games", "graphics", "math", "net", "science", "sound", "text", "utils", "web", "x11")
SNIPPET_LINES = 16
INSTRUCTION_LINES = 12
SUMMARY_CHARACTERS = 200


@dataclass(frozen=True)
class Document:
    name: str  # relative path, or the topic
    text: str


def standard_library(max_bytes: int | None = None, installed: bool = False) -> list[Document]:
    """The sources of the standard library and, with `installed`, of the packages installed beside it.

    `max_bytes` keeps the first documents in the order of the hashes of their names. This is a sample of all packages,
    and a larger limit only adds documents to it.
    """
    paths = sysconfig.get_paths()
    files = python_files(Path(paths["stdlib"]), EXCLUDED_FOLDERS)
    if installed:
        # Without their tests, too. Where two files have the same name, that of the standard library is taken.
        packages = python_files(Path(paths["purelib"]), EXCLUDED_FOLDERS - {"site-packages", "dist-packages"})
        files = {**{f"site-packages/{name}": path for name, path in packages.items()}, **files}
    names = sorted(files, key=order)
    documents, size = [], 0
    for name in tqdm(names, desc="Reading the corpus", unit=" files", leave=False):
        content = files[name].read_bytes()
        if max_bytes is not None and documents and size + len(content) > max_bytes:
            break
        size += len(content)
        text = content.decode("utf-8", errors="ignore")
        if text.strip():  # an empty __init__.py is no document
            documents.append(Document(name, text))
    return documents


def python_files(root: Path, excluded: frozenset[str]) -> dict[str, Path]:
    """Every .py file under root by its relative path in POSIX spelling, folders in `excluded` and config-* left out."""
    files = {path.relative_to(root): path for path in root.rglob("*.py") if path.is_file()}
    return {
        relative.as_posix(): path
        for relative, path in files.items()
        if excluded.isdisjoint(relative.parts[:-1]) and not relative.parts[0].startswith("config-")
    }


def documentation_topics() -> list[Document]:
    from pydoc_data.topics import topics

    return [Document(name, topics[name]) for name in sorted(topics, key=order)]


def order(name: str) -> bytes:
    return hashlib.sha256(b"order:" + name.encode()).digest()


def in_validation(name: str, fraction: float) -> bool:
    """Whether a document is for validation. Its name alone decides, on every machine and in every corpus."""
    digest = hashlib.sha256(b"split:" + name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def split(documents: list[Document], validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """Returns (training, validation), both in the order of `documents`. The fraction is of the documents' number."""
    train = [document for document in documents if not in_validation(document.name, validation_fraction)]
    validation = [document for document in documents if in_validation(document.name, validation_fraction)]
    return train, validation


def fingerprint(documents: list[Document]) -> str:
    """SHA-256 over names and texts, sorted by name, and over their lengths, so that no two corpora hash alike."""
    digest = hashlib.sha256()
    for document in sorted(documents, key=lambda document: document.name):
        for part in (document.name.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def package_files() -> list[Document]:
    """The files of `PACKAGES`. The first part of a file's name is its label."""
    return [document for document in standard_library() if document.name.split("/")[0] in PACKAGES]


def split_by_package(files: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Like `split`, but within each package, so that every label is on both sides."""
    train: list[Document] = []
    validation: list[Document] = []
    for package in PACKAGES:
        own = [document for document in files if document.name.split("/")[0] == package]  # in hash order
        count = max(1, round(fraction * len(own)))
        validation += own[:count]
        train += own[count:]
    return train, validation


def debian_packages() -> list[Document]:
    """The descriptions of the packages that `apt` knows, one for each source package; its section begins the name.

    Raises:
        RuntimeError: there is no `apt` here, or it has no lists of packages.
    """
    cure = "Run `apt-get update` on Debian or Ubuntu, or choose another data set."
    try:
        command = ["apt-cache", "dumpavail"]
        listed = subprocess.run(command, capture_output=True, check=True, encoding="utf-8", errors="ignore").stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"`apt-cache dumpavail` lists no packages: {error}. {cure}") from error
    found: dict[str, Document] = {}  # by source
    texts: set[str] = set()  # gcc-11 and gcc-12 say the same
    for paragraph in listed.split("\n\n"):
        package = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        text, section = package.get("Description", ""), package.get("Section", "").split("/")[-1]
        source = package.get("Source", package.get("Package", "")).split(" ")[0]
        if section in SECTIONS and text and text not in texts and source not in found:
            found[source] = Document(f"{section}/{source}", text)
            texts.add(text)
    if not found:
        raise RuntimeError(f"`apt-cache dumpavail` lists no packages. {cure}")
    return sorted(found.values(), key=lambda document: order(document.name))


def labelled(documents: list[Document]) -> Iterator[dict[str, str]]:
    """Rows {text, label} of whole documents."""
    for document in documents:
        yield {"text": document.text, "label": document.name.split("/")[0]}


def snippets(files: list[Document]) -> Iterator[dict[str, str]]:
    """Rows {text, label} of consecutive pieces of SNIPPET_LINES lines, without the shorter piece at a file's end."""
    for document in files:
        lines = [line for line in document.text.splitlines() if line.strip()]
        for start in range(0, len(lines) - SNIPPET_LINES + 1, SNIPPET_LINES):
            yield {
                "text": "\n".join(lines[start : start + SNIPPET_LINES]),
                "label": document.name.split("/")[0],
            }


def instructions(files: list[Document]) -> Iterator[dict[str, str]]:
    """Rows {prompt, completion}: a function's source without its docstring, and the docstring's first paragraph."""
    for document in files:
        for function in documented_functions(document.text):
            lines = ast.unparse(without_docstring(function)).splitlines()[:INSTRUCTION_LINES]
            source = "\n".join(lines)
            summary = " ".join(ast.get_docstring(function).strip().split("\n\n")[0].split())
            if len(summary) <= SUMMARY_CHARACTERS:
                yield {
                    "prompt": f"Say what this function does.\n\n{source}\n\nIt does this:",
                    "completion": f" {summary}",
                }


def preferences(files: list[Document]) -> Iterator[dict[str, str]]:
    """Rows {prompt, chosen, rejected}: the answers are the right docstring and that of the function before."""
    before = None
    for row in instructions(files):
        if before is not None and before != row["completion"]:
            yield {"prompt": row["prompt"], "chosen": row["completion"], "rejected": before}
        before = row["completion"]


def documented_functions(source: str) -> Iterator[ast.FunctionDef]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a few files of the library are templates, or for another version of Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and ast.get_docstring(node):
            yield node


def without_docstring(function: ast.FunctionDef) -> ast.FunctionDef:
    bare = copy.copy(function)
    bare.body = function.body[1:]
    return bare
