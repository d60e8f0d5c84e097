"""The claims table as a picture (notebook 08)."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, caption, drawn, panels

FILLS = {"agrees": "full", "agrees in direction": "left", "does not": "none", "not attempted": "none"}
LIMITS = (0.01, 100.0)
"""Ratios beyond are drawn at the edge, as arrows."""


def agreement(readings: pd.DataFrame) -> pd.DataFrame:
    """Ours over the paper's (``ratio``), turned so that 1 and more means the paper's size is reached; and its interval.

    Of :func:`fluxlib.analysis.claims.readings`, without rows that have no number to compare (directions alone). A value
    on the other side of no effect has a ratio of about 0.
    """
    rows = readings[readings["value"].notna() & readings["size"].gt(0) & readings["size"].ne(1)]
    ours, size = rows[["value", "low", "high"]].clip(lower=1e-12).to_numpy(), rows[["size"]].to_numpy()
    ratios = np.where(rows[["better"]].to_numpy() == "smaller", size / ours, ours / size)
    low, high = np.sort(ratios[:, 1:], axis=1).T
    return rows.assign(ratio=ratios[:, 0], ratio_low=low, ratio_high=high)


@drawn
def claims(table: pd.DataFrame, readings: pd.DataFrame) -> Picture:
    """One line per claim: ours over the paper's for each model, and the verdict.

    ``table`` and ``readings`` are those of :mod:`fluxlib.analysis.claims`.
    """
    figure, ax = panels(readings if len(readings) else table, (8.6, 0.31 * len(table) + 1.1))
    places = {slug: place for place, slug in enumerate(table["slug"])}
    found = agreement(readings) if "value" in readings else pd.DataFrame(columns=["slug", "label"])
    looks = style.of_settings(found["label"].unique())
    for row in found.to_dict("records"):
        index = list(looks).index(row["label"])
        _dot(ax, row, places[row["slug"]] + 0.22 * (index % 2) - 0.11, looks[row["label"]])
    marks.reference(ax, 1, vertical=True)
    ax.set(xscale="log", xlim=(LIMITS[0] / 1.6, LIMITS[1] * 1.6), ylim=(len(table) - 0.4, -0.6))
    ax.set_xticks([0.01, 0.1, 1, 10, 100], ["≤ 0.01", "0.1", "the paper's", "10", "≥ 100"])
    ax.set_xlabel("ours over the paper's (paper's over ours where smaller is better)")
    texts = [textwrap.fill(f"{row['claim']} ({row['paper']})", 70) for row in table.to_dict("records")]
    ax.set_yticks(range(len(table)), texts, fontsize=6.5)
    for place, verdict in enumerate(table["verdict"]):
        look = {"weight": "bold" if verdict == "agrees" else "normal", "fontsize": 7, "va": "center"}
        color = "#888888" if verdict == "not attempted" else "#000000"
        ax.text(1.01, place, verdict, transform=ax.get_yaxis_transform(), color=color, **look)
    if looks:
        dots = {name: replace(look, dashes=(0, 1)) for name, look in looks.items()}
        marks.legend(figure, dots, loc="outside upper center", ncols=4)
    seeds = "–".join(map(str, sorted({found["seeds"].min(), found["seeds"].max()}))) if len(found) else ""
    filled = "filled: agrees, half: in direction, empty: does not; no dot: no number to compare"
    caption(figure, filled, f"{seeds} seeds, bars: interval" if seeds else "")
    return figure


def _dot(ax: Any, row: Any, place: float, look: style.Style) -> None:
    """One reading; beyond the axis an arrow at its edge."""
    ratio, fill = row["ratio"], FILLS[row["verdict"]]
    ax.plot(np.clip([row["ratio_low"], row["ratio_high"]], *LIMITS), [place, place], color=look.color, lw=0.8, zorder=1)
    marker = "<" if ratio < LIMITS[0] else ">" if ratio > LIMITS[1] else look.marker
    face = {"markerfacecolor": "white" if fill == "none" else look.color, "markerfacecoloralt": "white"}
    ax.plot(np.clip(ratio, *LIMITS), place, marker, color=look.color, fillstyle=fill, markersize=5.5, **face)
