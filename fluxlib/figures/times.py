"""Time to target: how long a method takes to a share of the reference method's final quality. Tables, no drawing.

The target of a model and task is ``target_fraction`` times the reference's final metric, averaged over seeds: the
same target for every method and seed (the paper's own targets are absolute and belong to other models).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from fluxlib import style
from fluxlib.figures.canvas import clock_shapes, interval, interval_name

CLOCKS = tuple(style.CLOCKS)
"""Columns of ``rounds`` in which time may be counted: both clocks, and rounds."""
FINAL_ROUNDS = 3
"""A final score is the mean of this many last scored rounds, wherever methods are compared."""


def time_to_target(times: Sequence[float], metrics: Sequence[float], target: float) -> float:
    """When ``metrics`` first reaches ``target``, linear between two scored rounds; NaN when it never does.

    Rounds that were not scored (NaN) are passed over. A first value at or above the target counts from its own time.

    Raises:
        ValueError: different lengths, or times that go backwards.
    """
    if len(times) != len(metrics):
        raise ValueError(f"times has {len(times)} values and metrics {len(metrics)}; they belong together")
    points = [(float(t), float(m)) for t, m in zip(times, metrics, strict=True) if m == m]
    if any(later < earlier for (earlier, _), (later, _) in zip(points, points[1:], strict=False)):
        raise ValueError("times must not go backwards")
    for index, (time, metric) in enumerate(points):
        if metric >= target:
            if index == 0:
                return time
            before, low = points[index - 1]
            return before + (target - low) / (metric - low) * (time - before)
    return math.nan


def with_variants(rounds: pd.DataFrame, suffixes: Mapping[str, str]) -> pd.DataFrame:
    """The plain runs of ``rounds``, and those of some variants as methods of their own.

    Args:
        suffixes: by variant, what is put behind the method's name: ``{"improved": "+"}`` gives ``flux+``.
    """
    kept = rounds[rounds["variant"].isin(["", *suffixes])].copy()
    kept["method"] += kept["variant"].map({"": "", **suffixes})
    return kept


def times_to_target(
    rounds: pd.DataFrame, target_fraction: float = 0.95, reference: str = "fmd", final_rounds: int = 1
) -> pd.DataFrame:
    """Time to target of every run in ``rounds``, one row per model, task, method and seed.

    Args:
        rounds: the ``rounds`` table of any number of runs.
        target_fraction: share of the reference's final metric.
        reference: the method whose final metric sets the target, and whose mean time the speed-ups refer to.
        final_rounds: the final metric is the mean of this many last scored rounds.

    Returns:
        Identity, ``target``, ``final_metric``, ``final_frac`` (of the reference's), time to target on each clock
        (``device_s``, ``wall_s``, ``round``; NaN: not reached) and ``speedup_<clock>``: the reference's mean time over
        this run's, NaN where either was not reached.

    Raises:
        ValueError: the reference is missing for a model and task, or ``target_fraction`` is not within (0, 1].
    """
    if not 0 < target_fraction <= 1:
        raise ValueError(f"target_fraction is {target_fraction}, allowed is above 0 and at most 1")
    rows = []
    for (model, task), runs in rounds.groupby(["model", "task"], sort=False):
        finals = {key: _final(run, final_rounds) for key, run in runs.groupby(["method", "seed"], sort=False)}
        of_reference = [final for (method, _), final in finals.items() if method == reference]
        if not of_reference:
            have = ", ".join(style.order(runs["method"]))
            raise ValueError(f"reference {reference!r} has no run for {model} and {task}; there are {have}")
        best = float(np.mean(of_reference))
        for (method, seed), run in runs.groupby(["method", "seed"], sort=False):
            rows.append(
                {
                    "model": model,
                    "task": task,
                    "method": method,
                    "seed": seed,
                    "metric_name": run["metric_name"].iloc[0],
                    "clock_model": run["clock_model"].iloc[0],
                    "link": run["link"].iloc[0],
                    "target_fraction": target_fraction,
                    "target": target_fraction * best,
                    "final_metric": finals[method, seed],
                    "final_frac": finals[method, seed] / best if best else math.nan,
                }
                | {c: time_to_target(run[c].tolist(), run["metric"].tolist(), target_fraction * best) for c in CLOCKS}
            )
    return _with_speedups(pd.DataFrame(rows), reference)


def option_table(
    rounds: pd.DataFrame,
    options: Sequence[str],
    target_fraction: float = 0.95,
    reference: str = "fmd",
    final_rounds: int = 1,
) -> pd.DataFrame:
    """What each option does alone: plain runs, ``improved`` ones, and those of the variants ``options``, side by side.

    Only models, tasks and seeds with a run of such a variant count, so that rows are means over the same seeds.

    Returns:
        One row per model, task and method (``"flux, int8"``): ``seeds``, ``final`` metric, ``rounds`` and ``device_s``
        to the target (means over seeds that reached it), ``missed`` (seeds that did not), ``round_device_s``. Empty
        when there are no such runs. See :func:`times_to_target` for the arguments.
    """
    every = with_variants(rounds, {name: f", {name}" for name in options} | {"improved": "+"})
    place, seed = ["model", "task"], ["model", "task", "seed"]
    every = every.merge(every.loc[every["variant"].isin(options), seed].drop_duplicates(), on=seed)
    if every.empty:
        return pd.DataFrame()
    times = times_to_target(every, target_fraction, reference, final_rounds)
    table = times.groupby([*place, "method"]).agg(
        seeds=("seed", "nunique"),
        final=("final_metric", "mean"),
        rounds=("round", "mean"),
        device_s=("device_s", "mean"),
        missed=("device_s", lambda found: int(found.isna().sum())),
    )
    trained = every[every["round"] > 0].groupby([*place, "method"])
    return table.join(trained["round_device_s"].mean()).reset_index()


def final_score(scores: Sequence[float], final_rounds: int = FINAL_ROUNDS) -> float:
    """Mean of the last scores, in the order of the rounds, NaN left out."""
    return float(pd.Series(scores).dropna().tail(final_rounds).mean())


def _final(run: pd.DataFrame, final_rounds: int) -> float:
    return final_score(run.sort_values("round")["metric"].tolist(), final_rounds)


def _with_speedups(times: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Every seed of the reference must have reached the target, or there is no time to compare with."""
    of_reference = times[times["method"] == reference].groupby(["model", "task"])
    for clock in CLOCKS:
        mean = of_reference[clock].mean(skipna=False)
        base = np.array([mean[key] for key in zip(times["model"], times["task"], strict=True)])
        own = times[clock].to_numpy(dtype=float)
        times[f"speedup_{clock}"] = np.divide(base, own, out=np.full(len(own), math.nan), where=own > 0)
    return times


def describe_times(times: pd.DataFrame, reference: str = "fmd") -> str:
    """``times`` (of :func:`times_to_target`) in words, as Markdown: one sentence per model, task and other method."""
    title = style.method(reference).title
    share = f"{times['target_fraction'].iloc[0]:.0%}".replace("%", " %")
    lines = [f"Target: {share} of {title}'s final score on the same model and task.", ""]
    for (model, task, method), runs in times.groupby(["model", "task", "method"], sort=False):
        if method != reference:
            name = style.method(str(method)).title
            lines.append(f"- **{model}, {task}.** {name} {_verdict(runs, title)}.")
    return "\n".join(lines)


def _verdict(runs: pd.DataFrame, reference: str) -> str:
    seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
    final = f"ends at {runs['final_frac'].mean():.0%} of {reference}'s score".replace("%", " %")
    missed = int(runs["device_s"].isna().sum())
    if missed:
        return f"did not reach the target in {missed} of {len(runs)} runs; it {final} ({seeds})"
    speedup, low, high = interval(runs["speedup_device_s"].to_numpy())
    if speedup != speedup:
        return f"reached the target, {reference} itself did not in every run; it {final} ({seeds})"
    spread = f" ({interval_name(len(runs)).split(' and ')[-1]}: {low:.2f} to {high:.2f})" if len(runs) > 1 else ""
    if runs["final_frac"].mean() < runs["target_fraction"].iloc[0]:
        final = final.replace("ends", "does not hold it and ends")
    clock = f"device clock ({clock_shapes(runs)})"
    wall, rounds = runs["speedup_wall_s"].mean(), runs["round"].mean()
    return (
        f"is {speedup:.2f}x as fast to the target{spread} on the {clock}, {wall:.2f}x as measured here, "
        f"in {rounds:.1f} rounds; it {final} ({seeds})"
    )
