"""Figures that put methods side by side: convergence, time to target, final quality, speed-ups, the search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns

from fluxlib.analysis.wording import METRICS, clock_shapes, percent
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, caption, drawn, interval_names, notice, panels, seeds_name, unique

WHOLE = 0.9
"""Share of the reference's seconds from which on a comparison at equal seconds is one of final quality."""


@drawn
def convergence(rounds: pd.DataFrame, clocks: tuple[str, ...] = ("device_s", "wall_s")) -> Picture:
    """Score over time, one column per model and task, one row per clock, one line per method.

    Round by round: mean score over seeds at the mean time of that round.

    Args:
        rounds: the ``rounds`` table of the runs to draw.
        clocks: columns of ``rounds`` to draw over: ``device_s``, ``wall_s`` or ``round``.

    Raises:
        ValueError: an unknown clock.
    """
    if unknown := [clock for clock in clocks if clock not in style.CLOCKS]:
        raise ValueError(f"clocks has {unknown}, allowed are {', '.join(style.CLOCKS)}")
    places = list(rounds.groupby(["model", "task"]))
    size = max(4.0, 2.9 * len(places)), 2.2 * len(clocks) + 0.4
    figure, axes = panels(rounds, size, len(clocks), len(places), sharey="col", squeeze=False)
    for column, ((model, task), runs) in zip(axes.T, places, strict=True):
        scored = runs.dropna(subset=["metric"])
        for ax, clock in zip(column, clocks, strict=True):
            when = scored.groupby(["method", "round"])[clock].transform("mean")
            marks.lines(ax, scored.assign(**{clock: when}), clock, "metric", "method", style.of_methods(runs["method"]),
                  errorbar=lambda scores: tuple(np.clip(marks.over_seeds(scores), 0, 1)), markevery=2)  # fmt: skip
            ax.set(xlabel=style.CLOCKS[clock], ylabel=METRICS.get(unique(runs, "metric_name"), "score"))
        column[0].set_title(f"{model}\n{task}")
    marks.legend(figure, style.of_methods(rounds["method"]).values(), loc="outside right upper")
    seeds = seeds_name(rounds, "model", "task", "method")
    caption(figure, f"device clock: shapes of {clock_shapes(rounds)}", seeds)
    return figure


@drawn
def time_to_accuracy(times: pd.DataFrame, clocks: tuple[str, ...] = ("device_s", "wall_s")) -> Picture:
    """Bars of the time to target, one panel per clock, one group per task; a miss is written, not drawn.

    Args:
        times: of :func:`fluxlib.analysis.time_to_target.times_to_target`, usually of one model.
    """
    tasks, looks = sorted(pd.unique(times["task"])), style.of_methods(times["method"])
    width = min(6.5, max(3.2, 0.55 * len(tasks) * len(looks) + 1.2))
    figure, axes = panels(times, (width * len(clocks), 2.9), 1, len(clocks), squeeze=False)
    for ax, clock in zip(axes[0], clocks, strict=True):
        column = f"{clock}_to_target"
        missed = times[column].isna().groupby([times["task"], times["method"]]).transform("sum")
        # A seed that missed the target makes the mean meaningless: the count is written instead.
        whole = times.assign(**{column: times[column].where(missed == 0)}).sort_values("task", kind="stable")
        marks.bars(ax, whole, "task", column, looks, by="method")
        for (task, method), runs in times[missed > 0].groupby(["task", "method"]):
            place = tasks.index(task) + (list(looks).index(str(method)) + 0.5) * 0.8 / len(looks) - 0.4
            count = f" ({runs[column].isna().sum()}/{len(runs)})" if len(runs) > 1 else ""
            marks.missed(ax, place, f"{looks[str(method)].title}: not reached{count}")
        ax.set(ylabel=f"time to target, {style.CLOCKS[clock]}", xlim=(-0.5, len(tasks) - 0.5))
    marks.legend(figure, looks.values(), filled=True, loc="outside right upper")
    share = percent(times["target_fraction"].iloc[0])
    caption(
        figure,
        f"{unique(times, 'model')}: target {share} of the reference's final score, seed by seed",
        f"device clock: shapes of {clock_shapes(times)}",
        seeds_name(times, "model", "task", "method"),
    )
    return figure


