"""Participants, how much they differ, and budgets (notebook 06): one table, and two figures from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.figures import canvas, style
from fluxlib.figures.canvas import Picture, axes_grid, caption, clock_shapes, drawn, notice, unique
from fluxlib.figures.measured import LINES, MARKERS, shades
from fluxlib.figures.times import final_score, time_to_target

FEDERATION = ["participants", "participants_per_round", "alpha"]
"""What the target depends on: FMD has no budget, so all budgets have the same one."""
IDENTITY = ("run_id", "model", "task", "method", "seed", "variant", "clock_model", "link", "metric_name")
MEASURES = {
    "final_metric": "final score",
    "device_s": "device s to target",
    "round_mb": "sent in a round (MB)",
}
AXES = {"participants": "participants", "alpha": "Dirichlet alpha", "budget": "share of experts tuned"}
"""The questions, and what their axes are called."""


def outcomes(
    rounds: pd.DataFrame, questions: Mapping[str, Sequence[str]], target_fraction: float = 0.95, reference: str = "fmd"
) -> pd.DataFrame:
    """Every run of every question in one row.

    Args:
        rounds: of :func:`fluxlib.analysis.studies.scale.with_settings`.
        questions: ``participants``, ``alpha`` and ``budget``: names of the variants that answer them.

    Returns:
        Identity, settings, ``question``, ``final_metric``, ``target`` (``target_fraction`` of the reference's final
        score with the same seed, as many participants and the same alpha; NaN without such a run), ``device_s``
        and ``round`` to target (NaN: not reached), ``at_least_s`` (the whole run then) and ``round_mb``, what all
        participants of a round sent and received, on average: bytes of the run's own model.
    """
    rows: list[dict[str, Any]] = []
    for _, group in rounds.groupby(["model", "task", "seed", *FEDERATION], sort=False):
        scored = group.dropna(subset=["metric"]).sort_values("round")
        finals = scored[scored["method"] == reference].groupby("run_id")["metric"].agg(final_score)
        target = target_fraction * float(finals.mean()) if len(finals) else math.nan
        for run_id, run in scored.groupby("run_id", sort=False):
            rows += [_one(run, group[group["run_id"] == run_id], target, name) for name in _asked(run, questions)]
    return pd.DataFrame(rows, columns=None if rows else [*IDENTITY, "question", *FEDERATION, *MEASURES])


def _asked(run: pd.DataFrame, questions: Mapping[str, Sequence[str]]) -> list[str]:
    return [name for name, variants in questions.items() if run["variant"].iloc[0] in variants]


def _one(scored: pd.DataFrame, run: pd.DataFrame, target: float, question: str) -> dict[str, Any]:
    first, metrics, trained = scored.iloc[0], scored["metric"].tolist(), run[run["round"] > 0]
    times = {clock: time_to_target(scored[clock].tolist(), metrics, target) for clock in ("device_s", "round")}
    end_s = float(run["device_s"].max())
    return (
        {"question": question}
        | {name: first[name] for name in (*IDENTITY, *FEDERATION, "tune_fraction", "merge_fraction")}
        | {"final_metric": final_score(metrics), "target": target, "end_s": end_s}
        | times
        | {"at_least_s": end_s if math.isnan(times["device_s"]) and not math.isnan(target) else times["device_s"]}
        | {"round_mb": float((trained["uplink_bytes"] + trained["downlink_bytes"]).mean()) / 1e6}
    )


def crowd(row: Any) -> str:
    """``20``, or ``20 of 60`` where participants are sampled."""
    asked, all_of_them = int(row["participants_per_round"]), int(row["participants"])
    return str(asked) if asked == all_of_them else f"{asked} of {all_of_them}"


@drawn
def draw_participants(rounds: pd.DataFrame) -> Picture:
    """Score over rounds and over device seconds, one row of panels per method, one line per number of participants.

    Args:
        rounds: of the runs of the question ``participants``, with settings.
    """
    if rounds.empty:
        return notice("No runs of this model with other numbers of participants.")
    rounds = rounds.sort_values(["participants", "round"], kind="stable")
    rounds = rounds.assign(crowd=[crowd(row) for row in rounds[FEDERATION].to_dict("records")])
    crowds, methods = list(pd.unique(rounds["crowd"])), style.order(rounds["method"])
    figure = Picture(figsize=(6.4, 0.7 + 1.8 * len(methods)))
    axes = axes_grid(figure, len(methods), 2, sharey=True, sharex="col")
    colors = shades(len(crowds))
    for row, method in enumerate(methods):
        for column, clock in enumerate(("round", "device_s")):
            ax = axes[row, column]
            for index, name in enumerate(crowds):
                own = rounds[(rounds["method"] == method) & (rounds["crowd"] == name)].dropna(subset=["metric"])
                if len(own):
                    means = own.groupby("round")[["metric", "device_s"]].mean()
                    times = means.index if clock == "round" else means["device_s"]
                    look = {"color": colors[index], "marker": MARKERS[index % 7], "ls": LINES[index % 7]}
                    ax.plot(times, means["metric"], label=name, **look)
            if row == len(methods) - 1:
                ax.set_xlabel(style.CLOCKS[clock])
        score = style.METRICS.get(unique(rounds, "metric_name"), "score")
        axes[row, 0].set_ylabel(f"{style.method(method).title}: {score}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", title="participants\nin a round")
    seeds = rounds.groupby(["method", "crowd"])["seed"].nunique()
    several = f"means of {seeds.max()} seeds" + ("" if seeds.min() == seeds.max() else f" (at least {seeds.min()})")
    caption(figure, f"{unique(rounds, 'model')}, {unique(rounds, 'task')}", f"device clock: {clock_shapes(rounds)}",
            several)  # fmt: skip
    return figure


@drawn
def draw_settings(table: pd.DataFrame) -> Picture:
    """Final score, time to target and traffic (columns) by participants, heterogeneity and budget (rows)."""
    if table.empty:
        return notice("No runs of this model with other participants, heterogeneity or budgets.")
    asked = [name for name in AXES if (table["question"] == name).any()]
    figure = Picture(figsize=(7.6, 0.9 + 1.75 * len(asked)))
    axes = axes_grid(figure, len(asked), len(MEASURES))
    for row, question in enumerate(asked):
        part = table[table["question"] == question]
        labels = _labels(part, question)
        places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
        for column, (measure, title) in enumerate(MEASURES.items()):
            ax = axes[row, column]
            for name, look, own in _series(part.assign(place=labels.map(places)), question):
                _points(ax, own, measure, places, name, look)
                if question == "budget" and own["method"].iloc[0] == "fmd":
                    # It has no budget: the same on the whole axis.
                    ax.axhline(float(own[_column(measure)].mean()), color=look["color"], ls=look["ls"], lw=0.8)
            ax.set_xticks(range(len(places)), list(places))
            ax.set_xlim(-0.4, len(places) - 0.6)
            ax.set_ylabel(title)
            ax.margins(y=0.15)
            ax.set_ylim(bottom=None if measure == "final_metric" else 0)
            ax.set_xlabel(
                {"alpha": "Dirichlet alpha", "budget": "share of experts tuned"}.get(question, "participants")
            )
    handles = {label: one for ax in axes[:, 0] for one, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=4, fontsize=8)
    seeds = sorted(table.groupby(["question", "variant", "method"])["seed"].nunique().unique())
    bars = canvas.interval_name(int(seeds[-1])) + (" (where there is one seed: no bar)" if len(seeds) > 1 else "")
    caption(
        figure,
        f"{unique(table, 'model')}, {unique(table, 'task')}",
        f"device clock: {clock_shapes(table)}",
        f"bytes: the mini model's own\n{bars}",
        "hollow with an arrow: target not reached in every seed, at least this",
    )
    return figure


def _labels(part: pd.DataFrame, question: str) -> pd.Series:
    """What stands below each row's point, in order along the axis."""
    if question == "participants":
        order = part.sort_values("participants", kind="stable")
        return order.apply(crowd, axis=1)
    column = {"alpha": "alpha", "budget": "tune_fraction"}[question]
    return part.sort_values(column, kind="stable")[column].map("{:g}".format)


