"""The search for each method's settings: a table of trials, and which settings are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.config import RunConfig

SETTINGS = ("learning_rate", "local_steps")
"""Fields of :class:`~fluxlib.config.TrainingConfig` that are searched."""
METHOD = ["method", "rank"]
"""Who is searched for: a method, and the rank of its adapters (0: none), whose settings are their own."""
PANEL = ["model", "task", *METHOD]
COLUMNS = (*PANEL, *SETTINGS, "variant", "num_seeds", "final", "at_s", "score", "mean", "is_best", "is_chosen")


def trials(rounds: pd.DataFrame, runs: Mapping[str, RunConfig]) -> pd.DataFrame:
    """One row per trial: its settings, its last score, and its score at the moment when all trials can be compared.

    That moment, ``at_s`` on the device clock, is when the quickest of the method's trials on this model and task had
    ended: more local work per round must pay within the same time. ``is_best`` marks the highest mean score over seeds
    there (the first of the table among equals). ``mean`` is a setting's score over all models and tasks, and
    ``is_chosen`` marks one setting per method, since nobody tunes a method per task: that of the highest mean, among
    equals the lowest learning rate and then the fewest steps. A method with adapters is another method here.

    Args:
        rounds: the ``rounds`` table of all trials.
        runs: their configurations, by run id (:func:`fluxlib.analysis.store.configs`).

    Raises:
        ValueError: methods with unequal numbers of trials, since that would not be the same search; a run without a
            score.
    """
    rows: list[dict[str, Any]] = []
    rounds = rounds.assign(rank=[runs[name].adapter.used_rank for name in rounds["run_id"]])
    for panel, every in rounds.groupby(PANEL, sort=False):
        at_s = float(every.groupby("run_id")["device_s"].max().min())
        for variant, same in every.groupby("variant", sort=False):
            found = [_scores(run, at_s) for _, run in same.groupby("run_id")]
            final, score = (sum(values) / len(found) for values in zip(*found, strict=True))
            config = runs[same["run_id"].iloc[0]]
            row = dict(zip(PANEL, panel, strict=True)) | {name: getattr(config.training, name) for name in SETTINGS}
            row |= {"variant": variant, "num_seeds": len(found), "final": final, "at_s": at_s, "score": score}
            rows.append(row)
    frame = pd.DataFrame(rows, columns=[*COLUMNS]).sort_values(
        [*PANEL, "local_steps", "learning_rate"], kind="stable", ignore_index=True
    )
    counts = frame.groupby(PANEL).size()
    if counts.groupby("rank").nunique().max() > 1:
        named = counts.rename(index=lambda rank: f" (rank {rank})" if rank else "", level="rank").groupby(
            METHOD, sort=False
        )
        listed = ", ".join(f"{name}{rank} {_span(found)}" for (name, rank), found in named)
        raise ValueError(f"methods must have equally many trials on each model and task; there are: {listed}")
    frame["is_best"] = frame.groupby(PANEL)["score"].transform("idxmax").to_numpy() == frame.index.to_numpy()
    frame["mean"] = frame.groupby([*METHOD, *SETTINGS])["score"].transform("mean")
    order = frame.sort_values(["mean", *SETTINGS], ascending=[False, True, True], kind="stable")
    chosen = order.drop_duplicates(METHOD).set_index([*METHOD, *SETTINGS]).index
    frame["is_chosen"] = frame.set_index([*METHOD, *SETTINGS]).index.isin(chosen)
    return frame[list(COLUMNS)]


def _scores(run: pd.DataFrame, at_s: float) -> tuple[float, float]:
    """Last score of a run, and its score at ``at_s``, linear between scored rounds."""
    scored = run.dropna(subset=["metric"]).sort_values("round")
    if scored.empty:
        raise ValueError(f"{run['run_id'].iloc[0]} was never scored")
    return float(scored["metric"].iloc[-1]), float(np.interp(at_s, scored["device_s"], scored["metric"]))


def _span(numbers: pd.Series) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low} to {high}"
