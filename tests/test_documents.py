"""Every command in README, CONTRIBUTING and docs is executed, or held by a test that is named here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from fluxlib.app import cli, pipeline
from fluxlib.config import REPO_ROOT

PAGES = [REPO_ROOT / "README.md", REPO_ROOT / "CONTRIBUTING.md", *sorted((REPO_ROOT / "docs").glob("*.md"))]
SKIPPED_PAGES = {"LOG.md": "what was typed once, dated"}

# A command that begins so is not run here: it would take minutes, a browser or a network, or it is this very test.
HELD_ELSEWHERE = {
    "make reproduce": "tests/test_smoke.py runs the same graph with tiny counts",
    "make rehearse": "tests/test_paper_profile.py runs its methods, tasks and switches; test_smoke.py such a graph",
    "make smoke": "tests/test_smoke.py",
    "make test": "is what runs this test",
    "make lab": "tests/browser/test_lab.py",
    "make book": "tests/test_book.py",
    "make bench": "tests/moe/test_benchmarks.py",
    "conda env create": "environment.yml installs constraints.txt, which `make` does too",
    "pre-commit install": "writes into .git",
    "python data/pretraining/pretrain.py": "tests/test_pretraining.py",
    "fluxlib run --method average": "tests/methods/test_add_a_method.py",
    "PYTHONPATH=. python -c": "tests/test_structure.py imports the core with nothing else at hand",
    "git clone": "needs an address",
}
# What is passed instead, so that a command takes seconds.
SMALLER = {"--rounds": "1", "--participants": "2", "--task": "mini-mmlu", "--batch": "1", "--tokens": "16"}
TINY = ("data.task_size=200", "training.local_steps=1", "evaluation.samples=8", "training.batch_size=4")
TINY_RUN = [word for setting in TINY for word in ("--set", setting)]
PLAN = ["--model", "mini-llama-moe", "--memory", "2GiB", "--batch", "1", "--tokens", "16"]


def commands(page: Path) -> list[str]:
    """Commands of a page's code blocks (fenced as shell, or indented) and of its inline code.

    A command begins with what a person could type here; anything else is code or output.
    """
    text = re.sub(r"\\\n\s*", " ", page.read_text())  # a command may go on in the next line
    blocks = re.findall(r"```(?:sh|bash|console|shell)\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [line for line in text.splitlines() if re.match(r"^ {4}\S", line)]
    lines += re.findall(r"`([^`\n]+)`", text)
    found = [re.sub(r"\s+#\s.*$", "", line.strip().removeprefix("$ ")) for line in lines]
    begins = r"^((OMP_NUM_THREADS=\d+ )?(\.venv/bin/|make [a-z]|fluxlib [a-z]+( |$)|conda env|git clone|PYTHONPATH=))"
    return [line for line in dict.fromkeys(found) if re.match(begins, line)]


def cases() -> list:
    """Each command once, by the last page that has it."""
    pages = [page for page in PAGES if page.name not in SKIPPED_PAGES]
    listed = {command.removeprefix(".venv/bin/"): page for page in pages for command in commands(page)}
    return [pytest.param(command, id=f"{page.name}: {command[:60]}") for command, page in listed.items()]


def held(command: str) -> str:
    return next((why for begin, why in HELD_ELSEWHERE.items() if command.startswith(begin)), "")


@pytest.mark.parametrize("command", cases())
def test_a_command_of_a_page_works(command, tmp_path, monkeypatch, capsys):
    words = shlex.split(command)
    if command.startswith("make "):
        targets = re.findall(r"^([a-z-]+):", (REPO_ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), f"make has {', '.join(targets)}"
    elif held(command):
        pass
    elif words[0] == "fluxlib":
        run_or_check(words, tmp_path, monkeypatch, capsys)
    else:
        check_tool(command, words)


def run_or_check(words: list[str], folder: Path, monkeypatch, capsys) -> None:
    """Run it small; what only names a command, leaves places to fill in or needs other machines is checked in form."""
    to_fill_in = "..." in words or any(re.fullmatch(r"[A-Z_]{2,}", word) for word in words)
    if len(words) == 2 or to_fill_in or "deploy" in words or "deployment" in words:
        check_form(words, monkeypatch, capsys)
    elif words[1] == "notebook":
        check_notebook(words)
    else:
        run_small(words, folder, monkeypatch, capsys)


def check_notebook(words: list[str]) -> None:
    """It is there and has the parameters that it is given; tests/test_smoke.py executes every notebook."""
    given = dict(item.partition("=")[::2] for item in words if "=" in item)
    pipeline.check_parameters(REPO_ROOT / words[2], given)


def check_tool(command: str, words: list[str]) -> None:
    """Another program: it is there, and so is the script or module that it is given."""
    assert (Path(sys.executable).parent / words[0]).exists(), f"{command!r}: nothing of that name beside Python"
    if words[0] == "python" and words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"{command!r}: no such module"
    elif words[0] == "python":
        assert (REPO_ROOT / words[1]).is_file(), f"{command!r}: no such script"


def call(arguments: list[str], monkeypatch, capsys) -> tuple[object, str, str]:
    monkeypatch.setattr(sys, "argv", ["fluxlib", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    code: object = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err


def check_form(words: list[str], monkeypatch, capsys) -> None:
    """The command and each option that is given exist."""
    depth = 3 if words[1] == "deploy" else 2
    code, out, err = call([*words[1:depth], "--help"], monkeypatch, capsys)
    assert code == 0, err
    for option in (word for word in words if re.fullmatch(r"--[a-z-]+", word)):
        assert option in out, f"{option} is no option of {' '.join(words[:depth])}"


def run_small(words: list[str], folder: Path, monkeypatch, capsys) -> None:
    """The command itself, with smaller numbers and everything that is written in a folder of its own."""
    name = words[1]
    smaller = [SMALLER.get(before, word) for before, word in zip(words, words[1:], strict=False)]
    arguments = [str(REPO_ROOT / word) if (REPO_ROOT / word).is_file() else word for word in smaller]
    if name == "run":
        arguments += TINY_RUN
    if name == "plan":
        arguments = ["plan", *PLAN, *(word for word in arguments if word == "--json")]
    monkeypatch.chdir(folder)
    code, out, err = call(arguments, monkeypatch, capsys)
    # A doctor may find a machine wanting; it has to say so in its own way.
    allowed = (0, 1) if name == "doctor" else (0,)
    assert code in allowed, err
    if "--json" in arguments:
        json.loads(out)


def test_links_of_the_pages_lead_somewhere():
    for page in [*PAGES, REPO_ROOT / "data" / "README.md"]:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if not link.startswith(("http:", "https:", "mailto:")):
                target = Path(os.path.normpath(page.parent / link))
                assert target.exists(), f"{page.name}: {link}"


def test_what_is_held_elsewhere_is_held_by_a_file_that_exists():
    for why in HELD_ELSEWHERE.values():
        for name in re.findall(r"tests/\S+\.py", why):
            assert (REPO_ROOT / name).is_file(), name
