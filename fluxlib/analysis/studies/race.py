"""Measured races, as ``benchmarks/race.py`` leaves them: who arrives when, and how far the device clock was off."""

from __future__ import annotations

import pandas as pd

from fluxlib.analysis.time_to_target import TARGET_FRACTION, crossing, final_score

FINAL = 2
"""A final score is the mean of this many last rounds: a run has few."""


def summary(table: pd.DataFrame, fraction: float = TARGET_FRACTION) -> pd.DataFrame:
    """One row per link and method of the studies ``race_score`` and ``race_seconds``.

    Returns:
        ``link``, ``method``, ``rounds``, ``final`` score, ``to_target_s`` to ``fraction`` of FMD's final score on that
        link (NaN: not reached), ``clock_error``: median over rounds of how far the predicted seconds are off.
    """
    parts = table["setting"].str.split(", ", expand=True)
    table = table.assign(method=parts[0], link=parts[1], kind=parts[2])
    scores, seconds = (table[table["study"] == f"race_{name}"] for name in ("score", "seconds"))
    found = []
    for (link, method), run in scores.groupby(["link", "method"], sort=False):
        fmd = scores[(scores["link"] == link) & (scores["method"] == "fmd")]
        target = fraction * final_score(fmd["value"].tolist(), FINAL)
        rounds = seconds[(seconds["link"] == link) & (seconds["method"] == method)].pivot(
            index="x", columns="kind", values="value"
        )
        found.append({
            "link": link, "method": method, "rounds": len(rounds), "final": final_score(run["value"].tolist(), FINAL),
            "to_target_s": crossing(run["x"].tolist(), run["value"].tolist(), target),
            "clock_error": (rounds["predicted"] / rounds["measured"] - 1).abs().median(),
        })  # fmt: skip
    return pd.DataFrame(found)
