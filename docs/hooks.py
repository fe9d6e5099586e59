"""What the site needs beside the pages of docs/: pages and files of the repository, and the help texts of arguments.

The pages link to files of the repository as they do on a forge, by relative paths. Files outside of docs/ that a page
links to are copied into the site, so that every link works there, too, and a strict build finds the broken ones.
"""

import ast
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the repository's own pages, and each file that a page links to."""
    waiting = [ROOT / "docs" / each.src_uri for each in files.documentation_pages()] + [ROOT / name for name in PAGES]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        if not source.is_relative_to(ROOT / "docs"):
            files.append(File.generated(config, address(source), abs_src_path=str(source)))
        if source.suffix == ".md":
            for link in LINK.findall(source.read_text(encoding="utf-8")):
                linked = (source.parent / link).resolve()
                if linked.is_file() and linked.is_relative_to(ROOT) and linked not in seen:
                    seen.add(linked)
                    waiting.append(linked)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns each link into one inside of the site. A link to no file stays as it is, for the build to complain."""
    source = Path(page.file.abs_src_path)
    depth = "../" * page.file.src_uri.count("/")

    def inside(link: re.Match[str]) -> str:
        linked = (source.parent / link[1]).resolve()
        return depth + address(linked) if linked.is_file() and linked.is_relative_to(ROOT) else link[1]

    return LINK.sub(inside, markdown)


def address(source: Path) -> str:
    """Where a file of the repository is in the site, as a path from its root."""
    path = source.relative_to(ROOT).as_posix()
    return PAGES.get(path, path).removeprefix("docs/")


class HelpTexts(griffe.Extension):
    """Shows the `help` of a dataclass's field as its documentation, and the default as its value."""

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: object) -> None:
        call = ast.parse(str(attr.value), mode="eval").body if str(attr.value).startswith("field(") else None
        if isinstance(call, ast.Call):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            if "metadata" not in given:
                return
            attr.docstring = griffe.Docstring(ast.literal_eval(given["metadata"])["help"], parent=attr)
            attr.value = ast.unparse(given["default"])
