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


def lines(ax: Any, rows: pd.DataFrame, x: str, y: str, by: str, looks: Mapping[Any, Style], **kwargs: Any) -> None:
    """One line per level of ``by``: ``y`` over ``x``, mean over seeds with a band; ``kwargs`` of seaborn's."""
    look = hues(by, looks) | {"style": by, "style_order": list(looks), "errorbar": over_seeds, "markeredgewidth": 0}
    look |= {"markers": {name: own.marker for name, own in looks.items()}}
    look |= {"dashes": {name: own.dashes for name, own in looks.items()}}
    look["err_kws"] = {"alpha": 0.15, "linewidth": 0}
    sns.lineplot(_shown(rows, y, looks, x, by), x=x, y=y, ax=ax, **look | kwargs)


def curves(
    ax: Any, rounds: pd.DataFrame, clock: str, by: str, looks: Mapping[Any, Style], score: str = "metric", **kwargs: Any
) -> None:
    """:func:`lines` of ``score`` over the mean of ``clock`` over the seeds of each scored round and level of ``by``."""
    scored = rounds.dropna(subset=["metric"])
    times = scored.groupby([by, "round"])[clock].transform("mean")
    lines(ax, scored.assign(**{clock: times}), clock, score, by, looks, **kwargs)
    ax.set(xlabel=style.CLOCKS[clock])


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

    ``looks`` are those of the levels of ``by``, or of ``place``; ``fmt``: of the numbers beside bars, empty: none.
    """
    by, (across, along) = by or place, "yx" if horizontal else "xy"
    table = _shown(rows, value, looks, place, by)
    if table[place].dtype.kind == "f":
        table = table.astype({place: int})
    look = hues(by, looks) | {"saturation": 1, "edgecolor": "white", "errorbar": over_seeds, "capsize": 0.2}
    look |= {across: place, along: value, "order": list(looks) if by == place else None}
    sns.barplot(table, err_kws={"linewidth": 1}, ax=ax, **look)
    if by == place:
        ax.set(**{f"{across}ticks": range(len(looks)), f"{across}ticklabels": [own.title for own in looks.values()]})
    _finish_bars(ax, looks, across)
    for patch, error in zip(ax.patches, ax.lines, strict=True) if fmt else ():
        box, i = patch.get_bbox(), "xy".index(along)
        end, high = box.max[i], error.get_xydata()[4, i]  # the upper end of seaborn's error bar
        _write(ax, fmt.format(end), (box.min[1 - i] + box.max[1 - i]) / 2, float(np.fmax(end, high)), across)
    ax.margins(**{along: 0.14})
    ax.set(**{f"{along}lim": (0, None)})


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

    ``order``: the levels of ``place``, with their titles; None: as they come. ``total``: format of the sum at the end.
    """
    if order:
        titles = pd.Categorical([order[name].title for name in rows[place]], [look.title for look in order.values()])
        rows = rows.assign(**{place: titles}).sort_values(place, kind="stable").astype({place: str})
    looks = {name: look for name, look in looks.items() if name in set(rows[part])}
    across, along = "yx" if horizontal else "xy"
    look = hues(part, looks) | {"hue_order": list(looks)[::-1], "multiple": "stack", "discrete": True, "shrink": 0.7}
    look |= {across: place, "weights": value, "alpha": 1, "edgecolor": "white", "linewidth": 0.4}
    sns.histplot(rows[rows[part].isin(list(looks))], ax=ax, **look)
    _finish_bars(ax, looks, across)
    if total:
        sums = rows.groupby(place, sort=False)[value].sum()
        for index, end in enumerate(sums):
            _write(ax, total.format(end), index, end, across)
        ax.set(**{f"{along}lim": (0, 1.14 * float(sums.max()))})


def _finish_bars(ax: Any, looks: Mapping[Any, Style], across: str) -> None:
    for container, look in zip(ax.containers, looks.values(), strict=True):
        for patch in container:
            patch.set_hatch(look.hatch)
    ax.grid(axis=across, visible=False)
    ax.set(xlabel="", ylabel="")


def _write(ax: Any, text: str, middle: float, end: float, across: str) -> None:
    """A number at the end of a bar: above it, or beside it where bars stand along y."""
    spot, offset, how = ((end, middle), (3, 0), "va") if across == "y" else ((middle, end), (0, 2), "ha")
    ax.annotate(text, spot, offset, textcoords="offset points", fontsize=7, **{how: "center"})


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