def _series(part: pd.DataFrame, question: str) -> list[tuple[str, dict[str, Any], pd.DataFrame]]:
    """The lines of one panel: a method each; by budget, FLUX once per share of merged slots, FMD wherever it is."""
    found: list[tuple[str, dict[str, Any], pd.DataFrame]] = []
    for method in style.order(part["method"]):
        own, look = part[part["method"] == method], style.method(method)
        base: dict[str, Any] = {"color": look.color, "marker": look.marker, "ls": look.line}
        if question != "budget" or method != "flux":
            found.append((look.title, base, own))
            continue
        for index, (merged, rows) in enumerate(own.sort_values("merge_fraction", ascending=False).groupby(
            "merge_fraction", sort=False)):  # fmt: skip
            # The larger share is what the other rows of panels have, so it keeps the method's own look.
            title = look.title if merged == part["merge_fraction"].max() else f"{look.title}, {merged:g} merged"
            found.append((title, base | ({"marker": "v", "ls": (0, (1, 1))} if index else {}), rows))
    return found


def _column(measure: str) -> str:
    """The column of :func:`outcomes` that is drawn: what a run that missed the target took at least."""
    return "at_least_s" if measure == "device_s" else measure


def _points(
    ax: Any, own: pd.DataFrame, measure: str, places: Mapping[str, int], name: str, look: dict[str, Any]
) -> None:
    column = _column(measure)
    known = own.dropna(subset=[column])
    means, errors, missed = {}, [], []
    for place, rows in known.groupby("place"):
        mean, low, high = canvas.interval(rows[column].to_numpy())
        means[place] = mean
        errors.append((max(0.0, mean - low), max(0.0, high - mean)))
        missed.append(measure == "device_s" and bool(rows["device_s"].isna().any()))
    at, heights = list(means), np.array(list(means.values()))
    shift = -0.06 if look["marker"] == "s" else 0.06 if look["marker"] in "Dv" else 0.0
    xs = np.array(at, dtype=float) + shift
    ax.plot(xs, heights, label=name, **look)
    if len(xs) and known.groupby("place")["seed"].nunique().max() > 1:
        ax.errorbar(xs, heights, yerr=np.array(errors).T, fmt="none", ecolor=look["color"], capsize=2, lw=0.8)
    for x, height, miss in zip(xs, heights, missed, strict=True):
        if miss:
            ax.plot([x], [height], marker=look["marker"], mfc="w", mec=look["color"], ls="none", zorder=4)
            ax.annotate("\u2191", (x, height), (0, 3), textcoords="offset points", ha="center", color=look["color"])
