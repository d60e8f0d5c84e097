"""Participants, how much they differ, and budgets (notebook 06): one table, and two figures from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pandas as pd
import seaborn as sns

from fluxlib.analysis.time_to_target import PAIR, TARGET_FRACTION, reach, times_to_target
from fluxlib.analysis.wording import METRICS
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, drawn, footer, notice, panels, unique

FEDERATION = ["participants", "participants_per_round", "alpha"]
"""What the target depends on: FMD has no budget, so all budgets have the same one."""
SETTINGS = [*FEDERATION, "tune_fraction", "merge_fraction"]
MEASURES = {
    "final_metric": "final score",
    "device_s_at_least": "device s to target",
    "round_mb": "sent in a round (MB)",
}
AXES = {"participants": "participants", "alpha": "Dirichlet alpha", "tune_fraction": "share of experts tuned"}
"""What the questions' axes are called, by the setting that they vary."""
CURVE = ["run_id", "method", "seed", "round", "metric", "device_s", *FEDERATION]


def outcomes(
    rounds: pd.DataFrame, questions: Mapping[str, Sequence[str]], fraction: float = TARGET_FRACTION
) -> pd.DataFrame:
    """Every run of every question in one row.

    ``rounds`` are those of :func:`fluxlib.analysis.studies.scale.with_settings`; ``questions``: by the setting that is
    varied (of :data:`AXES`), the variants of the runs that answer it.

    Returns:
        Time to target (:func:`fluxlib.analysis.time_to_target.times_to_target`) for FMD's final score with the same
        seed, as many participants and the same alpha (NaN without such a run); the settings, ``question`` and
        ``round_mb``, what all participants of a round sent and received on average: bytes of the run's own model.
    """
    if rounds.empty:
        return pd.DataFrame(columns=["question", *SETTINGS, "method", *MEASURES])
    times = times_to_target(rounds, fraction, pairs=(*PAIR, *FEDERATION))
    alone = rounds[~rounds["run_id"].isin(times["run_id"])]
    without = reach(alone, math.nan).assign(device_s_at_least=math.nan)
    times = pd.concat([times, without], ignore_index=True) if len(alone) else times
    sent = rounds[rounds["round"] > 0].assign(round_mb=(rounds["uplink_bytes"] + rounds["downlink_bytes"]) / 1e6)
    table = times.drop(columns=FEDERATION).join(rounds.groupby("run_id")[SETTINGS].first(), on="run_id")
    table = table.join(sent.groupby("run_id")["round_mb"].mean(), on="run_id")
    asked = [table[table["variant"].isin(variants)].assign(question=name) for name, variants in questions.items()]
    return pd.concat(asked, ignore_index=True)


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


@drawn
def scale_settings(table: pd.DataFrame) -> Picture:
    """Final score, time to target and traffic of :func:`outcomes` by participants, heterogeneity and budget (rows)."""
    if table.empty:
        return notice("No runs of this model with other participants, heterogeneity or budgets.", table)
    asked = [name for name in AXES if (table["question"] == name).any()]
    figure, axes = panels(table, (7.6, 0.9 + 1.75 * len(asked)), len(asked), len(MEASURES), squeeze=False)
    known: dict[str, style.Style] = {}
    for row, question in zip(axes, asked, strict=True):
        part, looks = _series(table[table["question"] == question], question)
        known |= looks
        for ax, (measure, title) in zip(row, MEASURES.items(), strict=True):
            _points(ax, part, measure, looks)
            ax.set(xlabel=AXES[question], ylabel=title)
            ax.margins(y=0.15)
            ax.set_ylim(bottom=None if measure == "final_metric" else 0)
            if question == "tune_fraction" and "fmd" in looks:  # it has no budget: the same on the whole axis
                level = part.loc[part["series"] == "fmd", measure].mean()
                ax.axhline(level, color=looks["fmd"].color, ls=(0, looks["fmd"].dashes), lw=0.8)
    marks.legend(figure, known, loc="outside upper center", ncols=4)
    footer(figure, table, "bytes: the mini model's own", "hollow with an arrow: target not reached in every seed")
    return figure


def _series(part: pd.DataFrame, question: str) -> tuple[pd.DataFrame, dict[str, style.Style]]:
    """Rows with their ``series`` (by budget, FLUX once per share of merged slots) and place on the axis, ``at``."""
    part = part.sort_values([question, "merge_fraction"], ascending=[True, False], kind="stable")
    at = part.apply(crowd, axis=1) if question == "participants" else part[question].map("{:g}".format)
    part = part.assign(at=at, series=part["method"])
    looks = style.of_methods(part["method"])
    if question == "tune_fraction" and "flux" in looks:
        # The larger share is what the other rows of panels have, so it keeps the method's own look.
        for share in sorted(part["merge_fraction"].unique())[:-1]:
            name = f"flux, {share:g} merged"
            part.loc[(part["method"] == "flux") & (part["merge_fraction"] == share), "series"] = name
            looks[name] = replace(looks["flux"], title=f"FLUX, {share:g} merged", marker="v", dashes=(1, 1))
    return part, looks


def _points(ax: Any, part: pd.DataFrame, measure: str, looks: Mapping[str, style.Style]) -> None:
    """One panel; hollow with an arrow where a seed missed the target."""
    order, width = list(pd.unique(part["at"])), 0.08 * (len(looks) - 1)
    look = marks.hues("series", looks) | {"errorbar": marks.over_seeds, "capsize": 0.1, "err_kws": {"linewidth": 0.8}}
    look |= {"markers": [own.marker for own in looks.values()], "markersize": 4.5, "linewidth": 1.4}
    lines = [(0, own.dashes or None) for own in looks.values()]
    sns.pointplot(part, x="at", y=measure, order=order, dodge=width or False, linestyles=lines, ax=ax, **look)
    if measure == "device_s_at_least":
        missed = part[part["device_s_to_target"].isna() & part["target"].notna()]
        for pair, seeds in missed.groupby(["series", "at"]):
            name, at = map(str, cast("tuple[Any, Any]", pair))
            spot, height = order.index(at) + 0.08 * list(looks).index(name) - width / 2, seeds[measure].mean()
            ax.plot([spot], [height], marker=looks[name].marker, mfc="w", mec=looks[name].color, ls="none", zorder=4)
            arrow = {"textcoords": "offset points", "ha": "center", "color": looks[name].color}
            ax.annotate("\u2191", (spot, height), (0, 3), **arrow)
