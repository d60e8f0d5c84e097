"""Final quality beside the reference's, in two ways: after equally many rounds, and after equally many device seconds.

Rounds of different methods take different times: twenty of FLUX's are over when FMD has had six. At equal rounds a
method with short rounds has had less time, at equal seconds it has had more rounds. Both are shown, seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.analysis.statistics import interval
from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, caption, clock_shapes, drawn, notice, seeds_name, unique
from fluxlib.figures.times import FINAL_ROUNDS, SEED, final_score

EQUAL_ROUNDS, EQUAL_SECONDS = "equal rounds", "equal seconds"
WHOLE = 0.9
"""Share of the reference's seconds from which on a comparison at equal seconds is one of final quality."""
MEASURES = ("score", "reference_score", "ratio", "at_s", "of_reference")
COLUMNS = (*SEED, "method", "compared", *MEASURES, "clock_model", "link")


def score_at(times: Sequence[float], metrics: Sequence[float], at: float) -> float:
    """The score at a moment, linear between two scored rounds (as time to target is); NaN before the first.

    After the last scored round it is that round's. Rounds that were not scored (NaN) are passed over.
    """
    points = [(float(time), float(metric)) for time, metric in zip(times, metrics, strict=True) if metric == metric]
    if not points or at < points[0][0]:
        return math.nan
    known, scores = zip(*points, strict=True)
    return float(np.interp(at, known, scores))


def final_quality(plain: pd.DataFrame, longest: pd.DataFrame, reference: str = "fmd") -> pd.DataFrame:
    """Each run's score beside that of the reference with the same seed: one row per pair and way of comparing.

    ``equal rounds``: the mean of the last :data:`~fluxlib.figures.times.FINAL_ROUNDS` scored rounds of both, where they
    have as many. ``equal seconds``: the score of both at the device second at which the reference's run ends, or the
    other's where that is earlier, linear between scored rounds.

    Args:
        plain: ``rounds`` of one run per model, task, seed and method, all with the same number of rounds.
        longest: the same, a longer run in the place of a plain one where there is such.

    Returns:
        columns :data:`COLUMNS`: ``ratio`` is ``score`` over ``reference_score``, ``at_s`` the device second (NaN at
        equal rounds), ``of_reference`` the share of the reference's run that is over by then: below 1 where the other
        run ended first.
    """
    rows: list[dict[str, Any]] = []
    for compared, rounds in ((EQUAL_ROUNDS, plain), (EQUAL_SECONDS, longest)):
        scored = rounds.dropna(subset=["metric"]).sort_values("round", kind="stable")
        for (model, task, seed), runs in scored.groupby(SEED, sort=False):
            base = runs[runs["method"] == reference]
            for method in style.order(set(runs["method"]) - {reference}) if len(base) else ():
                own = runs[runs["method"] == method]
                fixed = {"model": model, "task": task, "seed": seed, "method": method, "compared": compared}
                found = _in_rounds(own, base) if compared == EQUAL_ROUNDS else _in_seconds(own, base)
                shapes = {name: own[name].iloc[0] for name in ("clock_model", "link")}
                rows += [fixed | shapes | found] if found else []
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _in_rounds(own: pd.DataFrame, base: pd.DataFrame) -> dict[str, float]:
    """Nothing where the runs differ in length."""
    if own["round"].max() != base["round"].max():
        return {}
    score, reference = (final_score(run["metric"].tolist(), FINAL_ROUNDS) for run in (own, base))
    return _pair(score, reference, math.nan, 1.0)


def _in_seconds(own: pd.DataFrame, base: pd.DataFrame) -> dict[str, float]:
    end_s = float(base["device_s"].max())
    at_s = min(end_s, float(own["device_s"].max()))
    score, reference = (score_at(run["device_s"].tolist(), run["metric"].tolist(), at_s) for run in (own, base))
    return _pair(score, reference, at_s, at_s / end_s)


def _pair(score: float, reference: float, at_s: float, of_reference: float) -> dict[str, float]:
    ratio = score / reference if reference else math.nan
    return {"score": score, "reference_score": reference, "ratio": ratio, "at_s": at_s, "of_reference": of_reference}


def quality_table(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`final_quality` over seeds: one row per model, task, method and way, with mean, interval and seeds.

    ``of_reference`` is the least share of the reference's run that any seed was compared at.
    """
    rows = []
    keys = ["model", "task", "method", "compared"]
    for key, part in table.groupby(keys, sort=False):
        mean, low, high = interval(part["ratio"])
        means = {name: part[name].mean() for name in ("score", "reference_score")}
        rows.append(
            dict(zip(keys, key, strict=True))
            | {"seeds": part["seed"].nunique(), **means, "ratio": mean, "low": low, "high": high}
            | {"of_reference": part["of_reference"].min()}
        )
    return pd.DataFrame(rows)


@drawn
def draw_quality(table: pd.DataFrame) -> Picture:
    """Share of the reference's score by task: hollow after equal rounds, filled after equal device seconds.

    Args:
        table: of :func:`final_quality`, of one model. Below a filled mark that is no final score it says at which share
            of the reference's run the other one ended.
    """
    if table.empty:
        return notice("No runs of this model with a partner: nothing to compare.")
    over_seeds, tasks = quality_table(table), list(pd.unique(table["task"]))
    methods = style.order(table["method"])
    figure = Picture(figsize=(max(5.0, 1.5 * len(tasks) + 2.0), 3.0))
    ax = axes_grid(figure, 1, 1)[0, 0]
    for index, method in enumerate(methods):
        _marks(ax, over_seeds[over_seeds["method"] == method], tasks, 0.8 / len(methods) * (index + 0.5) - 0.4)
    ax.axhline(1, color="#444444", linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)
    ax.set_xticks(range(len(tasks)), tasks)
    ax.set_ylabel("share of FMD's score")
    ax.grid(axis="x", visible=False)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    caption(
        figure, f"{unique(table, 'model')}, seeds paired", f"device clock: {clock_shapes(table)}",
        f"{seeds_name(table)}\nhollow: equal rounds, filled: equal device seconds",
        "a share: FMD's run was that far when the other ended",
    )  # fmt: skip
    return figure


def _marks(ax: Any, rows: pd.DataFrame, tasks: list[str], shift: float) -> None:
    for compared, nudge in ((EQUAL_ROUNDS, -0.05), (EQUAL_SECONDS, 0.05)):
        for row in rows[rows["compared"] == compared].to_dict("records"):
            look, x = style.method(row["method"]), tasks.index(row["task"]) + shift + nudge
            filled = compared == EQUAL_SECONDS
            if row["low"] < row["high"]:
                ax.plot([x, x], [row["low"], row["high"]], color=look.color, linewidth=0.8)
            first = filled and row["task"] == rows["task"].iloc[0]
            face = look.color if filled else "white"
            label = look.title if first else None
            ax.plot(x, row["ratio"], look.marker, color=look.color, markerfacecolor=face, label=label, linestyle="none")
            if filled and row["of_reference"] < WHOLE:
                text = f"{row['of_reference']:.0%}".replace("%", " %")
                ax.annotate(text, (x, row["ratio"]), (4, -8), textcoords="offset points", fontsize=6)
