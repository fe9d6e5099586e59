"""The folder of a study, with its recipe."""

from pathlib import Path

import pytest

from tests.tools.studies import RECIPE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.py").write_text(RECIPE)
    return tmp_path
