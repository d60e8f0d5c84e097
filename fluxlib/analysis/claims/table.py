"""The claims table: one row per claim, as a data frame and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from fluxlib.analysis.claims import of_runs, of_studies
from fluxlib.analysis.claims.judge import CLAIMS, EVERY, MISSING, VERDICTS, Claim, Reading
from fluxlib.analysis.claims.tables import Tables
from fluxlib.analysis.wording import markdown_table

SOURCES = {"both": "scores and bytes measured, seconds modelled"}
REPRODUCE = "run `make reproduce PROFILE=full`"
UP_TO = "speed_up"
"""The one claim that a single case proves: its verdict is the best of its readings, not the worst."""
HEADER = ("claim", "in the paper", "paper", "ours", "to reach", "scale", "verdict", "reason", "verify")


def read(claim: Claim, tables: Tables) -> list[Reading]:
    """What the tables say on one claim, one reading per model; empty where they are absent."""
    readers = of_studies if claim.notebook else of_runs
    return list(getattr(readers, claim.ours.get("reader", "study"))(claim, tables))


def readings(tables: Tables) -> pd.DataFrame:
    """What the tables say: one row per claim of the paper and model; claims without tables have none."""
    fields = ("slug", "claim", "paper", "size", "better", "unit", "source")
    rows = [
        {name: getattr(claim, name) for name in fields} | vars(reading)
        for claim in CLAIMS
        for reading in read(claim, tables)
    ]
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else ["slug", "label", "verdict"])


def claims(tables: Tables, listed: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """The claims table of one profile's results, one row per claim: the paper's in its order, or :data:`OWN`.

    Runs that did not finish are named in ``attrs["left_out"]`` and below the table. The verdict over several models is
    the weakest of them (the last of :data:`VERDICTS`), but for the paper's "up to", where the best counts; where models
    differ the reason says so. A claim whose tables are absent is ``not attempted``, with what to run as its reason.
    """
    table = pd.DataFrame([row(claim, read(claim, tables)) for claim in listed])
    table.attrs["left_out"] = tables.left_out
    return table


def row(claim: Claim, found: list[Reading]) -> dict[str, Any]:
    """One row of the table, from the readings of all models."""
    fixed = {"slug": claim.slug, "claim": claim.claim, "where" if claim.own else "in the paper": claim.place}
    fixed |= {"verify": f"`{claim.slug}`"} | ({} if claim.own else {"paper": claim.paper})
    if not found:
        missing = claim.needs or REPRODUCE + (f": notebook `{claim.notebook}`" if claim.notebook else "")
        return fixed | {"ours": "", "to reach": claim.bar, "scale": "", "verdict": MISSING, "reason": missing}
    verdicts = [reading.verdict for reading in found]
    differ = len(set(verdicts)) > 1
    reasons = {r.label: "; ".join(filter(None, (r.verdict if differ else "", r.reason))) for r in found}
    named = (f"`{label}`: {why}" if len(found) > 1 else why for label, why in reasons.items() if why)
    return fixed | {
        "ours": "<br>".join(f"`{r.label}`: {r.ours}" for r in found),
        "to reach": _bar(claim, found),
        "scale": _scale(claim, found),
        "verdict": (min if claim.slug == UP_TO else max)(verdicts, key=VERDICTS.index),
        "reason": "<br>".join(named),
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
    if claim.source != "modelled" or max(seeds) > 1:
        parts.append(f"{'–'.join(map(str, seeds))} seed{'s' * (max(seeds) > 1)}")
    parts.append(SOURCES.get(claim.source, claim.source))
    clocks = dict.fromkeys(tuple(r.clock.split(", ", 1)) for r in found if r.clock)
    for kind in dict.fromkeys(kind for kind, _ in clocks):
        parts.append(f"{kind}: {' and '.join(shapes for own, shapes in clocks if own == kind)}")
    return "; ".join(parts)


def to_markdown(table: pd.DataFrame, header: Sequence[str] = HEADER) -> str:
    """The table of :func:`claims` in Markdown, and below it how many claims have which verdict."""
    bold = table.assign(verdict="**" + table["verdict"] + "**")
    return f"{markdown_table(header, bold[list(header)].to_numpy().tolist())}\n\n{summary(table)}"


def summary(table: pd.DataFrame) -> str:
    """How many claims have which verdict, in a sentence."""
    counts = table["verdict"].value_counts()
    told = ", ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS if verdict in counts)
    missing = ", ".join(f"`{run}` ({why})" for run, why in table.attrs.get("left_out", {}).items())
    return f"{len(table)} claims: {told}." + (f" Left out: {missing}." if missing else "")


def in_notebook(notebook: str, table: pd.DataFrame, where: str) -> str:
    """The claims that one study notebook tells on, from its ``measurements`` of one model, as Markdown.

    ``where`` says model and tasks in words.
    """
    lines = []
    for claim in EVERY:
        for reading in read(claim, Tables(measurements={notebook: {"": table}})) if claim.notebook == notebook else ():
            paper = f"paper {claim.paper}, " if claim.paper else f"{claim.bar}, " if claim.bar else ""
            label = f" ({reading.label})" if reading.label else ""
            why = f"; {reading.reason}" if reading.reason else ""
            lines.append(f"- {claim.claim}{label}: {paper}ours **{reading.ours}**: *{reading.verdict}*{why}")
    return f"On {where}:\n\n" + "\n".join(lines)
