"""More participants (notebook 06)."""

from __future__ import annotations

import itertools
from typing import Any

import pandas as pd

from fluxlib.analysis.wording import METRICS
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, drawn, footer, notice, panels, unique

CURVE = ["run_id", "method", "seed", "round", "metric", "device_s", "participants", "participants_per_round"]


def crowd(row: Any) -> str:
    """``20``, or ``20 of 60`` where participants are sampled."""
    asked, all_of_them = int(row["participants_per_round"]), int(row["participants"])
    return str(asked) if asked == all_of_them else f"{asked} of {all_of_them}"


@drawn
def scale_participants(rounds: pd.DataFrame) -> Picture:
    """Score over rounds and over device seconds, one row of panels per method, one line per number of participants."""
    if rounds.empty:
        return notice("No runs of this model with other numbers of participants.", rounds)
    shown = rounds.sort_values(["participants", "round"], kind="stable")
    shown = shown.assign(crowd=shown.apply(crowd, axis=1))
    methods, looks = style.of_methods(shown["method"]), style.in_shades(shown["crowd"].unique())
    size = 6.4, 0.7 + 1.8 * len(methods)
    figure, axes = panels(rounds[CURVE], size, len(methods), 2, sharey=True, sharex="col", squeeze=False)
    score = METRICS.get(unique(shown, "metric_name"), "score")
    for ax, (method, clock) in zip(axes.flat, itertools.product(methods, ("round", "device_s")), strict=True):
        marks.curves(ax, shown[shown["method"] == method], clock, "crowd", looks, errorbar=None)
        ax.set(ylabel=f"{methods[method].title}: {score}")
        ax.label_outer()
    marks.legend(figure, looks, loc="outside right upper", title="participants\nin a round")
    footer(figure, shown)
    return figure
