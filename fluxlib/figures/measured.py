"""What figures of the ``measurements`` table share: values per seed, bars and lines with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.figures import style
from fluxlib.figures.canvas import caption, interval, interval_name, unique

COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


def study(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of one study.

    Raises:
        ValueError: there are none, with the studies that there are.
    """
    rows = table[table["study"] == name]
    if rows.empty:
        raise ValueError(f"measurements hold no study {name!r}; there are {', '.join(table['study'].unique())}")
    return rows


def per_seed(rows: pd.DataFrame, *keys: str) -> pd.Series:
    """Mean over tasks and repeats for each seed; indexed by ``keys`` and seed."""
    return rows.groupby([*keys, "seed"], sort=False)["value"].mean()


def middle(values: np.ndarray, band: str) -> tuple[float, float, float]:
    """Mean, low and high over seeds: the project's interval, or with ``range`` the smallest and the largest.

    On a logarithmic axis a t interval of few seeds may reach below zero; the range does not.
    """
    if band == "range" and len(values):
        return float(np.mean(values)), float(np.min(values)), float(np.max(values))
    return interval(values)


def spread(rows: pd.DataFrame) -> tuple[float, float, float]:
    """Mean over seeds, and how far the interval reaches below and above."""
    mean, low, high = interval(per_seed(rows).to_numpy())
    return mean, mean - low, high - mean


def lines(
    ax: Any,
    rows: pd.DataFrame,
    settings: Sequence[str],
    x: str = "x",
    labels: Sequence[str] | None = None,
    band: str = "interval",
) -> None:
    """One line per setting over ``x``, mean over seeds, with a band."""
    for index, (setting, label) in enumerate(zip(settings, labels or settings, strict=True)):
        own = rows[rows["setting"] == setting]
        places = sorted(own[x].dropna().unique())
        found = np.array([middle(per_seed(own[own[x] == place]).to_numpy(), band) for place in places])
        ax.plot(places, found[:, 0], color=COLORS[index], marker=MARKERS[index], linestyle=LINES[index], label=label)
        if own["seed"].nunique() > 1:
            ax.fill_between(places, found[:, 1], found[:, 2], color=COLORS[index], alpha=0.15, linewidth=0)


def bars(
    ax: Any,
    rows: pd.DataFrame,
    settings: Sequence[str],
    fmt: str = "{:.3f}",
    horizontal: bool = False,
    alike: bool = False,
) -> None:
    """One bar per setting with its number beside it; error bars where there are seeds for one.

    Args:
        alike: one colour for all, for settings that are steps of one quantity.
    """
    many = rows["seed"].nunique() > 1
    for index, setting in enumerate(settings):
        mean, below, above = spread(rows[rows["setting"] == setting])
        error = [[below], [above]] if many else None
        place = 0 if alike else index % len(COLORS)
        look = {"color": COLORS[place], "hatch": HATCHES[place], "edgecolor": "white", "capsize": 2}
        if horizontal:
            ax.barh(index, mean, 0.7, xerr=error, **look)
            ax.annotate(
                fmt.format(mean), (mean + above, index), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
        else:
            ax.bar(index, mean, 0.7, yerr=error, **look)
            ax.annotate(
                fmt.format(mean), (index, mean + above), (0, 2), textcoords="offset points", ha="center", fontsize=7
            )
    if horizontal:
        ax.set_yticks(range(len(settings)), settings)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.margins(x=0.14)
        ax.set_xlim(left=0)
    else:
        ax.set_xticks(range(len(settings)), settings)
        ax.grid(axis="x", visible=False)
        ax.margins(y=0.12)
        ax.set_ylim(bottom=0)


def curve(ax: Any, rows: pd.DataFrame, over: str, scale: float = 1.0, band: str = "interval", **look: Any) -> None:
    """Mean over seeds along the column ``over``, with error bars where there are seeds for them."""
    places = sorted(rows[over].unique())
    found = scale * np.array([middle(per_seed(rows[rows[over] == place]).to_numpy(), band) for place in places])
    if rows["seed"].nunique() > 1:
        ax.errorbar(places, found[:, 0], yerr=np.abs(found[:, 1:].T - found[:, 0]), capsize=2, **look)
    else:
        ax.plot(places, found[:, 0], **look)


def paper_line(ax: Any, value: float, text: str, place: float = 0.99, horizontal: bool = True) -> None:
    """The paper's number as a thin dashed line with its name."""
    if horizontal:
        ax.axhline(value, color="#444444", linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)
        ax.text(
            place, value, text, transform=ax.get_yaxis_transform(), ha="right", va="bottom", fontsize=7, color="#444444"
        )
    else:
        ax.axvline(value, color="#444444", linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)


def footer(figure: Any, rows: pd.DataFrame, *parts: str, chance: bool = True, band: str = "interval") -> None:
    """Model, tasks, seeds and what bands are, below the figure.

    Args:
        chance: False: nothing was drawn, so seeds mean nothing.
    """
    names = [name for name in pd.unique(rows["task"]) if name]
    tasks = ", ".join(names) if len(names) < 3 else f"{len(names)} tasks"
    count = int(rows["seed"].nunique())
    name = f"{count} seeds: mean and min to max" if band == "range" and count > 1 else interval_name(count)
    seeds = name if chance else ""
    caption(figure, unique(rows, "model"), tasks, *parts, seeds)


def legend_below(figure: Any, ax: Any, columns: int = 4) -> None:
    """One legend for all panels, under them."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=columns, fontsize=8)


def shades(count: int) -> list[Any]:
    """Colours for layers, from dark to light, without the palest."""
    return style.colormap(count + 1)[:count]
