"""Time to target: how long a method takes to a share of the reference method's final quality. Tables, no drawing.

The target of a model, task and seed is ``target_fraction`` times the reference's final metric with that seed: the same
for every method (the paper's own targets are absolute and belong to other models). So seeds are pairs: a seed that is
hard is hard for both. A run whose seed the reference lacks has no target and is left out (:func:`without_reference`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.analysis.statistics import geometric
from fluxlib.figures import style
from fluxlib.figures.canvas import clock_shapes, interval_name

SEED = ["model", "task", "seed"]
"""What two runs that are compared have in common."""
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


def without_reference(rounds: pd.DataFrame, reference: str = "fmd") -> list[str]:
    """Run ids of the runs that have no partner: the reference was not run on their model and task with their seed."""
    known = pd.MultiIndex.from_frame(rounds.loc[rounds["method"] == reference, SEED])
    alone = ~pd.MultiIndex.from_frame(rounds[SEED]).isin(known)
    return sorted(rounds.loc[alone, "run_id"].unique())


def times_to_target(
    rounds: pd.DataFrame, target_fraction: float = 0.95, reference: str = "fmd", final_rounds: int = 1
) -> pd.DataFrame:
    """Time to target of every run in ``rounds`` that has a partner, one row per model, task, method and seed.

    Args:
        rounds: the ``rounds`` table of any number of runs, one per model, task, method and seed.
        target_fraction: share of the reference's final metric with the same seed.
        reference: the method whose final metric sets the target, and whose time the speed-ups refer to.
        final_rounds: the final metric is the mean of this many last scored rounds.

    Returns:
        Identity, ``target``, ``final_metric``, ``final_frac`` (of the reference's), time to target on each clock
        (``device_s``, ``wall_s``, ``round``; NaN: not reached) and ``speedup_<clock>``: the time of the reference's
        run with the same seed over this run's, NaN where either was not reached.

    Raises:
        ValueError: the reference is missing for a model and task, or ``target_fraction`` is not within (0, 1].
    """
    if not 0 < target_fraction <= 1:
        raise ValueError(f"target_fraction is {target_fraction}, allowed is above 0 and at most 1")
    for (model, task), runs in rounds.groupby(["model", "task"], sort=False):
        if reference not in set(runs["method"]):
            have = ", ".join(style.order(runs["method"]))
            raise ValueError(f"reference {reference!r} has no run for {model} and {task}; there are {have}")
    rows: list[dict[str, Any]] = []
    for (model, task, seed), runs in rounds.groupby(SEED, sort=False):
        of_reference = runs[runs["method"] == reference]
        if of_reference.empty:
            continue
        best = _final(of_reference, final_rounds)
        fixed = {"model": model, "task": task, "seed": seed, "target_fraction": target_fraction}
        rows += [
            fixed | {"method": method} | _one(run, best, target_fraction, final_rounds)
            for method, run in runs.groupby("method", sort=False)
        ]
    return _with_speedups(pd.DataFrame(rows), reference)


def _one(run: pd.DataFrame, best: float, target_fraction: float, final_rounds: int) -> dict[str, Any]:
    final, target = _final(run, final_rounds), target_fraction * best
    return (
        {name: run[name].iloc[0] for name in ("metric_name", "clock_model", "link")}
        | {"target": target, "final_metric": final, "final_frac": final / best if best else math.nan}
        | {clock: time_to_target(run[clock].tolist(), run["metric"].tolist(), target) for clock in CLOCKS}
    )


def option_table(
    rounds: pd.DataFrame,
    options: Sequence[str],
    target_fraction: float = 0.95,
    reference: str = "fmd",
    final_rounds: int = 1,
) -> pd.DataFrame:
    """What each option does alone: runs of each variant in ``options``, and the plain ones, side by side.

    Of the plain runs only models, tasks and seeds with a run of that variant count, so that an option and what it is
    compared with are means over the same seeds.

    Returns:
        One row per option, model, task and method (``"flux, int8"``): ``seeds``, ``final`` metric, ``rounds`` and
        ``device_s`` to the target (means over seeds that reached it), ``missed`` (seeds that did not),
        ``round_device_s``. Empty when there are no such runs. See :func:`times_to_target` for the arguments.
    """
    tables = []
    for option in options:
        every = with_variants(rounds, {option: f", {option}"})
        every = every.merge(every.loc[every["variant"] == option, SEED].drop_duplicates(), on=SEED)
        if len(every):
            times = times_to_target(every, target_fraction, reference, final_rounds)
            tables.append(_means(every, times).assign(option=option).set_index("option").reset_index())
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _means(rounds: pd.DataFrame, times: pd.DataFrame) -> pd.DataFrame:
    """One row per model, task and method: means over seeds."""
    place = ["model", "task", "method"]
    table = times.groupby(place).agg(
        seeds=("seed", "nunique"),
        final=("final_metric", "mean"),
        rounds=("round", "mean"),
        device_s=("device_s", "mean"),
        missed=("device_s", lambda found: int(found.isna().sum())),
    )
    trained = rounds[rounds["round"] > 0].groupby(place)
    return table.join(trained["round_device_s"].mean()).reset_index()


def final_score(scores: Sequence[float], final_rounds: int = FINAL_ROUNDS) -> float:
    """Mean of the last scores, in the order of the rounds, NaN left out."""
    return float(pd.Series(scores).dropna().tail(final_rounds).mean())


def _final(run: pd.DataFrame, final_rounds: int) -> float:
    return final_score(run.sort_values("round")["metric"].tolist(), final_rounds)


def _with_speedups(times: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Seed by seed: each run against the reference's with its seed."""
    base = times.loc[times["method"] == reference].set_index(SEED)
    for clock in CLOCKS:
        theirs = base[clock].reindex(pd.MultiIndex.from_frame(times[SEED])).to_numpy(dtype=float)
        own = times[clock].to_numpy(dtype=float)
        times[f"speedup_{clock}"] = np.divide(theirs, own, out=np.full(len(own), math.nan), where=own > 0)
    return times


def describe_times(times: pd.DataFrame, reference: str = "fmd") -> str:
    """``times`` (of :func:`times_to_target`) in words, as Markdown: one sentence per model, task and other method."""
    title = style.method(reference).title
    share = f"{times['target_fraction'].iloc[0]:.0%}".replace("%", " %")
    lines = [f"Target: {share} of {title}'s final score on the same model and task with the same seed.", ""]
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
    speedup, low, high = geometric(runs["speedup_device_s"])
    if runs["speedup_device_s"].isna().any():
        return f"reached the target, {reference} itself did not in every run; it {final} ({seeds})"
    spread = f" ({interval_name(len(runs)).split(' and ')[-1]}: {low:.2f} to {high:.2f})" if len(runs) > 1 else ""
    if runs["final_frac"].mean() < runs["target_fraction"].iloc[0]:
        final = final.replace("ends", "does not hold it and ends")
    clock = f"device clock ({clock_shapes(runs)})"
    wall, rounds = geometric(runs["speedup_wall_s"])[0], runs["round"].mean()
    return (
        f"is {speedup:.2f}x as fast to the target{spread} on the {clock}, {wall:.2f}x as measured here, "
        f"in {rounds:.1f} rounds; it {final} ({seeds})"
    )
