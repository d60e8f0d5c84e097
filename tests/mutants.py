"""``make mutants``: what the tests miss. The code is changed in one place at a time, and its tests must notice.

Mutants are mutmut's (its operators and its walk through a file). They are run here and not by mutmut, which leaves out
every decorated function and class. A process that has imported torch is forked for each
mutant, so one takes as long as its tests: those of the file first (:data:`TESTS`), until one fails.

No mutants are made of texts, annotations, decorators, what an error or a log says, and what the interpreter checks
anyway (``strict=True``). Rows of ``data/results/mutants.csv`` that were killed are kept as long as the line is the
same; survivors without a reason are tried again. ``docs/mutants.md`` is written from it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE, PAGE = ROOT / "data" / "results" / "mutants.csv", ROOT / "docs" / "mutants.md"

TESTS = {
    "moe": [f"moe/test_{n}.py" for n in ("dispatch", "compact", "find", "capture", "mask", "quantized", "offloaded",
                                         "adapter", "replacing", "product")],
    "merging": ["test_merging.py"],
    "roles.py": ["test_roles.py", "federation/test_utilities.py"],
    "gradients": ["test_gradients.py", "test_gradient_quality.py"],
    "gradients/local.py": ["test_gradients.py", "moe/test_adapter.py", "methods/test_methods.py"],
    "federation/server/aggregation.py": [f"federation/test_{n}.py" for n in ("aggregation", "robust", "strategy")],
    "federation/protocol/sync.py": [f"federation/test_{n}.py"
                                    for n in ("sync", "strategy", "wire_options", "adapters")],
    "federation/store/checkpoint.py": ["federation/test_checkpoint.py"],
}  # fmt: skip
"""What is mutated, and which tests concern it; a file's own, ``test_<name>.py``, come first."""

PACKAGES = tuple(dict.fromkeys(place.partition("/")[0].removesuffix(".py") for place in TESTS))

SLOW = ("on_a_mini_model", "backward_pass_measures_all", "fits_where_what_it_gives_up")
"""Parts of the names of tests that take long and are left out here."""

SILENT = re.compile(r"log\.|cast\(|len\(|isinstance\(")
"""Calls in which nothing is changed."""

KILLED, SURVIVED = "killed", "survived"
EQUIVALENT = "equivalent"
"""How the reason of a survivor begins that no test can kill, since it does the same."""


@dataclass
class Row:
    """One mutant: a line before and after, what became of it, and why it lives."""

    package: str
    file: str
    line: int
    before: str
    after: str
    outcome: str = ""
    seconds: float = 0.0
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.before, self.after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="so many mutants, the same number of each package; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    if not options.page:
        rows = {row.key: row for row in read_rows()}
        run(sample(options.sample, options.seed), rows)
    PAGE.write_text(page(read_rows()))
    print(PAGE.read_text())


def read_rows() -> list[Row]:
    if not TABLE.is_file():
        return []
    with TABLE.open(newline="") as file:
        return [Row(**one | {"line": int(one["line"]), "seconds": float(one["seconds"])})  # type: ignore[arg-type]
                for one in csv.DictReader(file)]  # fmt: skip


def write_rows(rows: list[Row]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted(rows, key=lambda row: (row.file, row.line, row.after)))


# -- making mutants --------------------------------------------------------------------------------------------------


def sample(count: int | None, seed: int) -> list[tuple[Row, str]]:
    """Rows and whole mutated files, in an order in which packages take turns."""
    chosen = []
    for package in PACKAGES:
        roots = [ROOT / "fluxlib" / place for place in TESTS if place.startswith(package)]
        paths = sorted({path for root in roots for path in ([root] if root.is_file() else root.rglob("*.py"))})
        places = [place for path in paths if path.name != "__init__.py" for place in mutations(path)]
        random.Random(seed).shuffle(places)
        most, unique = math.ceil(count / len(PACKAGES)) if count else len(places), {}
        for place in places:
            if len(unique) < most and (found := mutant(package, *place)):
                unique.setdefault(found[0].key, found)
        wanted = list(unique.values())
        print(f"{package}: {len(wanted)} mutants of {len(places)}", flush=True)
        chosen += [(index / len(wanted), found) for index, found in enumerate(wanted)]
    return [found for _, found in sorted(chosen, key=lambda item: item[0])]