@drawn
def final_quality(table: pd.DataFrame) -> Picture:
    """Share of the reference's score by task: hollow after equal rounds, filled after equal device seconds.

    Args:
        table: final scores seed by seed, of one model (columns ``task``, ``method``, ``compared``, ``ratio``,
            ``of_reference``). Beside a filled mark that is no final score it says at which share of the reference's run
            the other one ended.
    """
    if table.empty:
        return notice("No runs of this model with a partner: nothing to compare.", table)
    tasks, looks = list(pd.unique(table["task"])), style.of_methods(table["method"])
    figure, ax = panels(table, (max(5.0, 1.5 * len(tasks) + 2.0), 3.0))
    pairs = [(method, compared) for method in looks for compared in ("equal rounds", "equal seconds")]
    for index, (method, compared) in enumerate(pairs):
        own = table[(table["method"] == method) & (table["compared"] == compared)]
        look, aside = looks[method], (index + 0.5) * 0.8 / len(pairs) - 0.4
        own = own.assign(place=[tasks.index(task) + aside for task in own["task"]])
        filled = compared == "equal seconds"
        sns.lineplot(own, x="place", y="ratio", errorbar=marks.over_seeds, err_style="bars", err_kws={"linewidth": 0.8},
                     color=look.color, marker=look.marker, markerfacecolor=look.color if filled else "white",
                     markeredgecolor=look.color, linestyle="none", ax=ax)  # fmt: skip
        ends = own.groupby("place")[["ratio", "of_reference"]].agg({"ratio": "mean", "of_reference": "min"})
        for place, end in ends[ends["of_reference"] < WHOLE].iterrows() if filled else ():
            text = percent(end["of_reference"])
            ax.annotate(text, (place, end["ratio"]), (4, -8), textcoords="offset points", fontsize=6)
    marks.reference(ax, 1)
    ax.set_xticks(range(len(tasks)), tasks)
    ax.set(xlabel="", ylabel="share of FMD's score", xlim=(-0.5, len(tasks) - 0.5))
    ax.grid(axis="x", visible=False)
    marks.legend(figure, looks.values(), loc="outside right upper")
    caption(
        figure, f"{unique(table, 'model')}, seeds paired", f"device clock: {clock_shapes(table)}",
        seeds_name(table, "model", "task", "method"), "hollow: equal rounds, filled: equal device seconds",
        "a share: FMD's run was that far when the other ended",
    )  # fmt: skip
    return figure


@drawn
def speed_ups(table: pd.DataFrame) -> Picture:
    """FLUX's speed-up over each method: one panel per model, one line per task, variant and method.

    An arrow to the right is a lower bound: the other method never arrives in some seed. "never" is FLUX's own miss.

    Args:
        table: of :func:`fluxlib.analysis.speedups.speed_ups`.
    """
    places = list(table.groupby("model", sort=False)) if len(table) else [("no races", table)]
    most = max(len(part) for _, part in places)
    size = 3.9 * len(places) + 0.6, 0.2 * max(most, 4) + 1.3
    figure, axes = panels(table, size, 1, len(places), sharex=True, squeeze=False)
    for ax, (model, part) in zip(axes[0], places, strict=True):
        rows = part.to_dict("records")
        for place, row in enumerate(rows):
            _race(ax, row, place)
        names = [" ".join(filter(None, (row["task"], row["variant"]))) for row in rows]
        texts = [f"{name}: {style.method(row['baseline']).title}" for name, row in zip(names, rows, strict=True)]
        ax.set_yticks(range(len(rows)), texts, fontsize=7)
        marks.reference(ax, 1, vertical=True)
        ax.set(ylim=(max(len(rows), 1) - 0.4, -0.6), xscale="log", title=model, xlabel="FLUX sooner to the target by")
    low, high = axes[0, 0].get_xlim()
    axes[0, 0].set_xlim(min(low, 0.4), max(high, 6.0))
    axes[0, 0].set_xticks([0.5, 1, 2, 5], ["0.5×", "1×", "2×", "5×"])
    axes[0, 0].minorticks_off()
    if len(table):
        caption(figure, f"device clock: {clock_shapes(table)}", interval_names(table["seeds"]), "arrow: at least")
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


@drawn
def trials(table: pd.DataFrame) -> Picture:
    """Score over learning rate, one column per model and task, one line per method, dashed for more local work.

    Args:
        table: of :func:`fluxlib.analysis.search.trials`.
    """
    places, looks = list(table.groupby(["model", "task"], sort=False)), style.of_methods(table["method"])
    steps = sorted(table["local_steps"].unique())
    dashes = {count: "" if count == steps[0] else (4, 2) for count in steps}
    figure, axes = panels(table, (max(4.0, 3.2 * len(places)), 3.0), 1, len(places), squeeze=False)
    for ax, ((model, task), part) in zip(axes[0], places, strict=True):
        for method, own in part.groupby("method", sort=False):
            look = looks[str(method)]
            sns.lineplot(own, x="learning_rate", y="score", style="local_steps", dashes=dashes, color=look.color,
                         marker=look.marker, markeredgewidth=0, errorbar=None, legend=False, ax=ax)  # fmt: skip
            best = own[own["is_chosen"]]
            ax.plot(best["learning_rate"], best["score"], "o", ms=11, mfc="none", mec=look.color, mew=1.2)
        ax.set(xscale="log", xlabel="learning rate", ylabel="score at equal device time", title=f"{model}\n{task}")
    named = [
        style.Style(f"{look.title}, {count} steps", look.color, look.marker, dashes[count], "")
        for look in looks.values()
        for count in steps
    ]
    marks.legend(figure, named, loc="outside right center")
    chosen = "ring: chosen, the gentlest within a standard error of the best mean over panels"
    caption(figure, chosen, f"{int(table['num_seeds'].max())} seed(s)", "device clock")
    return figure
