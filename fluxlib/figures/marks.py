"""Marks of the figures, drawn with seaborn: lines, bars, stacks and maps, intervals over seeds, legends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fluxlib.analysis.statistics import interval
from fluxlib.figures import style
from fluxlib.figures.style import GREY, Style


def over_seeds(values: Iterable[float]) -> tuple[float, float]:
    """seaborn's error bars and bands: the interval of :func:`fluxlib.analysis.statistics.interval`."""
    return interval(values)[1:]


def hues(by: str, looks: Mapping[Any, Style]) -> dict[str, Any]:
    """Arguments that colour the levels of ``by`` in any of seaborn's functions."""
    palette = {name: look.color for name, look in looks.items()}
    return {"hue": by, "hue_order": list(looks), "palette": palette, "legend": False}


def _shown(rows: pd.DataFrame, value: str, looks: Mapping[Any, Style], place: str, by: str) -> pd.DataFrame:
    """One row per mark and seed, only of what has a look: the mean of ``value`` over tasks and repeats."""
    kept = rows[rows[by].isin(list(looks))]
    return kept.groupby([*dict.fromkeys((place, by)), "seed"], sort=False)[value].mean().reset_index()


def at_mean_times(rounds: pd.DataFrame, clock: str, by: str) -> pd.DataFrame:
    """Scored ``rounds``, with the mean of ``clock`` over the seeds of that round and level of ``by``."""
    scored = rounds.dropna(subset=["metric"])
    return scored.assign(**{clock: scored.groupby([by, "round"])[clock].transform("mean")})


def lines(ax: Any, rows: pd.DataFrame, x: str, y: str, by: str, looks: Mapping[Any, Style], **kwargs: Any) -> None:
    """One line per level of ``by``: ``y`` over ``x``, mean over seeds with a band; ``kwargs`` of seaborn's."""
    look = hues(by, looks) | {"style": by, "style_order": list(looks), "errorbar": over_seeds, "markeredgewidth": 0}
    look |= {"markers": {name: own.marker for name, own in looks.items()}}
    look |= {"dashes": {name: own.dashes for name, own in looks.items()}}
    look["err_kws"] = {"alpha": 0.15, "linewidth": 0}
    sns.lineplot(_shown(rows, y, looks, x, by), x=x, y=y, ax=ax, **look | kwargs)


def bars(
    ax: Any,
    rows: pd.DataFrame,
    place: str,
    value: str,
    looks: Mapping[Any, Style],
    by: str = "",
    fmt: str = "",
    horizontal: bool = False,
) -> None:
    """One bar per level of ``place`` (and of ``by``): mean over seeds with its interval.

    Args:
        looks: of the levels of ``by``, or of ``place``.
        fmt: of the numbers that are written beside bars; empty: none.
    """
    by = by or place
    table = _shown(rows, value, looks, place, by)
    if table[place].dtype.kind == "f":
        table = table.astype({place: int})
    look = hues(by, looks) | {"saturation": 1, "edgecolor": "white", "errorbar": over_seeds, "capsize": 0.2}
    order = list(looks) if by == place else None
    x, y = (value, place) if horizontal else (place, value)
    sns.barplot(table, x=x, y=y, order=order, err_kws={"linewidth": 1}, ax=ax, **look)
    if by == place:
        titles = [look.title for look in looks.values()]
        (ax.set_yticks if horizontal else ax.set_xticks)(range(len(looks)), titles)
    _finish_bars(ax, looks, horizontal)
    across, along = (1, 0) if horizontal else (0, 1)
    errors = [line.get_xydata()[4] for line in ax.lines]  # the upper end of seaborn's error bar
    upper = {round(float(spot[across]), 6): spot[along] for spot in errors}
    for patch in ax.patches if fmt else ():
        box = patch.get_bbox()
        middle, end = (box.min[across] + box.max[across]) / 2, box.max[along]
        top = float(np.fmax(end, upper.get(round(float(middle), 6), end)))
        _write(ax, fmt.format(end), (top, middle) if horizontal else (middle, top), horizontal)
    ax.margins(**{"x" if horizontal else "y": 0.14})
    ax.set(**{"xlim" if horizontal else "ylim": (0, None)})


