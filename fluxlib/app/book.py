"""The static book: ``python -m fluxlib.app.book`` puts its pages together, builds them, and checks every link.

Pages lie as they do in the repository, so links that work on GitHub work in the book. A chapter is the executed copy of
a notebook where some profile has left one in ``build/<profile>/notebooks``; a chapter without one says so.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

from fluxlib.config import PROFILES, REPO_ROOT

CONF = REPO_ROOT / "docs" / "book"
COPIED = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "constraints.txt", "environment.yml",
    "pyproject.toml", "Makefile", "Snakefile", "docs", "data/README.md", "figures/README.md", "config",
)  # fmt: skip
"""What pages are made of, or link to."""
PICTURES = "figures/full/*.png"

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
            shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("book"))
        elif (root / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, source / name)
    for file in root.glob(PICTURES):
        (source / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, source / file.relative_to(root))
    for file in CONF.iterdir():
        if file.is_file():
            shutil.copy(file, source / file.name)
    missing = []
    (source / "notebooks").mkdir()
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


def write_api(source: Path, package: Path = REPO_ROOT / "fluxlib") -> int:
    """One page per part of the library, made of its docstrings; gives how many modules there are."""
    folder = source / "api"
    folder.mkdir(exist_ok=True)
    parts: dict[str, list[str]] = {}
    for file in sorted(package.rglob("*.py")):
        dotted = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        if file.name != "__main__.py":
            parts.setdefault(".".join(dotted.split(".")[:2]), []).append(dotted)
    for part, modules in parts.items():
        body = [f"# `{part}`", ""]
        for module in modules:
            body += [] if module == part else [f"## `{module}`", ""]
            options = [f":members: {', '.join(own)}"] if (own := _own_names(package, module)) else []
            options += [":exclude-members: set", ":member-order: bysource", ":show-inheritance:"]
            body += ["```{eval-rst}", f".. automodule:: {module}", *(f"   {option}" for option in options), "```", ""]
        (folder / f"{part}.md").write_text("\n".join(body))
    listed = "\n".join(sorted(parts))
    text = f"# API reference\n\nMade from the docstrings.\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    (folder / "index.md").write_text(text)
    return sum(map(len, parts.values()))


def _own_names(package: Path, module: str) -> list[str]:
    """Public names that a module defines itself: what it passes on from another is described there, once."""
    place = package.joinpath(*module.split(".")[1:])
    tree = ast.parse((place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text())
    found: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in found if not name.startswith("_")]


class _Links(HTMLParser):
    """Links and anchors of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what points somewhere, and what can be pointed at."""
        for name, value in attrs:
            if name in ("href", "src") and value and tag in ("a", "img", "link", "script"):
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken_links(html: Path) -> list[str]:
    """Links to pages, files or anchors that the book does not have, as ``page: link``; others are not followed."""
    pages: dict[Path, _Links] = {}
    for file in sorted(html.rglob("*.html")):
        # The theme leaves templates of its own there.
        if file.relative_to(html).parts[0] == "_static":
            continue
        pages[file.resolve()] = _Links()
        pages[file.resolve()].feed(file.read_text())
    return [f"{page.relative_to(html.resolve())}: {link}" for page, link in _broken(pages)]


def _broken(pages: dict[Path, _Links]) -> Iterator[tuple[Path, str]]:
    for page, found in pages.items():
        for link in found.links:
            address, anchor = urldefrag(link)
            if ":" in address or address.startswith("//"):
                continue
            target = (page.parent / unquote(address.partition("?")[0])).resolve() if address else page
            if target.is_dir():
                target /= "index.html"
            known = pages.get(target)
            missing = anchor and known is not None and unquote(anchor) not in known.anchors
            if not target.is_file() or missing:
                yield page, link


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the book and check it; the exit code."""
    from sphinx.cmd.build import build_main

    parser = argparse.ArgumentParser(prog="python -m fluxlib.app.book", description=__doc__)
    parser.add_argument("--out", type=Path, default=REPO_ROOT / "build" / "book", help="folder of the book")
    parser.add_argument("--profile", action="append", help="take executed notebooks of this profile first")
    parser.add_argument("--no-api", action="store_true", help="leave the API reference out")
    given = parser.parse_args(arguments)
    source, html = given.out / "source", given.out / "html"
    wanted = list(dict.fromkeys([*(given.profile or []), "full", "mini", "smoke", "paper"]))
    missing = assemble(source, profiles=wanted)
    if given.no_api:
        (source / "api").mkdir()
        (source / "api" / "index.md").write_text("# API reference\n\nLeft out of this build.\n")
    else:
        write_api(source)
    shutil.rmtree(html, ignore_errors=True)
    code = build_main(["-q", "-b", "html", "-d", str(given.out / "doctrees"), str(source), str(html)])
    if code:
        return int(code)
    broken = broken_links(html)
    for line in broken:
        print(f"broken link  {line}", file=sys.stderr)
    if missing:
        print(f"not executed: {', '.join(missing)}; `make reproduce` or `make smoke` fills them")
    print(f"{html / 'index.html'}: {len(list(html.rglob('*.html')))} pages, {len(broken)} broken links")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
