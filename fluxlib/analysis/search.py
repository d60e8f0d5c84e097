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

    ``runs``: configurations by run id. ValueError: methods with unequal numbers of trials, since that would not be the
    same search; a run without a score.
    """
    rounds = rounds.assign(rank=[runs[name].adapter.used_rank for name in rounds["run_id"]])
    ends: Any = rounds.groupby([*PANEL, "run_id"])["device_s"].max().groupby(PANEL).min()
    found = []
    for run_id, run in rounds.groupby("run_id", sort=False):
        scored = run.dropna(subset=["metric"]).sort_values("round")
        if scored.empty:
            raise ValueError(f"{run_id} was never scored")
        panel, settings = tuple(run[PANEL].iloc[0]), [getattr(runs[str(run_id)].training, name) for name in SETTINGS]
        at_s = ends[panel]
        score = np.interp(at_s, scored["device_s"], scored["metric"])  # linear between scored rounds
        found.append((*panel, *settings, run["variant"].iloc[0], at_s, scored["metric"].iloc[-1], score))
    trial = [*PANEL, *SETTINGS, "variant", "at_s"]
    seeds = pd.DataFrame(found, columns=[*trial, "final", "score"]).groupby(trial, sort=False)
    frame = seeds.mean().assign(num_seeds=seeds.size()).reset_index()
    frame = frame.sort_values([*PANEL, "local_steps", "learning_rate"], kind="stable", ignore_index=True)
    counts = frame.groupby(PANEL).size()
    if counts.groupby("rank").nunique().max() > 1:
        listed = ", ".join(
            f"{method}{f' (rank {rank})' if rank else ''} {' to '.join(map(str, sorted({min(numbers), max(numbers)})))}"
            for (method, rank), numbers in counts.groupby(METHOD, sort=False)
        )
        raise ValueError(f"methods must have equally many trials on each model and task; there are: {listed}")
    frame["is_best"] = frame.groupby(PANEL)["score"].transform("idxmax").to_numpy() == frame.index.to_numpy()
    frame["mean"] = frame.groupby([*METHOD, *SETTINGS])["score"].transform("mean")
    order = frame.sort_values(["mean", *SETTINGS], ascending=[False, True, True], kind="stable")
    chosen = order.drop_duplicates(METHOD).set_index([*METHOD, *SETTINGS]).index
    frame["is_chosen"] = frame.set_index([*METHOD, *SETTINGS]).index.isin(chosen)
    return frame[list(COLUMNS)]
