"""Figures that put methods side by side: convergence, time to target, speed-ups, the search for settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from fluxlib.analysis.wording import METRICS, clock_shapes, percent
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, caption, drawn, facets, footer, panels, split, study, unique


@drawn
def convergence(rounds: pd.DataFrame, clocks: tuple[str, ...] = ("device_s", "wall_s")) -> Picture:
    """Score over time, one column per model and task, one row per clock (columns of ``rounds``), one line per method.

    Round by round: mean score over seeds at the mean time of that round. ValueError: an unknown clock.
    """
    if unknown := [clock for clock in clocks if clock not in style.CLOCKS]:
        raise ValueError(f"clocks has {unknown}, allowed are {', '.join(style.CLOCKS)}")
    places, looks = list(rounds.groupby(["model", "task"])), style.of_methods(rounds["method"])
    # Within what a score may be.
    bands: dict[str, Any] = {"errorbar": lambda scores: np.clip(marks.over_seeds(scores), 0, 1)}
    size = max(4.0, 2.9 * len(places)), 2.2 * len(clocks) + 0.4
    figure, axes = panels(rounds, size, len(clocks), len(places), sharey="col", squeeze=False)
    for column, ((model, task), runs) in zip(axes.T, places, strict=True):
        for ax, clock in zip(column, clocks, strict=True):
            marks.curves(ax, runs, clock, "method", looks, markevery=2, **bands)
            ax.set(ylabel=METRICS.get(unique(runs, "metric_name"), "score"))
        column[0].set_title(f"{Path(str(model)).name}\n{task}")
    marks.legend(figure, looks, loc="outside right upper")
    footer(figure, rounds)
    return figure


@drawn
def measured(table: pd.DataFrame) -> Picture:
    """Scores over measured seconds (``benchmarks/race.py``), by link; and what the clock said of every round."""
    scores = split(study(table, "race_score"), "method", "link")
    seconds = split(study(table, "race_seconds"), "method", "link", "kind")
    links, looks = list(scores["link"].unique()), style.of_methods(scores["method"])
    figure, axes = panels(table, (2.3 * (len(links) + 1) + 1.2, 2.6), 1, len(links) + 1)
    for ax, link in zip(axes, links, strict=False):
        marks.lines(ax, scores[scores["link"] == link], "x", "value", "method", looks)
        ax.set(title=link, xlabel="measured seconds", ylabel="score", ylim=(0, None))
    rounds = seconds.pivot(index=["method", "link", "x"], columns="kind", values="value").reset_index()
    for name, look in looks.items():
        one = rounds[rounds["method"] == name]
        axes[-1].plot(one["measured"], one["predicted"], look.marker, color=look.color, ms=4)
    most = 1.1 * float(rounds[["measured", "predicted"]].max().max())
    axes[-1].plot([0, most], [0, most], color="0.5", lw=0.8)
    axes[-1].set(title="every round", xlabel="measured seconds", ylabel="the clock's seconds")
    marks.legend(figure, looks, loc="outside right center")
    error = (rounds["predicted"] / rounds["measured"] - 1).abs().median()
    caption(figure, f"{unique(table, 'model')} over relays on one machine", f"clock off by {percent(error)} (median)")
    return figure


@drawn
def time_to_accuracy(times: pd.DataFrame) -> Picture:
    """Bars of the time to target, one panel per clock, one group per task; a miss is written, not drawn."""
    tasks, looks = sorted(pd.unique(times["task"])), style.of_methods(times["method"])
    width = min(6.5, max(3.2, 0.55 * len(tasks) * len(looks) + 1.2))
    figure, axes = panels(times, (2 * width, 2.9), 1, 2)
    for ax, clock in zip(axes, ("device_s", "wall_s"), strict=True):
        column = f"{clock}_to_target"
        missed = times[column].isna().groupby([times["task"], times["method"]])
        # A seed that missed the target makes the mean meaningless: the count is written instead.
        whole = times.assign(**{column: times[column].where(~missed.transform("any"))}).sort_values("task")
        marks.bars(ax, whole, "task", column, looks, by="method")
        for pair, runs in missed:
            task, method = map(str, cast("tuple[Any, Any]", pair))
            if runs.any():
                place = tasks.index(task) + (list(looks).index(method) + 0.5) * 0.8 / len(looks) - 0.4
                count = f" ({runs.sum()}/{len(runs)})" if len(runs) > 1 else ""
                marks.missed(ax, place, f"{looks[method].title}: not reached{count}")
        ax.set(ylabel=f"time to target, {style.CLOCKS[clock]}", xlim=(-0.5, len(tasks) - 0.5))
    marks.legend(figure, looks, filled=True, loc="outside right upper")
    share = percent(times["target_fraction"].iloc[0])
    footer(figure, times, f"target {share} of the reference's final score, seed by seed")
    return figure


@drawn
def speed_ups(table: pd.DataFrame) -> Picture:
    """FLUX's :func:`~fluxlib.analysis.speedups.speed_ups`: one panel per model, one line per task and method.

    An arrow to the right is a lower bound: the other method never arrives in some seed. "never" is FLUX's own miss.
    """
    rows = table if len(table) else pd.DataFrame({"model": ["no races"]})
    most = max(4, rows["model"].value_counts().max())
    figure, places = facets(table, rows, ["model"], 3.6, 0.2 * most + 1.3, sharex=True)
    for ax, part in places:
        every = part.to_dict("records") if len(table) else []
        for place, row in enumerate(every):
            _race(ax, row, place)
        texts = [f"{row['task']}: {style.method(row['baseline']).title}" for row in every]
        ax.set_yticks(range(len(texts)), texts, fontsize=7)
        marks.reference(ax, 1, vertical=True)
        ax.set(ylim=(len(part) - 0.4, -0.6), xscale="log", xlabel="FLUX sooner to the target by")
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, 0.4), max(high, 6.0))
    ax.set_xticks([0.5, 1, 2, 5], ["0.5×", "1×", "2×", "5×"])
    ax.minorticks_off()
    if len(table):
        caption(figure, f"device clock: {clock_shapes(table)}", f"{table['seeds'].max()} seeds", "arrow: at least")
    return figure


def _race(ax: Any, row: Mapping[Any, Any], place: int) -> None:
    look, raced = style.method(row["baseline"]), row["seeds"] - row["trivial"]
    if row["ours_missed"] or not raced:
        missed = f"FLUX never ({row['ours_missed']} of {raced})" if row["behind"] else "neither arrives"
        ax.text(1.04, place, missed if raced else "base is at the target", va="center", fontsize=6.5, color=style.GREY)
    elif row["baseline_missed"]:
        ax.plot(row["at_least"], place, ">", color=look.color, markersize=6)
    else:
        beyond = [[row["speedup"] - row["low"]], [row["high"] - row["speedup"]]]
        ax.errorbar(row["speedup"], place, xerr=beyond, color=look.color, marker=look.marker, elinewidth=1)