def stacked(
    ax: Any,
    rows: pd.DataFrame,
    place: str,
    part: str,
    value: str,
    looks: Mapping[Any, Style],
    order: Mapping[Any, Style] | None = None,
    total: str = "",
    horizontal: bool = False,
) -> None:
    """One bar per level of ``place``, stacked from the parts in ``looks``.

    Args:
        order: the levels of ``place`` in order, with their titles; None: as they come.
        total: format of the sum at its end; empty: none.
    """
    if order:
        titles = pd.Categorical([order[name].title for name in rows[place]], [look.title for look in order.values()])
        rows = rows.assign(**{place: titles}).sort_values(place, kind="stable").astype({place: str})
    looks = {name: look for name, look in looks.items() if name in set(rows[part])}
    look = hues(part, looks) | {"hue_order": list(looks)[::-1], "multiple": "stack", "discrete": True, "shrink": 0.7}
    edges = {"alpha": 1, "edgecolor": "white", "linewidth": 0.4}
    where = {"y" if horizontal else "x": place}
    sns.histplot(rows[rows[part].isin(list(looks))], **where, weights=value, ax=ax, **look, **edges)
    _finish_bars(ax, looks, horizontal)
    sums = rows.groupby(place, sort=False)[value].sum()
    for index, end in enumerate(sums if total else ()):
        _write(ax, total.format(end), (end, index) if horizontal else (index, end), horizontal)
    if total:
        ax.set(**{"xlim" if horizontal else "ylim": (0, 1.14 * float(sums.max()))})


def _finish_bars(ax: Any, looks: Mapping[Any, Style], horizontal: bool) -> None:
    for container, look in zip(ax.containers, looks.values(), strict=True):
        for patch in container:
            patch.set_hatch(look.hatch)
    ax.grid(axis="y" if horizontal else "x", visible=False)
    ax.set(xlabel="", ylabel="")


def _write(ax: Any, text: str, spot: tuple[float, float], beside: bool) -> None:
    """A number at the end of a bar: above it, or beside it."""
    place: dict[str, Any] = {"xytext": (3, 0), "va": "center"} if beside else {"xytext": (0, 2), "ha": "center"}
    ax.annotate(text, spot, textcoords="offset points", fontsize=7, **place)


def missed(ax: Any, place: float, text: str) -> None:
    """Written upright where a bar would stand, had the target been reached."""
    ax.text(place, 0.03, text, transform=ax.get_xaxis_transform(), rotation=90, ha="center", fontsize=7)


def heat(ax: Any, table: Any, label: str, **kwargs: Any) -> None:
    """A heat map of ``table`` from 0 on, with a colour bar; ``kwargs`` of ``seaborn.heatmap``."""
    sns.heatmap(table, ax=ax, **{"cmap": style.SEQUENTIAL, "vmin": 0, "cbar_kws": {"label": label}} | kwargs)
    ax.grid(visible=False)
    ax.tick_params(rotation=0)


def reference(ax: Any, value: float, text: str = "", vertical: bool = False) -> None:
    """A number to compare with, such as the paper's, as a thin dashed line with its name."""
    (ax.axvline if vertical else ax.axhline)(value, color=GREY, linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)
    if text:
        ax.text(0.99, value, text, transform=ax.get_yaxis_transform(), ha="right", va="bottom", fontsize=7, color=GREY)


def legend(where: Any, looks: Mapping[Any, Style], filled: bool = False, **kwargs: Any) -> None:
    """A legend of a figure or of axes: lines with markers, or ``filled`` patches; ``kwargs`` of matplotlib's."""
    handles: list[Any] = [
        Patch(facecolor=look.color, hatch=look.hatch, edgecolor="white", label=look.title)
        if filled
        else Line2D([], [], color=look.color, marker=look.marker, ls=(0, look.dashes or None), label=look.title)
        for look in looks.values()
    ]
    where.legend(handles=handles, **kwargs)
