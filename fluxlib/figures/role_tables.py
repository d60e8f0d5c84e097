"""What runs with different assignments come to: roles as a tidy table, coverage, load, time to target. No drawing."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fluxlib import records
from fluxlib.figures.times import time_to_target

ROLES = ("exploited", "explored")
RUN = ["setting", "seed"]


def roles_table(participants: pd.DataFrame) -> pd.DataFrame:
    """One row per expert that a participant exploited or explored in a round.

    Args:
        participants: the ``participants`` table of some runs, with the columns ``setting`` and ``seed``.
    """
    parts = []
    for role in ROLES:
        kept = [*RUN, "round", "participant"]
        frame = participants[kept].assign(expert=participants[role].str.split())
        frame = frame.explode("expert").dropna(subset=["expert"])
        found = [records.read_experts(key)[0] for key in frame["expert"]]
        parts.append(frame.assign(layer=[f[0] for f in found], expert=[f[1] for f in found], role=role))
    return pd.concat(parts, ignore_index=True)


def coverage(roles: pd.DataFrame, num_experts: int) -> pd.DataFrame:
    """Share of all experts that anybody has tuned so far, by setting, seed and round."""
    rows: list[tuple[object, ...]] = []
    for key, run in roles[roles["role"] == "exploited"].groupby(RUN, sort=False):
        first = run.groupby(["layer", "expert"])["round"].min()
        for number in range(1, int(run["round"].max()) + 1):
            rows.append((*key, number, float((first <= number).sum()) / num_experts))
    return pd.DataFrame(rows, columns=[*RUN, "round", "covered_frac"])


def load(roles: pd.DataFrame, num_experts: int) -> pd.DataFrame:
    """How often each expert was tuned, by setting and seed: ``share`` of all tunings, most tuned first (``rank``)."""
    rows = []
    for key, run in roles[roles["role"] == "exploited"].groupby(RUN, sort=False):
        counts = run.groupby(["layer", "expert"]).size().sort_values(ascending=False).to_numpy()
        counts = np.concatenate([counts, np.zeros(num_experts - len(counts))])
        rows += [(*key, rank, count / counts.sum()) for rank, count in enumerate(counts)]
    return pd.DataFrame(rows, columns=[*RUN, "rank", "share"])


def outcomes(
    rounds: pd.DataFrame, participants: pd.DataFrame, reference: str, target_fraction: float = 0.95, last: int = 3
) -> pd.DataFrame:
    """Every run in one row: quality, time to target, coverage and load.

    Args:
        rounds, participants: tables of some runs of one model and task, with the column ``setting``.
        reference: the setting whose final score, mean over seeds, sets the target.
        last: the final score is the mean of this many last scored rounds; one test split is small.

    Returns:
        ``final_metric``, ``final_loss``, ``mean_metric`` (over all scored rounds), ``target``, ``round``, ``device_s``
        and ``wall_s`` to target (NaN: not reached; ``<clock>_at_least``: the whole run then), ``covered_frac`` and
        ``load_cv``: standard deviation over mean of how often each expert was tuned.
    """
    num_experts = int(rounds["num_experts"].max())
    roles = roles_table(participants)
    covered = coverage(roles, num_experts).groupby(RUN)["covered_frac"].last().to_dict()
    spread = load(roles, num_experts).groupby(RUN)["share"].agg(lambda share: share.std(ddof=0) / share.mean())
    scored = rounds.dropna(subset=["metric"])
    finals = scored.groupby(RUN)["metric"].apply(lambda metric: metric.tail(last).mean())
    target = target_fraction * float(finals[reference].mean())
    load_cv, final = spread.to_dict(), finals.to_dict()
    rows = []
    for key, run in scored.groupby(RUN, sort=False):
        row = {"setting": key[0], "seed": key[1], "final_metric": final[key], "final_loss": run["loss"].iloc[-1],
               "mean_metric": run["metric"].mean(), "target": target, "target_fraction": target_fraction}  # fmt: skip
        times = {c: time_to_target(run[c].tolist(), run["metric"].tolist(), target) for c in TIMES}
        ends = {f"{c}_at_least": run[c].iloc[-1] if times[c] != times[c] else times[c] for c in TIMES}
        rows.append(row | times | ends | {"covered_frac": covered[key], "load_cv": load_cv[key]})
    return pd.DataFrame(rows)


TIMES = ("round", "device_s", "wall_s")


def probe_shares(participants: pd.DataFrame) -> pd.DataFrame:
    """Mean share of each phase in a participant's round, by clock.

    ``device``: without the first round, whose download is another. ``wall``: what is measured, so without links.
    """
    kept = participants[(participants["rejected"] == "") & (participants["round"] > 1)]
    rows = []
    for clock in ("device", "wall"):
        seconds = pd.DataFrame({p: kept[f"{p}_{clock}_s"].fillna(0.0).mean() for p in records.PHASES}, index=[0])
        total = float(seconds.to_numpy().sum())
        rows += [(clock, phase, float(seconds[phase].iloc[0]) / total) for phase in records.PHASES if total]
    return pd.DataFrame(rows, columns=["clock", "phase", "share"])
