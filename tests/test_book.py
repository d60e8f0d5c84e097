"""The book on hand-made pages; `make book` builds the real one and fails where a link leads nowhere."""

from __future__ import annotations

import json
import re

import make_book as book
import pytest

from fluxlib.config import REPO_ROOT


def notebook(path, *cells: str, error: bool = False) -> None:
    output = [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}] if error else []
    found = [{"cell_type": "markdown", "id": "0", "metadata": {}, "source": [cells[0]]}]
    found += [
        {"cell_type": "code", "id": str(i), "metadata": {"papermill": {}}, "source": [cell], "outputs": output,
         "execution_count": 1}
        for i, cell in enumerate(cells[1:], start=1)
    ]  # fmt: skip
    about = {"kernelspec": {"name": "python3"}, "language_info": {"name": "python"}, "papermill": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": found, "metadata": about, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "README.md").write_text("# Readme\n\n[a page](docs/page.md)\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# Page\n")
    notebook(tmp_path / "notebooks" / "00_a.ipynb", "# A", "1 + 1")
    notebook(tmp_path / "notebooks" / "01_b.ipynb", "# B", "2 + 2")
    return tmp_path


def test_a_chapter_is_the_executed_copy_of_the_first_profile_that_has_one(root):
    build = root / "build"
    notebook(build / "mini" / "notebooks" / "01_b-model.ipynb", "# B", "executed in mini")
    notebook(build / "smoke" / "notebooks" / "01_b.ipynb", "# B", "executed in smoke")
    assert book.executed("01_b", build, ["full", "mini", "smoke"]).name == "01_b-model.ipynb"
    assert book.executed("01_b", build, ["smoke", "mini"]).name == "01_b.ipynb"
    assert book.executed("00_a", build, ["mini"]) is None
    notebook(build / "full" / "notebooks" / "01_b.ipynb", "# B", "failed", error=True)
    assert book.executed("01_b", build, ["full", "mini"]).name == "01_b-model.ipynb", "a failed copy is no chapter"


def test_pages_lie_as_in_the_repository_and_a_chapter_without_results_says_so(root):
    notebook(root / "build" / "mini" / "notebooks" / "01_b.ipynb", "# B", "executed")
    assert book.assemble(root / "source", root, ["mini"]) == ["00_a.ipynb"]
    assert (root / "source" / "docs" / "page.md").is_file() and (root / "source" / "conf.py").is_file()
    first = json.loads((root / "source" / "notebooks" / "00_a.ipynb").read_text())
    assert first["cells"][1]["source"] == [book.NOT_EXECUTED]
    second = json.loads((root / "source" / "notebooks" / "01_b.ipynb").read_text())
    assert second["cells"][1]["source"] == ["executed"] and "papermill" not in second["metadata"]


def test_the_front_page_names_pages_that_exist():
    front = (REPO_ROOT / "docs" / "book" / "index.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", front):
        assert link == "api/fluxlib.rst" or link.startswith("https:") or (REPO_ROOT / link).is_file(), link


def test_every_page_has_its_place_in_the_book():
    front = (REPO_ROOT / "docs" / "book" / "index.md").read_text()
    trees = "\n".join(re.findall(r"```\{toctree\}\n(.*?)```", front, re.S)).splitlines()
    for page in (REPO_ROOT / "docs").glob("*.md"):
        assert any(line.rstrip(">").endswith(f"docs/{page.stem}") for line in trees), page.name