def mutations(path: Path) -> Iterator[tuple[Path, Any, Any]]:
    """mutmut's mutations of a file, in decorated functions and classes too: ``(path, module, mutation)``."""
    import libcst as cst
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators, operator_string
    from mutmut.mutation.pragma_handling import IgnoredCode

    class Visitor(MutationVisitor):
        def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
            if isinstance(node, cst.FunctionDef | cst.ClassDef):
                return False
            silent = isinstance(node, cst.Call) and SILENT.match(module.code_for_node(node))
            return bool(silent) or isinstance(node, cst.Annotation | cst.Decorator | cst.Raise | cst.ImportFrom)

    module = cst.parse_module(path.read_text())
    wrapper = cst.MetadataWrapper(module, unsafe_skip_copy=True)
    operators = [pair for pair in mutation_operators if pair[1] is not operator_string]
    visitor = Visitor(operators, IgnoredCode(set(), set(), set()))
    wrapper.visit(visitor)
    for mutation in visitor.mutations:
        yield path, module, mutation


def mutant(package: str, path: Path, module: Any, mutation: Any) -> tuple[Row, str] | None:
    """The row and the text of a mutated file; None where it is no program, or the same one."""
    from mutmut.mutation.file_mutation import deep_replace

    before, changed = module.code, deep_replace(module, mutation.original_node, mutation.mutated_node)
    after = changed.code  # type: ignore[union-attr]
    with contextlib.suppress(SyntaxError):
        compile(after, str(path), "exec")
        pairs = zip(before.splitlines(), after.splitlines(), strict=False)
        line, (old, new) = next(((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1]), (0, ("", "")))
        plain = [re.sub(r",? ?strict=\w+", "", text) for text in (before, after)]
        if line and plain[0] != plain[1]:
            return Row(package, str(path.relative_to(ROOT)), line, old.strip(), new.strip()), after
    return None


# -- running them ----------------------------------------------------------------------------------------------------


def run(mutants: list[tuple[Row, str]], known: dict[tuple[str, str, str], Row]) -> None:
    """Try every mutant that is not known to be killed or to be alive for a reason; the table is written as it goes."""
    limits = {}
    for place, names in TESTS.items():
        code, seconds, modules = attempt(paths_of(names), "", "", 1800)
        assert code == 0, f"the tests of {place} fail without a mutant: pytest ended with {code}"
        limits[place] = 30 + 3 * seconds
        print(f"{place}: {seconds:.1f} s without a mutant", flush=True)
        for name in modules:  # once for all mutants
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    assert "fluxlib" not in sys.modules, "a mutant of a module that is there already would not be seen"
    done = []
    for row, text in mutants:
        before = known.pop(row.key, row)
        if before.outcome != KILLED and not before.reason:
            place = place_of(row)
            own = f"/test_{Path(row.file).stem}.py"
            names = sorted(TESTS[place], key=lambda name: not name.endswith(own))
            code, row.seconds, _ = attempt(paths_of(names), row.file, text, limits[place])
            assert code != 5, f"no test was collected for {row.file}"
            row.outcome, row.seconds = KILLED if code else SURVIVED, round(row.seconds, 1)
            print(f"{row.outcome}  {row.seconds:.1f} s  {row.file}:{row.line}  {row.before} -> {row.after}", flush=True)
        else:
            row.outcome, row.seconds, row.reason = before.outcome, before.seconds, before.reason
        done.append(row)
        write_rows([*done, *known.values()])
    write_rows(done)


