"""What runs came to beside time to target: final quality beside the reference's, and where a round's time went.

Rounds of different methods take different times: twenty of FLUX's are over when FMD has had six. At equal rounds a
method with short rounds has had less time, at equal seconds it has had more rounds. Both are told, seed by seed.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd

from fluxlib.analysis.statistics import interval
from fluxlib.analysis.time_to_target import PAIR, final_score
from fluxlib.analysis.wording import methods_in_order
from fluxlib.records import PHASES

EQUAL_ROUNDS, EQUAL_SECONDS = "equal rounds", "equal seconds"
WHOLE = 0.9
"""Share of the reference's seconds from which on a comparison at equal seconds is one of final quality."""
OWN_PHASES = ("merge", "quantize", "profile", "probe")
"""Phases of :data:`fluxlib.records.PHASES` that only FLUX has."""
SERIAL = tuple(phase for phase in PHASES if phase not in ("quantize", "profile"))
"""Phases that follow one another; a stale profile runs beside upload and server."""


def final_quality(rounds: pd.DataFrame, reference: str = "fmd") -> pd.DataFrame:
    """Each run's score beside that of the reference with the same seed: one row per pair and way of comparing.

    ``rounds`` are of one run per model, task, seed and method. ``equal rounds``: the final score of both after the last
    round that both have. ``equal seconds``: the score of both at the device second at which the reference's run ends,
    or the other's if that is earlier; linear between rounds.

    Returns:
        ``model``, ``task``, ``seed``, ``method``, ``compared``, ``score``, ``reference_score``, their ``ratio``,
        ``at_s``, the device second (NaN at equal rounds), ``of_reference``, the share of the reference's run that is
        over by then: below 1 where the other run ended first, ``clock_model`` and ``link``.
    """
    rows = []
    scored = rounds.dropna(subset=["metric"]).sort_values("round", kind="stable")
    for compared in (EQUAL_ROUNDS, EQUAL_SECONDS):
        for _, runs in scored.groupby(list(PAIR), sort=False):
            base = runs[runs["method"] == reference]
            for method in methods_in_order(set(runs["method"]) - {reference}) if len(base) else ():
                own = runs[runs["method"] == method]
                at_s, end_s = math.nan, float(base["device_s"].max())
                if compared == EQUAL_SECONDS:
                    at_s = min(end_s, float(own["device_s"].max()))
                    pair = [np.interp(at_s, run["device_s"], run["metric"], left=math.nan) for run in (own, base)]
                else:
                    last = min(own["round"].max(), base["round"].max())
                    pair = [final_score(run.loc[run["round"] <= last, "metric"].tolist()) for run in (own, base)]
                ratio, share = pair[0] / (pair[1] or math.nan), 1.0 if at_s != at_s else at_s / end_s
                rows.append((*own[[*PAIR, "method"]].iloc[0], compared, *pair, ratio, at_s, share,
                             *own[["clock_model", "link"]].iloc[0]))  # fmt: skip
    quality = ["score", "reference_score", "ratio", "at_s", "of_reference", "clock_model", "link"]
    return pd.DataFrame(rows, columns=[*PAIR, "method", "compared", *quality])


def quality_over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`final_quality` over seeds: one row per model, task, method and way, with mean, interval and seeds.

    ``of_reference`` is the least share of the reference's run that any seed was compared at.
    """
    groups = table.groupby(["model", "task", "method", "compared"], sort=False)
    found = groups[["score", "reference_score"]].mean().assign(seeds=groups["seed"].nunique())
    found[["ratio", "low", "high"]] = [interval(ratios) for _, ratios in groups["ratio"]]
    return found.assign(of_reference=groups["of_reference"].min()).reset_index()


def slowest(participants: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``participants`` of each round's slowest reply; seconds of its phases by the phases' names."""
    accepted = participants[participants["rejected"] == ""].rename(columns={f"{p}_device_s": p for p in PHASES})
    path_s = accepted[list(SERIAL)].sum(axis=1)
    return accepted.loc[path_s.groupby([accepted["run_id"], accepted["round"]]).idxmax()]


def breakdown(rounds: pd.DataFrame, participants: pd.DataFrame) -> pd.DataFrame:
    """Mean device ``seconds`` over rounds of each round's slowest participant, and ``share`` of the mean round.

    One row per model, task, method and phase.
    """
    kept = rounds[["run_id", "round", "model", "task", "method", "round_device_s", "server_device_s"]]
    found = slowest(participants)[["run_id", "round", *PHASES]].merge(kept, on=["run_id", "round"])
    found = found.rename(columns={"server_device_s": "server"})
    means = found.groupby(["model", "task", "method"], sort=False)[[*PHASES, "server", "round_device_s"]].mean()
    tidy = means.melt(id_vars="round_device_s", var_name="phase", value_name="seconds", ignore_index=False)
    tidy = tidy.reset_index()
    return tidy.assign(share=tidy["seconds"] / tidy["round_device_s"]).drop(columns="round_device_s")


def phase_shares(participants: pd.DataFrame) -> pd.DataFrame:
    """Mean share of each phase in a participant's round, by clock.

    ``device``: without the first round, whose download is another. ``wall``: what is measured, so without links.
    """
    kept = participants[(participants["rejected"] == "") & (participants["round"] > 1)]
    every = itertools.product(("device", "wall"), PHASES)
    seconds = {(clock, phase): kept[f"{phase}_{clock}_s"].fillna(0.0).mean() for clock, phase in every}
    table = pd.Series(seconds).rename_axis(["clock", "phase"])
    return (table / table.groupby("clock").transform("sum")).rename("share").reset_index()
