"""The book on hand-made pages; `make book` builds the real one and checks every link of it."""

from __future__ import annotations

import json
import re

import pytest

from fluxlib.app import book
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


def test_every_module_has_its_place_in_the_reference(tmp_path):
    package = REPO_ROOT / "fluxlib"
    number = book.write_api(tmp_path, package)
    assert number == len([file for file in package.rglob("*.py") if file.name != "__main__.py"])
    assert ".. automodule:: fluxlib.merging.plan" in (tmp_path / "api" / "fluxlib.merging.md").read_text()
    assert "fluxlib.merging" in (tmp_path / "api" / "index.md").read_text()


def test_what_a_package_passes_on_is_described_where_it_is_defined(tmp_path):
    package = tmp_path / "fluxlib"
    (package / "part").mkdir(parents=True)
    (package / "part" / "__init__.py").write_text("from fluxlib.part.one import run\n\nLIMIT: int = 3\n")
    (package / "part" / "one.py").write_text("import os\n_HIDDEN = SEEN = 1\ndef run(): ...\nclass Kept: ...\n")
    book.write_api(tmp_path, package)
    page = (tmp_path / "api" / "fluxlib.part.md").read_text()
    assert re.findall(r"automodule:: (\S+)\n   :members: (.+)", page) == [
        ("fluxlib.part", "LIMIT"),
        ("fluxlib.part.one", "SEEN, run, Kept"),
    ]


def test_links_to_what_is_not_there_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "index.html").write_text('<p id="here"></p><a href="../a.html#x">ok</a>')
    (tmp_path / "a.html").write_text(
        '<h1 id="x"></h1><a href="#x">ok</a><a href="sub/index.html#here">ok</a>'
        '<a href="https://example.org">not followed</a><a href="sub/">ok</a>'
        '<a href="sub/index.html#there">1</a><a href="b.html">2</a><img src="c.png"><a href="#y">4</a>'
    )
    assert book.broken_links(tmp_path) == [
        "a.html: sub/index.html#there",
        "a.html: b.html",
        "a.html: c.png",
        "a.html: #y",
    ]


def test_the_front_page_names_pages_that_exist():
    front = (REPO_ROOT / "docs" / "book" / "index.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", front):
        assert link == "api/index.md" or link.startswith("https:") or (REPO_ROOT / link).is_file(), link


def test_every_page_has_its_place_in_the_book():
    front = (REPO_ROOT / "docs" / "book" / "index.md").read_text()
    trees = "\n".join(re.findall(r"```\{toctree\}\n(.*?)```", front, re.S)).splitlines()
    for page in (REPO_ROOT / "docs").glob("*.md"):
        assert any(line.rstrip(">").endswith(f"docs/{page.stem}") for line in trees), page.name
