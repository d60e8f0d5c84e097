"""The claims table: one row per claim, as a data frame and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fluxlib.analysis.claims import base
from fluxlib.analysis.claims.base import MISSING, VERDICTS, Claim, Reading, Tables
from fluxlib.analysis.claims.paper import CLAIMS
from fluxlib.analysis.claims.races import BEYOND, scores, scores_markdown, speed_up_markdown, speed_ups
from fluxlib.config import REPO_ROOT

BENCHMARKS = REPO_ROOT / "benchmarks" / "results"
UP_TO = "speed_up"
"""The one claim that a single case proves: its verdict is the best of its readings, not the worst."""
HEADER = ("claim", "in the paper", "paper", "ours", "to reach", "scale", "verdict", "reason")


def readings(tables: Tables, listed: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """What the tables say: one row per claim and model; claims without tables have none."""
    rows = []
    for claim in listed:
        for reading in claim.read(claim, tables):
            fields = ("slug", "text", "paper", "size", "better", "unit", "source")
            rows.append({name: getattr(claim, name) for name in fields} | vars(reading))
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else ["slug", "label", "verdict"])


def claims(results: Path, benchmarks: Path | None = BENCHMARKS, listed: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """The claims table of one profile's results, one row per claim, in the order of the paper.

    Runs that did not finish, or longer ones with other settings, are no evidence: they are left out, and named in
    ``attrs["left_out"]`` and below the table.
    The verdict over several models is the weakest of them (the last of :data:`~fluxlib.analysis.claims.base.VERDICTS`), but for
    the paper's "up to", where the best counts; where models differ the reason says so. A claim whose tables are absent
    is ``not attempted``, with what to run as its reason.

    Args:
        results: a folder such as ``data/results/full``; it need not exist.
        benchmarks: folder of benchmark results as JSON.

    Raises:
        TableError: a table that does not fit its schema, by name.
    """
    tables = base.load(results, benchmarks)
    table = pd.DataFrame([_row(claim, claim.read(claim, tables)) for claim in listed])
    table.attrs["left_out"] = tables.left_out
    return table


def _row(claim: Claim, found: list[Reading]) -> dict[str, Any]:
    fixed = {"slug": claim.slug, "claim": claim.text, "in the paper": claim.place, "paper": claim.paper}
    if not found:
        return fixed | {"ours": "", "to reach": claim.bar, "scale": "", "verdict": MISSING, "reason": claim.needs}
    verdicts = [reading.verdict for reading in found]
    verdict = (min if claim.slug == UP_TO else max)(verdicts, key=VERDICTS.index)
    return fixed | {
        "ours": "<br>".join(f"`{r.label}`: {r.ours}" for r in found),
        "to reach": _bar(claim, found),
        "scale": _scale(claim, found),
        "verdict": verdict,
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
    parts = [f"{tasks} task{'s' * (tasks > 1)}"] if tasks else []
    seeds = sorted({r.seeds for r in found} | {r.fewest for r in found if r.fewest})
    if claim.source != "modelled" or max(seeds) > 1:
        parts.append(f"{'–'.join(map(str, seeds))} seed{'s' * (max(seeds) > 1)}")
    parts.append(claim.source)
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
        parts = [reading.verdict] if differ else []
        parts += [reading.reason] if reading.reason else []
        if parts:
            told.append((f"`{reading.label}`: " if len(found) > 1 else "") + "; ".join(parts))
    return told


def to_markdown(table: pd.DataFrame) -> str:
    """The table of :func:`claims` in Markdown, and below it how many claims have which verdict."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in table.to_dict("records"):
        cells = [f"**{row[name]}**" if name == "verdict" else str(row[name]) for name in HEADER]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", summary(table)])


def summary(table: pd.DataFrame) -> str:
    """How many claims have which verdict, in a sentence."""
    counts = table["verdict"].value_counts()
    told = ", ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS if verdict in counts)
    missing = ", ".join(f"`{run}` ({why})" for run, why in table.attrs.get("left_out", {}).items())
    return f"{len(table)} claims: {told}." + (f" Left out: {missing}." if missing else "")


BEYOND_TITLE = (
    "**Beyond the paper**, no evidence for its claims: FLUX+ against FMD+ and FMES+, each with the options that help "
    "it, seeds paired; the target is 95 % of FMD+'s final score. `unchanged`: a plain run stands in for a missing one."
)
SECTIONS = ("races", "claims")
"""Names of a page's generated parts."""


def page_sections(results: Path, benchmarks: Path | None = BENCHMARKS) -> dict[str, str]:
    """Generated parts of a page (:mod:`fluxlib.app.pages`) from one profile's results: ``races`` and ``claims``."""
    tables = base.load(results, benchmarks)
    parts = [races_markdown(tables.timed_races)]
    if tables.rounds is not None:
        parts.insert(0, scores_markdown(scores(tables.plain_races, tables.rounds)))
    return dict(zip(SECTIONS, ("\n\n".join(parts), to_markdown(claims(results, benchmarks))), strict=True))


def races_markdown(found: pd.DataFrame) -> str:
    """The races of the paper's methods as a table, and below it those of FLUX+, which goes beyond the paper."""
    plain, beyond = (speed_ups(found[(found["variant"] == BEYOND) == whether]) for whether in (False, True))
    parts = [speed_up_markdown(plain)]
    if len(beyond):
        parts += [BEYOND_TITLE, speed_up_markdown(beyond)]
    return "\n\n".join(parts)


def goals(benchmarks: Path = BENCHMARKS) -> pd.DataFrame:
    """What this project set out to reach beside the paper's claims, from the benchmarks' results.

    Returns:
        columns ``goal``, ``to reach``, ``ours`` and ``verdict``: ``reached``, ``not reached``, or ``not attempted``
        with the command in ``ours``.
    """
    found = base.load(Path(), benchmarks).benchmarks.get("experts")
    rows = [_goal(found, *goal) for goal in GOALS]
    return pd.DataFrame(rows, columns=["goal", "to reach", "ours", "verdict"])


def _goal(found: dict[str, Any] | None, name: str, reach: float, better: str, read: Any) -> tuple[str, str, str, str]:
    sign = "≤" if better == "smaller" else "≥"
    if found is None:
        return name, f"{sign} {reach:g}", "run `make bench`", MISSING
    value = float(read(found))
    hit = value <= reach if better == "smaller" else value >= reach
    return name, f"{sign} {reach:g}", f"{value:.3g}", "reached" if hit else "not reached"


def _part(rows: list[dict[str, Any]], what: str, column: str) -> float:
    return float(next(row[column] for row in rows if row["what"] == what))


GOALS = (
    (
        "training step of a customised model, times faster than the full one on transformers' fastest backend", 4.0,
        "larger", lambda found: _part(found["step"], "compact", "speedup"),
    ),
    (
        "its gradient and optimizer memory over the full model's", 0.25, "smaller",
        lambda found: _part(found["step"], "compact", "grad_and_state_bytes")
        / _part(found["step"], "full, grouped_mm", "grad_and_state_bytes"),
    ),
    (
        "its forward pass with all experts kept, over the time of that backend", 1.1, "smaller",
        lambda found: 1 / _part(found["forward_all_kept"], "compact, all kept", "speedup"),
    ),
    (
        "largest error of the predicted memory of a step", 0.1, "smaller",
        lambda found: max(abs(row["ratio"] - 1) for row in found["memory"] if "ratio" in row),
    ),
)  # fmt: skip
