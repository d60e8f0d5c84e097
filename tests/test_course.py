"""The notebooks are one course: each says what it asks and needs, starts by hand, lets you try, asks back, leads on."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import steps

from fluxlib.app import pipeline
from fluxlib.config import REPO_ROOT

FOLDER = REPO_ROOT / "notebooks"
COURSE = [
    "00_start_here", "01_profiling", "02_merging", "03_role_assignment", "04_federated_run", "05_time_to_accuracy",
    "06_scale_and_overhead", "07_real_models", "08_report", "09_from_scratch",
]  # fmt: skip
LESSONS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
HEADER = ["before", "reads", "writes", "takes"]
FIRST = "nothing of this project"
# What makes, reads or plans something real; the example by hand comes before the first of them.
REAL = ("models.load", "studies.benches", "federation.run", "federation.load_task", "records.read_all", "clock.shapes")
BY_HAND, TRY_IT = "by-hand", "try-it"


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> set[str]:
    return set(cell["metadata"].get("tags", []))


# The report reads what all others left: nothing is made there that could be shown by hand or tried.
TAUGHT = [path for path in LESSONS if path.stem != "08_report"]


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def lesson(request) -> tuple[Path, list[dict]]:
    return request.param, json.loads(request.param.read_text())["cells"]


@pytest.fixture(params=TAUGHT, ids=lambda path: path.stem)
def taught(request) -> tuple[Path, list[dict]]:
    return request.param, json.loads(request.param.read_text())["cells"]


def around(path: Path) -> tuple[str, str]:
    """The lesson before and the one after, empty at the ends."""
    place = COURSE.index(path.stem)
    return (["", *COURSE][place], [*COURSE, ""][place + 1])


def test_the_course_has_no_gap():
    assert [path.stem for path in LESSONS] == COURSE


def test_a_lesson_says_what_it_asks_what_it_needs_and_how_long_it_takes(lesson):
    path, cells = lesson
    head = source(cells[0])
    assert re.match(rf"# {path.name[:2]} · \S", head)
    assert re.search(r"^\*\*Question\.\*\* [^\n]*\?", head, re.M), "the question, in the first lines, as a question"
    rows = re.findall(r"^\| (\w+) \| (.+) \|$", head, re.M)
    assert [name for name, _ in rows] == HEADER
    assert re.search(r"^\*\*Answer\.\*\* \S", head, re.M), "docs/pages/answers.py holds it"
    course = source(json.loads(LESSONS[0].read_text())["cells"][1])
    minutes = re.search(rf"\({path.name}\) \|.*\| ([\d.]+) \|$", course, re.M)
    assert dict(rows)["takes"].startswith(f"{minutes.group(1)} minutes ")


def test_the_setup_is_short(lesson):
    _, cells = lesson
    code = [cell for cell in cells if cell["cell_type"] == "code" and "parameters" not in tags(cell)]
    assert sum(bool(line.strip()) for line in source(code[0]).splitlines()) <= 6


def test_a_lesson_stands_on_the_one_before(taught):
    path, cells = taught
    before = re.search(r"^\| before \| (.+) \|$", source(cells[0]), re.M).group(1)
    previous, _ = around(path)
    assert f"({previous}.ipynb)" in before if previous else before.startswith(FIRST)


def test_a_lesson_starts_by_hand(taught):
    _, cells = taught
    code = [i for i, cell in enumerate(cells) if cell["cell_type"] == "code"]
    by_hand = [i for i in code if BY_HAND in tags(cells[i])]
    real = [i for i in code if any(f"{call}(" in source(cells[i]) for call in REAL)]
    assert by_hand, "no cell is tagged by-hand"
    assert not real or by_hand[0] < real[0], "something real comes before the example by hand"
    assert any("assert " in source(cells[i]) for i in by_hand), "an example by hand can be checked in the head"
    headings = [source(cell) for cell in cells[: by_hand[0]] if cell["cell_type"] == "markdown"]
    assert any(re.search(r"^## By hand: ", text, re.M) for text in headings)


def test_a_lesson_lets_you_change_one_thing(taught):
    _, cells = taught
    tried = [i for i, cell in enumerate(cells) if TRY_IT in tags(cell)]
    assert tried, "no cell is tagged try-it"
    for i in tried:
        first, *rest = source(cells[i]).splitlines()
        assert re.fullmatch(r"try_\w+ = .+  # .+", first), f"not one thing to change, with what is allowed: {first}"
        assert first.split(" ")[0] in "\n".join(rest), "what is changed is used"
        assert not any(line.startswith("try_") for line in rest), "one thing"
        assert "**Try it.**" in source(cells[i - 1]), "the cell before says what to look for"


def names(tree: ast.AST, context: type) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


def test_nothing_that_is_kept_depends_on_what_you_try(lesson):
    _, cells = lesson
    changed: set[str] = set()
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        tree = ast.parse(source(cell))
        if TRY_IT in tags(cell):
            changed |= names(tree, ast.Store)
        elif BY_HAND not in tags(cell):
            stored = names(tree, ast.Store)
            assert not (changed & names(tree, ast.Load)) - stored, source(cell)[:80]
            changed -= stored


def test_a_lesson_ends_with_three_questions_and_folded_answers(lesson):
    path, cells = lesson
    questions = source(cells[-2] if around(path)[1] else cells[-1])
    assert questions.startswith("## Three questions\n")
    folded = re.findall(r"<details><summary>(.+?)</summary>\n\n(.+?)\n</details>", questions, re.S)
    assert len(folded) == questions.count("<details>") == questions.count("</details>") == 3
    for question, answer in folded:
        assert question.endswith(("?", ".")) and len(answer) > 60


def test_a_lesson_says_what_the_paper_reports_and_leads_on(lesson):
    path, cells = lesson
    _, following = around(path)
    if following:
        assert source(cells[-3]).startswith("## What the paper reports, and what we see\n")
        assert source(cells[-1]).startswith(f"**Next:** [{following[:2]} · ")
        assert f"]({following}.ipynb)" in source(cells[-1])


def test_links_between_lessons_lead_somewhere(lesson):
    _, cells = lesson
    for cell in cells:
        for name in re.findall(r"\]\(([\w./-]+\.(?:ipynb|md))\)", source(cell)):
            assert (FOLDER / name).is_file(), name


def test_the_map_at_the_start_names_every_lesson():
    text = "\n".join(source(cell) for cell in json.loads(LESSONS[0].read_text())["cells"])
    course = text[text.index("## The course") :].split("\n\nA cell marked")[0]
    assert re.findall(r"\((\d\d_\w+\.ipynb)\)", course) == [f"{stem}.ipynb" for stem in COURSE]


def test_an_aside_changes_no_digest_and_any_other_cell_does(tmp_path):
    path = tmp_path / "a.ipynb"
    plain = {"cell_type": "code", "metadata": {}, "source": ["x = 1"]}
    aside = {"cell_type": "code", "metadata": {"tags": [TRY_IT]}, "source": ["try_x = 2  # a number"]}
    prose = {"cell_type": "markdown", "metadata": {}, "source": ["text"]}
    found = []
    for cells in ([plain], [prose, plain, aside], [plain, plain]):
        path.write_text(json.dumps({"cells": cells}))
        found.append(steps.notebook_digest(path))
    assert found[0] == found[1] != found[2]
    assert steps.ASIDES == {BY_HAND, TRY_IT}


def test_the_exercises_are_the_solutions_without_their_lines():
    names = ("exercises", "solutions")
    exercises, solutions = (pipeline.cells(FOLDER / "exercises" / f"{name}.ipynb") for name in names)
    solved = [i for i, cell in enumerate(solutions) if tags(cell) == {"solution"}]
    assert len(solved) == sum(source(cell).count("## ") for cell in solutions)
    for i, (cell, solution) in enumerate(zip(exercises[1:], solutions[1:], strict=True), start=1):
        expected = source(solution).splitlines()[0] if i in solved else source(solution)
        assert source(cell) == expected and expected.startswith("# ") >= (i in solved)


def test_the_solutions_are_right():
    names: dict = {}
    for cell in pipeline.cells(FOLDER / "exercises" / "solutions.ipynb"):
        if cell["cell_type"] == "code":
            exec(compile(cell["source"], "solutions", "exec"), names)
