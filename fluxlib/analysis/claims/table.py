"""The claims table: one row per claim, as a data frame and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fluxlib.analysis.claims import of_runs, of_studies
from fluxlib.analysis.claims.base import CLAIMS, EVERY, SOURCES, Claim, Tables, load
from fluxlib.analysis.claims.judge import MISSING, VERDICTS, Reading
from fluxlib.analysis.wording import bullets, markdown_table
from fluxlib.config import REPO_ROOT, results_dir

BENCHMARKS = REPO_ROOT / "benchmarks" / "results"
UP_TO = "speed_up"
"""The one claim that a single case proves: its verdict is the best of its readings, not the worst."""
HEADER = ("claim", "in the paper", "paper", "ours", "to reach", "scale", "verdict", "reason")


def read(claim: Claim, tables: Tables) -> list[Reading]:
    """What the tables say on one claim, one reading per model; empty where they are absent."""
    readers = of_studies if claim.notebook else of_runs
    return getattr(readers, claim.ours.get("reader", "study"))(claim, tables)


def readings(tables: Tables, listed: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """What the tables say: one row per claim and model; claims without tables have none."""
    fields = ("slug", "claim", "paper", "size", "better", "unit", "source")
    rows = [
        {name: getattr(claim, name) for name in fields} | vars(reading)
        for claim in listed
        for reading in read(claim, tables)
    ]
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else ["slug", "label", "verdict"])


def claims(results: Path, benchmarks: Path | None = BENCHMARKS, listed: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """The claims table of one profile's results, one row per claim, in the order of the paper.

    Runs that did not finish are no evidence: they are left out, and named in ``attrs["left_out"]`` and below the table.
    The verdict over several models is the weakest of them (the last of
    :data:`~fluxlib.analysis.claims.judge.VERDICTS`), but for the paper's "up to", where the best counts; where models
    differ the reason says so. A claim whose tables are absent is ``not attempted``, with what to run as its reason.

    Args:
        results: a folder such as ``data/results/full``; it need not exist.
        benchmarks: folder of benchmark results as JSON.

    Raises:
        TableError: a table that does not fit its schema, by name.
    """
    tables = load(results, benchmarks)
    table = pd.DataFrame([row(claim, read(claim, tables)) for claim in listed])
    table.attrs["left_out"] = tables.left_out
    return table


def row(claim: Claim, found: list[Reading]) -> dict[str, Any]:
    """One row of the table, from the readings of all models."""
    fixed = {"slug": claim.slug, "claim": claim.claim, "in the paper": claim.place, "paper": claim.paper}
    if not found:
        return fixed | {"ours": "", "to reach": claim.bar, "scale": "", "verdict": MISSING, "reason": claim.missing}
    verdicts = [reading.verdict for reading in found]
    return fixed | {
        "ours": "<br>".join(f"`{r.label}`: {r.ours}" for r in found),
        "to reach": _bar(claim, found),
        "scale": _scale(claim, found),
        "verdict": (min if claim.slug == UP_TO else max)(verdicts, key=VERDICTS.index),
        "reason": "<br>".join(_reasons(found)),
    }


def _bar(claim: Claim, found: list[Reading]) -> str:
    """The number to reach and who reached it; of whom nothing was judged nothing is said."""
    if not claim.bar or all(r.reached is None for r in found):
        return claim.bar
    hits = [r.label for r in found if r.reached]
    told = "reached" if len(hits) == len(found) else "not reached" if not hits else f"by `{'`, `'.join(hits)}`"
    return f"{claim.bar}: {told}"


def _scale(claim: Claim, found: list[Reading]) -> str:
    """Tasks, seeds, clock, and what is measured: what the models have in common is said once."""
    tasks = max(len(r.tasks) for r in found)
    seeds = sorted({r.seeds for r in found} | {r.fewest for r in found if r.fewest})
    parts = [f"{tasks} task{'s' * (tasks > 1)}"] if tasks else []
    if claim.is_measured or max(seeds) > 1:
        parts.append(f"{'–'.join(map(str, seeds))} seed{'s' * (max(seeds) > 1)}")
    parts.append(SOURCES.get(claim.source, claim.source))
    clocks: dict[str, list[str]] = {}
    for reading in found:
        kind, _, shapes = reading.clock.partition(", ")
        if shapes and shapes not in clocks.setdefault(kind, []):
            clocks[kind].append(shapes)
    return "; ".join([*parts, *(f"{kind}: {' and '.join(shapes)}" for kind, shapes in clocks.items())])


def _reasons(found: list[Reading]) -> list[str]:
    differ = len({r.verdict for r in found}) > 1
    told = []
    for reading in found:
        parts = [part for part in (reading.verdict if differ else "", reading.reason) if part]
        if parts:
            told.append((f"`{reading.label}`: " if len(found) > 1 else "") + "; ".join(parts))
    return told


def to_markdown(table: pd.DataFrame) -> str:
    """The table of :func:`claims` in Markdown, and below it how many claims have which verdict."""
    bold = table.assign(verdict="**" + table["verdict"] + "**")
    return f"{markdown_table(HEADER, bold[list(HEADER)].to_numpy().tolist())}\n\n{summary(table)}"


def summary(table: pd.DataFrame) -> str:
    """How many claims have which verdict, in a sentence."""
    counts = table["verdict"].value_counts()
    told = ", ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS if verdict in counts)
    missing = ", ".join(f"`{run}` ({why})" for run, why in table.attrs.get("left_out", {}).items())
    return f"{len(table)} claims: {told}." + (f" Left out: {missing}." if missing else "")


def page(results: Path | None = None) -> str:
    """``docs/claims.md``: the claims table of ``results``, the tracked profile's if it is not given."""
    rule, paper = "`fluxlib/analysis/claims/judge.py`", "`fluxlib/analysis/claims/claims.yaml`"
    intro = (
        "# The paper's claims\n\nThe paper's value beside ours: mean over seeds, with its 95 % t interval, and a"
        f" verdict by one rule ({rule}). Of several models the weakest counts. The paper's values are in {paper};"
        " `fluxlib claims --profile full` prints this table anew."
    )
    return f"{intro}\n\n{to_markdown(claims(results or results_dir('full')))}\n"


