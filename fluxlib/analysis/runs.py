"""What runs came to beside time to target: final quality beside the reference's, and where a round's time went.

Rounds of different methods take different times: twenty of FLUX's are over when FMD has had six. At equal rounds a
method with short rounds has had less time, at equal seconds it has had more rounds. Both are told, seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.analysis.statistics import interval
from fluxlib.analysis.time_to_target import PAIR, final_score
from fluxlib.analysis.wording import methods_in_order
from fluxlib.records import PHASES

EQUAL_ROUNDS, EQUAL_SECONDS = "equal rounds", "equal seconds"
WHOLE = 0.9
"""Share of the reference's seconds from which on a comparison at equal seconds is one of final quality."""
QUALITY = ("score", "reference_score", "ratio", "at_s", "of_reference")
SERIAL = tuple(phase for phase in PHASES if phase not in ("quantize", "profile"))
"""Phases that follow one another; a stale profile runs beside upload and server."""


def score_at(times: Sequence[float], scores: Sequence[float], at: float) -> float:
    """The score at a moment, linear between two scored rounds (as time to target is); NaN before the first.

    After the last scored round it is that round's. Rounds that were not scored (NaN) are passed over.
    """
    points = [(float(time), float(score)) for time, score in zip(times, scores, strict=True) if score == score]
    if not points or at < points[0][0]:
        return math.nan
    known, found = zip(*points, strict=True)
    return float(np.interp(at, known, found))


def final_quality(plain: pd.DataFrame, longest: pd.DataFrame, reference: str = "fmd") -> pd.DataFrame:
    """Each run's score beside that of the reference with the same seed: one row per pair and way of comparing.

    ``equal rounds``: the final score of both, where they have as many rounds. ``equal seconds``: the score of both at
    the device second at which the reference's run ends, or the other's where that is earlier.

    Args:
        plain: ``rounds`` of one run per model, task, seed and method, all with the same number of rounds.
        longest: the same, a longer run in the place of a plain one where there is such.

    Returns:
        ``model``, ``task``, ``seed``, ``method``, ``compared``, ``score``, ``reference_score``, their ``ratio``,
        ``at_s``, the device second (NaN at equal rounds), ``of_reference``, the share of the reference's run that is
        over by then: below 1 where the other run ended first, ``clock_model`` and ``link``.
    """
    rows: list[dict[str, Any]] = []
    for compared, rounds in ((EQUAL_ROUNDS, plain), (EQUAL_SECONDS, longest)):
        scored = rounds.dropna(subset=["metric"]).sort_values("round", kind="stable")
        for pair, runs in scored.groupby(list(PAIR), sort=False):
            base = runs[runs["method"] == reference]
            for method in methods_in_order(set(runs["method"]) - {reference}) if len(base) else ():
                own = runs[runs["method"] == method]
                if compared == EQUAL_SECONDS or own["round"].max() == base["round"].max():
                    fixed = dict(zip(PAIR, pair, strict=True)) | {"method": method, "compared": compared}
                    shapes = {name: own[name].iloc[0] for name in ("clock_model", "link")}
                    rows.append(fixed | _beside(own, base, compared) | shapes)
    return pd.DataFrame(rows, columns=None if rows else [*PAIR, "method", "compared", *QUALITY, "clock_model", "link"])


def _beside(own: pd.DataFrame, base: pd.DataFrame, compared: str) -> dict[str, float]:
    at_s, share = math.nan, 1.0
    if compared == EQUAL_ROUNDS:
        score, reference = (final_score(run["metric"].tolist()) for run in (own, base))
    else:
        end_s = float(base["device_s"].max())
        at_s = min(end_s, float(own["device_s"].max()))
        score, reference = (score_at(run["device_s"].tolist(), run["metric"].tolist(), at_s) for run in (own, base))
        share = at_s / end_s
    ratio = score / reference if reference else math.nan
    return dict(zip(QUALITY, (score, reference, ratio, at_s, share), strict=True))


def quality_over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`final_quality` over seeds: one row per model, task, method and way, with mean, interval and seeds.

    ``of_reference`` is the least share of the reference's run that any seed was compared at.
    """
    rows = []
    keys = ["model", "task", "method", "compared"]
    for key, part in table.groupby(keys, sort=False):
        ratio = dict(zip(("ratio", "low", "high"), interval(part["ratio"]), strict=True))
        means = {name: part[name].mean() for name in ("score", "reference_score")}
        fixed = dict(zip(keys, key, strict=True)) | {"seeds": part["seed"].nunique()}
        rows.append(fixed | means | ratio | {"of_reference": part["of_reference"].min()})
    return pd.DataFrame(rows)


def breakdown(rounds: pd.DataFrame, participants: pd.DataFrame) -> pd.DataFrame:
    """Mean device seconds of each phase over rounds, of each round's slowest participant.

    Returns:
        One row per model, task, method and phase: ``seconds``, and ``share`` of the mean round.
    """
    columns = [f"{phase}_device_s" for phase in PHASES]
    accepted = participants[participants["rejected"] == ""].copy()
    accepted["path_s"] = accepted[[f"{phase}_device_s" for phase in SERIAL]].sum(axis=1)
    slowest = accepted.loc[accepted.groupby(["run_id", "round"])["path_s"].idxmax()]
    kept = rounds[["run_id", "round", "model", "task", "method", "round_device_s", "server_device_s"]]
    found = slowest[["run_id", "round", *columns]].merge(kept, on=["run_id", "round"])
    found = found.rename(columns={**dict(zip(columns, PHASES, strict=True)), "server_device_s": "server"})
    means = found.groupby(["model", "task", "method"], sort=False)[[*PHASES, "server", "round_device_s"]].mean()
    tidy = means.melt(id_vars="round_device_s", var_name="phase", value_name="seconds", ignore_index=False)
    tidy = tidy.reset_index()
    return tidy.assign(share=tidy["seconds"] / tidy["round_device_s"]).drop(columns="round_device_s")
