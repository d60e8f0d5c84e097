"""The claims table as a picture, and FLUX's speed-up over each method (notebook 08)."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, caption, clock_shapes, drawn, interval_names
from fluxlib.figures.measured import COLORS, MARKERS

FILLS = {"agrees": "full", "agrees in direction": "left", "does not": "none", "not attempted": "none"}
LIMITS = (0.01, 100.0)
"""Ratios beyond are drawn at the edge, as arrows."""


def agreement(readings: pd.DataFrame) -> pd.DataFrame:
    """Ours over the paper's, turned so that 1 and more means the paper's size is reached; with the interval's ends.

    Args:
        readings: of :func:`fluxlib.analysis.claims.readings`. Rows without a number to compare (directions alone) are left out;
            a value on the other side of no effect has a ratio of about 0.
    """
    rows = readings[readings["value"].notna() & readings["size"].gt(0) & readings["size"].ne(1)].copy()
    smaller = rows["better"] == "smaller"
    for name, of in (("ratio", "value"), ("ratio_low", "low"), ("ratio_high", "high")):
        positive = rows[of].clip(lower=1e-12)
        rows[name] = np.where(smaller, rows["size"] / positive, positive / rows["size"])
    ends = np.sort(rows[["ratio_low", "ratio_high"]].to_numpy(), axis=1)
    return rows.assign(ratio_low=ends[:, 0], ratio_high=ends[:, 1])


@drawn
def draw_claims(table: pd.DataFrame, readings: pd.DataFrame) -> Picture:
    """One line per claim: ours over the paper's for each model, and the verdict.

    Args:
        table: of :func:`fluxlib.analysis.claims.claims`.
        readings: of :func:`fluxlib.analysis.claims.readings`.
    """
    figure = Picture(figsize=(8.6, 0.31 * len(table) + 1.1))
    ax = axes_grid(figure, 1, 1)[0, 0]
    places = {slug: place for place, slug in enumerate(table["slug"])}
    found = agreement(readings) if "value" in readings else pd.DataFrame(columns=["slug", "label"])
    labels = list(dict.fromkeys(found["label"]))
    for row in found.to_dict("records"):
        index = labels.index(row["label"])
        _dot(ax, row, places[row["slug"]] + 0.22 * (index % 2) - 0.11, index)
    for index, label in enumerate(labels):
        ax.plot([], [], MARKERS[index], color=COLORS[index], label=label)
    ax.axvline(1, color="#444444", linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)
    ax.set_xscale("log")
    ax.set_xlim(LIMITS[0] / 1.6, LIMITS[1] * 1.6)
    ax.set_xticks([0.01, 0.1, 1, 10, 100], ["≤ 0.01", "0.1", "the paper's", "10", "≥ 100"])
    ax.set_xlabel("ours over the paper's (paper's over ours where smaller is better)")
    texts = [textwrap.fill(f"{row['claim']} ({row['paper']})", 70) for row in table.to_dict("records")]
    ax.set_yticks(range(len(table)), texts, fontsize=6.5)
    ax.set_ylim(len(table) - 0.4, -0.6)
    for place, verdict in enumerate(table["verdict"]):
        weight = "bold" if verdict == "agrees" else "normal"
        color = "#888888" if verdict == "not attempted" else "#000000"
        ax.text(
            1.01,
            place,
            verdict,
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=7,
            weight=weight,
            color=color,
        )
    if labels:
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    seeds = sorted(set(found["seeds"])) if len(found) else []
    caption(
        figure,
        "filled: agrees, half: in direction, empty: does not; no dot: no number to compare",
        f"{'–'.join(map(str, (seeds[0], seeds[-1]) if len(seeds) > 1 else seeds))} seeds, bars: interval"
        if seeds
        else "",
    )
    return figure


def _dot(ax: Any, row: Any, place: float, index: int) -> None:
    """One reading; beyond the axis an arrow at its edge."""
    color, ratio = COLORS[index], row["ratio"]
    low, high = (float(np.clip(row[name], *LIMITS)) for name in ("ratio_low", "ratio_high"))
    if low < high:
        ax.plot([low, high], [place, place], color=color, linewidth=0.8, zorder=1)
    inside = LIMITS[0] <= ratio <= LIMITS[1]
    marker = MARKERS[index] if inside else "<" if ratio < LIMITS[0] else ">"
    fill = FILLS[row["verdict"]]
    ax.plot(
        float(np.clip(ratio, *LIMITS)), place, marker, color=color, fillstyle=fill, markerfacecoloralt="white",
        markerfacecolor="white" if fill == "none" else color, markersize=5.5, markeredgewidth=0.9,
    )  # fmt: skip


@drawn
def draw_speed_ups(table: pd.DataFrame) -> Picture:
    """FLUX's speed-up over each method: one panel per model, one line per task, variant and method.

    An arrow to the right is a lower bound: the other method never arrives in some seed. "never" is FLUX's own miss.

    Args:
        table: of :func:`fluxlib.analysis.claims.speed_ups`.
    """
    panels = list(table.groupby("model", sort=False)) if len(table) else [("no races", table)]
    lines = max(len(part) for _, part in panels)
    figure = Picture(figsize=(3.9 * len(panels) + 0.6, 0.2 * max(lines, 4) + 1.3))
    axes = axes_grid(figure, 1, len(panels), sharex=True)
    for ax, (model, part) in zip(axes[0], panels, strict=True):
        rows = part.to_dict("records")
        for place, row in enumerate(rows):
            _race(ax, row, place)
        texts = [f"{row['task']}{' ' + row['variant'] if row['variant'] else ''}: {style.method(row['baseline']).title}"
                 for row in rows]  # fmt: skip
        ax.set_yticks(range(len(rows)), texts, fontsize=7)
        ax.set_ylim(max(len(rows), 1) - 0.4, -0.6)
        ax.axvline(1, color="#444444", linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)
        ax.set_xscale("log")
        ax.set_title(str(model))
        ax.set_xlabel("FLUX sooner to the target by")
    low, high = axes[0, 0].get_xlim()
    axes[0, 0].set_xlim(min(low, 0.4), max(high, 6.0))
    axes[0, 0].set_xticks([0.5, 1, 2, 5], ["0.5×", "1×", "2×", "5×"])
    axes[0, 0].minorticks_off()
    if len(table):
        caption(figure, f"device clock: {clock_shapes(table)}", interval_names(table["seeds"]), "arrow: at least")
    return figure


def _race(ax: Any, row: Any, place: float) -> None:
    look = style.method(row["baseline"])
    raced = row["seeds"] - row["trivial"]
    if row["ours_missed"] or not raced:
        missed = f"FLUX never ({row['ours_missed']} of {raced})" if row["behind"] else "neither arrives"
        ax.text(1.04, place, missed if raced else "base is at the target", va="center", fontsize=6.5, color="#444444")
        return
    if row["baseline_missed"]:
        ax.plot(row["at_least"], place, ">", color=look.color, markersize=6)
        return
    if row["low"] < row["high"]:
        ax.plot([row["low"], row["high"]], [place, place], color=look.color, linewidth=1.0)
    ax.plot(row["speedup"], place, look.marker, color=look.color)
