"""Time to target: when a run reaches a share of the reference's final score. Computed here and nowhere else.

The target of a model, task and seed is a share of the reference's final score with that seed, the same for every method
(the paper's own targets are absolute and belong to other models). Everybody reads one table, of :func:`times_to_target`
or, for a target that is given, of :func:`reach`:

======================  ===============================================================================================
column                  one row per run
======================  ===============================================================================================
identity                ``run_id``, ``model``, ``task``, ``method``, ``variant``, ``seed``, ``metric_name``,
                        ``clock_model``, ``link``: those that ``rounds`` has
``rounds``              last round
``final_metric``        final score: mean of the last scored rounds
``best_metric``         highest score
``end_s``, ``round_s``  device seconds of the whole run, and of its mean round
``target``              the score to reach
``<clock>_to_target``   ``device_s``, ``wall_s`` and ``round`` to the target; NaN: not reached
``<clock>_at_least``    the same; where the target was not reached, the whole run: it takes at least that long
``target_fraction``     share of the reference's final score that ``target`` is (not of :func:`reach`, as all below)
``final_frac``          final score over the reference's
``speedup_<clock>``     the reference's time over this run's, seed by seed; NaN where either was not reached
======================  ===============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

PAIR = ("model", "task", "seed")
"""What two runs that are compared have in common."""
CLOCKS = ("device_s", "wall_s", "round")
"""Columns of ``rounds`` in which time may be counted: both clocks, and rounds."""
IDENTITY = ("run_id", "model", "task", "method", "variant", "seed", "metric_name", "clock_model", "link")
FINAL_ROUNDS = 3
"""A final score is the mean of this many last scored rounds: one test split is small."""
TARGET_FRACTION = 0.95


def crossing(times: Sequence[float], scores: Sequence[float], target: float) -> float:
    """When ``scores`` first reaches ``target``, linear between two scored rounds; NaN when it never does.

    Rounds that were not scored (NaN) are passed over. A first score at or above the target counts from its own time.
    ValueError: times that go backwards.
    """
    points = [(float(time), float(score)) for time, score in zip(times, scores, strict=True) if score == score]
    if any(later < earlier for (earlier, _), (later, _) in zip(points, points[1:], strict=False)):
        raise ValueError("times must not go backwards")
    for index, (time, score) in enumerate(points):
        if score >= target:
            if index == 0:
                return time
            before, low = points[index - 1]
            return before + (target - low) / (score - low) * (time - before)
    return math.nan


def final_score(scores: Sequence[float], final_rounds: int = FINAL_ROUNDS) -> float:
    """Mean of the last scores, in the order of the rounds, NaN left out."""
    last = [score for score in scores if score == score][-final_rounds:]
    return float(np.mean(last)) if last else math.nan


def final_scores(rounds: pd.DataFrame, final_rounds: int = FINAL_ROUNDS) -> pd.Series:
    """:func:`final_score` of every run of ``rounds``, by ``run_id``."""
    runs = rounds.sort_values("round", kind="stable").groupby("run_id", sort=False)["metric"]
    return runs.agg(lambda scores: final_score(scores.tolist(), final_rounds))


def reach(
    rounds: pd.DataFrame, target: float, final_rounds: int = FINAL_ROUNDS, keep: Sequence[str] = ()
) -> pd.DataFrame:
    """Time to a given ``target`` of every run: the columns above up to ``<clock>_at_least``, and those to ``keep``."""
    rows = []
    for _, unsorted in rounds.groupby("run_id", sort=False):
        run = unsorted.sort_values("round", kind="stable")
        scores = run["metric"].tolist()
        times = {clock: crossing(run[clock].tolist(), scores, target) for clock in CLOCKS}
        rows.append({
            **{name: run[name].iloc[0] for name in dict.fromkeys((*IDENTITY, *keep)) if name in run},
            "rounds": run["round"].max(), "final_metric": final_score(scores, final_rounds),
            "best_metric": run["metric"].max(), "end_s": run["device_s"].max(),
            "round_s": run.loc[run["round"] > 0, "round_device_s"].mean(), "target": target,
            **{f"{clock}_to_target": time for clock, time in times.items()},
            **{f"{clock}_at_least": run[clock].max() if time != time else time for clock, time in times.items()},
        })  # fmt: skip
    return pd.DataFrame(rows)


def times_to_target(
    rounds: pd.DataFrame,
    fraction: float = TARGET_FRACTION,
    reference: str = "fmd",
    by: str = "method",
    pairs: Sequence[str] = PAIR,
    final_rounds: int = FINAL_ROUNDS,
) -> pd.DataFrame:
    """Time to target of every run in ``rounds`` that has a partner, one row per run; columns above.

    Args:
        fraction: share of the reference's final score with the same seed; else than within (0, 1] ValueError.
        reference: the method (or whatever is in the column ``by``) whose final score sets the target and whose time the
            speed-ups refer to: the mean of its runs where a pair has several. ValueError: a model and task lack it.
        pairs: what runs that are compared have in common; kept in the table, as is ``by``.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, allowed is above 0 and at most 1")
    for (model, task), runs in rounds.groupby(["model", "task"], sort=False):
        if reference not in set(runs[by]):
            have = ", ".join(dict.fromkeys(runs[by]))
            raise ValueError(f"reference {reference!r} has no run for {model} and {task}; there are {have}")
    tables = []
    for _, runs in rounds.groupby(list(pairs), sort=False):
        best = float(final_scores(runs[runs[by] == reference], final_rounds).mean())
        if best == best:  # the reference has a run, and it was scored
            table = reach(runs, fraction * best, final_rounds, (by, *pairs))
            theirs = table[table[by] == reference]
            table["final_frac"] = table["final_metric"] / (best or math.nan)
            for clock in CLOCKS:
                own = table[f"{clock}_to_target"]
                table[f"speedup_{clock}"] = theirs[f"{clock}_to_target"].mean(skipna=False) / own.where(own > 0)
            tables.append(table)
    return pd.concat(tables, ignore_index=True).assign(target_fraction=fraction) if tables else pd.DataFrame()


def by_loss(rounds: pd.DataFrame) -> pd.DataFrame:
    """``rounds`` with another measure as ``metric``: how far the loss has fallen since the base model, nats per token.

    Time to target is then the time to a share of the reference's fall.
    """
    start = rounds["run_id"].map(rounds.sort_values("round", kind="stable").groupby("run_id")["loss"].first())
    return rounds.assign(metric=start - rounds["loss"], metric_name="fall of the loss")


def without_reference(rounds: pd.DataFrame, reference: str = "fmd") -> list[str]:
    """Run ids of the runs that have no partner: the reference was not run on their model and task with their seed."""
    partnered = (rounds["method"] == reference).groupby([rounds[name] for name in PAIR]).transform("any")
    return sorted(rounds.loc[~partnered, "run_id"].unique())
