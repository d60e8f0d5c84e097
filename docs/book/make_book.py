"""The static book: ``python docs/book/make_book.py`` lays its pages out, Sphinx builds them and checks every link.

Pages lie as they do in the repository, so links that work on GitHub work in the book. A chapter is the executed copy of
a notebook where some profile has left one in ``build/<profile>/notebooks``; a chapter without one says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from fluxlib.config import PROFILES, REPO_ROOT

COPIED = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "constraints.txt", "environment.yml",
    "pyproject.toml", "Makefile", "Snakefile", "docs", "data/README.md", "figures", "config", "notebooks/exercises",
)  # fmt: skip
"""What pages are made of, or link to."""

NOT_EXECUTED = "*Not executed yet: `make reproduce` (or `make smoke`) fills this chapter with its results.*"


def executed(stem: str, build: Path, profiles: Sequence[str]) -> Path | None:
    """The executed copy of a notebook: of the first profile that has one, of its first run or model."""
    for profile in profiles:
        folder = build / profile / "notebooks"
        found = [folder / f"{stem}.ipynb", *sorted(folder.glob(f"{stem}-*.ipynb"))]
        for file in found:
            if file.is_file() and '"output_type": "error"' not in file.read_text():
                return file
    return None


def assemble(source: Path, root: Path = REPO_ROOT, profiles: Sequence[str] = PROFILES) -> list[str]:
    """Lay out the pages in ``source``, which is emptied first; gives the notebooks that were not executed."""
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("book", "pages", "*.pdf"))
        elif (root / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, source / name)
    for name in ("conf.py", "index.md"):
        shutil.copy(Path(__file__).with_name(name), source / name)
    missing = []
    (source / "notebooks").mkdir(exist_ok=True)
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        found = executed(notebook.stem, root / "build", profiles)
        missing += [] if found else [notebook.name]
        (source / "notebooks" / notebook.name).write_text(_chapter(found or notebook, is_executed=found is not None))
    return missing


def _chapter(path: Path, is_executed: bool) -> str:
    content = json.loads(path.read_text())
    for cell in content["cells"]:
        # What papermill and widgets leave behind is no part of a chapter.
        cell["metadata"] = {"tags": [tag for tag in cell["metadata"].get("tags", []) if tag != "parameters"]}
    if not is_executed:
        note = {"cell_type": "markdown", "id": "not-executed", "metadata": {}, "source": [NOT_EXECUTED]}
        content["cells"].insert(1, note)
    content["metadata"] = {name: content["metadata"][name] for name in ("kernelspec", "language_info")}
    return json.dumps(content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the book; the exit code. A link to a page or a heading that it does not have is an error."""
    from sphinx.cmd.build import build_main

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPO_ROOT / "build" / "book", help="folder of the book")
    parser.add_argument("--profile", default="full", help="take executed notebooks of this profile first")
    given = parser.parse_args(arguments)
    source, html = given.out / "source", given.out / "html"
    missing = assemble(source, profiles=[given.profile, "full", "mini", "smoke", "paper"])
    shutil.rmtree(html, ignore_errors=True)
    strict = ["--fail-on-warning", "--keep-going"]
    code = build_main(["-q", *strict, "-b", "html", "-d", str(given.out / "doctrees"), str(source), str(html)])
    if missing:
        print(f"not executed: {', '.join(missing)}; `make reproduce` or `make smoke` fills them")
    print(f"{html / 'index.html'}: {len(list(html.rglob('*.html')))} pages")
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
