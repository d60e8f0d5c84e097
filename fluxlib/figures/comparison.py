"""Figures that put methods side by side: convergence, and time to accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fluxlib.figures import style
from fluxlib.figures.canvas import (
    Picture,
    axes_grid,
    caption,
    clock_shapes,
    drawn,
    interval,
    seeds_name,
    unique,
)

PANEL = (2.9, 2.2)
"""Width and height of one panel, inches."""


@drawn
def convergence(rounds: pd.DataFrame, clocks: tuple[str, ...] = ("device_s", "wall_s")) -> Picture:
    """Score over time, one column per model and task, one row per clock, one line per method.

    Args:
        rounds: the ``rounds`` table of the runs to draw.
        clocks: columns of ``rounds`` to draw over: ``device_s``, ``wall_s`` or ``round``.

    Raises:
        ValueError: an unknown clock.
    """
    unknown = [clock for clock in clocks if clock not in style.CLOCKS]
    if unknown:
        raise ValueError(f"clocks has {unknown}, allowed are {', '.join(style.CLOCKS)}")
    panels = list(rounds.groupby(["model", "task"]))
    figure = Picture(figsize=(max(4.0, PANEL[0] * len(panels)), PANEL[1] * len(clocks) + 0.4))
    axes = axes_grid(figure, len(clocks), len(panels), sharey="col")
    for column, ((model, task), runs) in enumerate(panels):
        for row, clock in enumerate(clocks):
            ax = axes[row, column]
            for method in style.order(runs["method"]):
                _curve(ax, runs[runs["method"] == method], clock, method)
            ax.set_xlabel(style.CLOCKS[clock])
            ax.set_ylabel(style.METRICS.get(unique(runs, "metric_name"), "score"))
        axes[0, column].set_title(f"{model}\n{task}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    caption(figure, f"device clock: shapes of {clock_shapes(rounds)}", seeds_name(rounds))
    return figure


def _curve(ax: Any, runs: pd.DataFrame, clock: str, method: str) -> None:
    """Mean over seeds, round by round, at the mean time of that round; a band where there are seeds for one."""
    look = style.method(method)
    scored = runs.dropna(subset=["metric"]).groupby("round")
    times = scored[clock].mean() if clock != "round" else scored["round"].first()
    bands = np.array([interval(values.to_numpy()) for _, values in scored["metric"]]).clip(0, 1)  # all scores lie there
    every = max(1, len(bands) // 8)
    ax.plot(
        times, bands[:, 0], color=look.color, marker=look.marker, linestyle=look.line, markevery=every, label=look.title
    )
    if runs["seed"].nunique() > 1:
        ax.fill_between(times, bands[:, 1], bands[:, 2], color=look.color, alpha=0.18, linewidth=0)


@drawn
def time_to_accuracy(times: pd.DataFrame, clocks: tuple[str, ...] = ("device_s", "wall_s")) -> Picture:
    """Bars of the time to target, one panel per clock, one group per task; a miss is written, not drawn.

    Args:
        times: of :func:`fluxlib.figures.times.times_to_target`, usually of one model.
    """
    tasks = sorted(pd.unique(times["task"]))
    methods = style.order(times["method"])
    width = min(6.5, max(3.2, 1.1 * len(tasks) * len(methods) / 2 + 1.2))
    figure = Picture(figsize=(width * len(clocks), PANEL[1] + 0.6))
    axes = axes_grid(figure, 1, len(clocks))
    for ax, clock in zip(axes[0], clocks, strict=True):
        for index, method in enumerate(methods):
            _bars(ax, times[times["method"] == method], tasks, clock, method, index, len(methods))
        ax.set_xticks(range(len(tasks)), tasks)
        ax.set_ylabel(f"time to target, {style.CLOCKS[clock]}")
        ax.set_ylim(bottom=0)
        ax.set_xlim(-0.5, len(tasks) - 0.5)  # a miss at the edge has no bar that would make room for it
        ax.grid(axis="x", visible=False)
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside right upper")
    share = f"{times['target_fraction'].iloc[0]:.0%}".replace("%", " %")
    caption(
        figure,
        f"{unique(times, 'model')}: target {share} of the reference's final score, seed by seed",
        f"device clock: shapes of {clock_shapes(times)}",
        seeds_name(times),
    )
    return figure


def _bars(ax: Any, runs: pd.DataFrame, tasks: list[str], clock: str, method: str, index: int, num_methods: int) -> None:
    """One method's bars. A seed that missed the target makes the mean meaningless: the count is written instead."""
    look, width = style.method(method), 0.8 / num_methods
    labelled = False
    for place, task in enumerate(tasks):
        values = runs.loc[runs["task"] == task, clock].to_numpy(dtype=float)
        x = place + (index - (num_methods - 1) / 2) * width
        if not len(values):  # no such run, which is no miss
            continue
        missed = int(np.isnan(values).sum())
        if missed:
            note = f"{look.title}: not reached" + (f" ({missed}/{len(values)})" if len(values) > 1 else "")
            ax.annotate(
                note, (x, 0), (0, 3), textcoords="offset points", rotation=90, ha="center", va="bottom", fontsize=7
            )
            continue
        mean, low, high = interval(values)
        error = [[mean - low], [high - mean]] if len(values) > 1 else None
        label = None if labelled else look.title
        ax.bar(
            x, mean, width, yerr=error, label=label, color=look.color, hatch=look.hatch, edgecolor="white", capsize=2
        )
        labelled = True
    if not labelled:
        ax.bar(0, 0, label=look.title, color=look.color, hatch=look.hatch, edgecolor="white")