def place_of(row: Row) -> str:
    """The entry of :data:`TESTS` that a mutant belongs to."""
    return max((place for place in TESTS if row.file.startswith(f"fluxlib/{place}")), key=len)


def paths_of(names: list[str]) -> list[str]:
    return [str(ROOT / "tests" / name) for name in names]


def attempt(tests: list[str], file: str, text: str, limit_s: float) -> tuple[int, float, list[str]]:
    """Pytest's exit code (killed by the limit: 124), the seconds, and which other modules were imported."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = child(tests, file, text, folder)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)
    status = None
    while status is None and time.monotonic() - start < limit_s:
        time.sleep(0.02)
        ended, found = os.waitpid(pid, os.WNOHANG)
        status = found if ended else None
    if status is None:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    seconds, listed = time.monotonic() - start, folder / "modules.json"
    modules = json.loads(listed.read_text()) if listed.is_file() else []
    shutil.rmtree(folder, ignore_errors=True)
    return 124 if status is None else os.waitstatus_to_exitcode(status), seconds, modules


def child(tests: list[str], file: str, text: str, folder: Path) -> int:
    """Run the tests in this process, with ``text`` in the place of ``file``."""
    import pytest

    os.setpgid(0, 0)
    with (folder / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if file:
        sys.meta_path.insert(0, Changed(file, text))  # type: ignore[arg-type]
    options = "-x -q --no-header --tb=no -p no:cacheprovider -p no:xdist -W ignore::pytest.PytestAssertRewriteWarning"
    more = ["-k", f"not ({' or '.join(SLOW)})", f"--basetemp={folder / 'tmp'}", f"--rootdir={ROOT}"]
    code = int(pytest.main([*options.split(), *more, *tests]))
    if not file:
        ours = tuple(str(ROOT / place) for place in ("fluxlib", "tests", "benchmarks"))
        places = {name: getattr(one, "__file__", None) or "" for name, one in sys.modules.items() if name[:2] != "__"}
        others = [name for name, place in places.items() if not place.startswith(ours)]
        (folder / "modules.json").write_text(json.dumps(others))
    return code


class Changed(importlib.machinery.SourceFileLoader):
    """Finds and loads one module of fluxlib with another text."""

    def __init__(self, file: str, text: str) -> None:
        super().__init__(file.removesuffix(".py").replace("/", "."), str(ROOT / file))
        self.text = text

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.text, self.path, "exec", dont_inherit=True)


# -- the page --------------------------------------------------------------------------------------------------------


def interval(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, hits / count
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


INTRODUCTION = """\
# What the tests notice

`make mutants` changes the code in one place at a time (mutmut's operators: a sign, a bound, an argument left out, a
value that becomes `None`) and runs the tests of that package. A change that no test notices is a survivor. The score is
the share that was noticed, of all changes that change what the code does, with Wilson's 95 % interval. All rows are
in `data/results/mutants.csv`; the same command writes this page.

| package | mutants | killed | equivalent | survived | score | 95 % interval |
|---|---|---|---|---|---|---|"""


def page(rows: list[Row]) -> str:
    """``docs/mutants.md``."""
    lines = [INTRODUCTION]
    for package in (*PACKAGES, "all"):
        mine = [row for row in rows if package in (row.package, "all")]
        killed = sum(row.outcome == KILLED for row in mine)
        same = sum(row.outcome == SURVIVED and row.reason.startswith(EQUIVALENT) for row in mine)
        if count := len(mine) - same:
            low, high = interval(killed, count)
            score = f"{killed / count:.1%} | {low:.1%} to {high:.1%}"
            lines.append(f"| {package} | {len(mine)} | {killed} | {same} | {count - killed} | {score} |")
    lines += ["", "## Survivors", ""]
    for row in rows:
        if row.outcome == SURVIVED:
            change = f"`{row.file}:{row.line}` `{row.before}` → `{row.after}`"
            lines.append(f"- {change}: {row.reason or 'not looked at yet'}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