def in_notebook(notebook: str, table: pd.DataFrame, where: str) -> str:
    """The claims that one study notebook tells on, as Markdown: the paper's number, ours, and the verdict.

    Args:
        notebook: its name, e.g. ``01_profiling``.
        table: its ``measurements``, of one model.
        where: model and tasks, in words.
    """
    return f"On {where}:\n\n" + bullets(_lines([c for c in EVERY if c.notebook == notebook], table))


def _lines(listed: Iterable[Claim], table: pd.DataFrame) -> Iterable[str]:
    for claim in listed:
        for reading in read(claim, Tables(measurements={claim.notebook: {"": table}})):
            paper = f"paper {claim.paper}, " if claim.paper else f"{claim.bar}, " if claim.bar else ""
            label = f" ({reading.label})" if reading.label else ""
            why = f"; {reading.reason}" if reading.reason else ""
            yield f"{claim.claim}{label}: {paper}ours **{reading.ours}**: *{reading.verdict}*{why}"


GOALS: tuple[tuple[str, str, str, str, str, str, float], ...] = (
    ("training step of a customised model, times faster than the full one on transformers' fastest backend",
     "step", "compact", "speedup", "", "≥", 4.0),
    ("its gradient and optimizer memory over the full model's",
     "step", "compact", "grad_and_state_bytes", "full, grouped_mm", "≤", 0.25),
    ("its forward pass with all experts kept, times faster than that backend's",
     "forward_all_kept", "compact, all kept", "speedup", "", "≥", 1 / 1.1),
    ("memory of a step over what was predicted", "memory", "compact", "ratio", "", "≤", 1.1),
)  # fmt: skip
"""Beside the paper's claims: goal; rows, row and column of ``benchmarks/results/experts.json``; over which row; bar."""


def goals(benchmarks: Path = BENCHMARKS) -> pd.DataFrame:
    """What this project set out to reach beside the paper's claims, from the benchmarks' results.

    Returns:
        columns ``goal``, ``to reach``, ``ours`` and ``verdict``: ``reached``, ``not reached``, or ``not attempted``
        with the command in ``ours``.
    """
    found = load(Path(), benchmarks).benchmarks.get("experts")
    rows = []
    for goal, part, what, column, over, sign, bar in GOALS:
        ours, verdict = "run `make bench`", MISSING
        if found:
            by_name = {item["what"]: item.get(column) for item in found[part]}
            value = by_name[what] / (by_name[over] if over else 1)
            ours, verdict = f"{value:.3g}", "reached" if (value >= bar) == (sign == "≥") else "not reached"
        rows.append((goal, f"{sign} {bar:.3g}", ours, verdict))
    return pd.DataFrame(rows, columns=["goal", "to reach", "ours", "verdict"])
