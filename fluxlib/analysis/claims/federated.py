"""Claims on the scores and the overhead of whole runs, from the tables ``rounds`` and ``participants``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.analysis.claims import base
from fluxlib.analysis.claims.base import (
    AGREES,
    DIFFERS,
    DIRECTION,
    MISSING,
    Claim,
    Reading,
    Tables,
    clock_of,
    few,
    of_model,
)
from fluxlib.analysis.claims.races import OURS, REFERENCE
from fluxlib.analysis.studies import verdicts
from fluxlib.analysis.wording import sentence, shown, shown_interval
from fluxlib.figures import overhead
from fluxlib.figures.quality import EQUAL_ROUNDS, EQUAL_SECONDS, WHOLE, quality_table
from fluxlib.figures.times import FINAL_ROUNDS

OWN_PHASES = ("merge", "quantize", "profile", "probe")
ABSOLUTE = {"dolly": 0.50, "gsm8k": 0.62, "mmlu": 0.75, "piqa": 0.80}
"""The paper's targets on its own data."""


def final_quality(compared: str, only: str = "") -> Callable[[Claim, Tables], list[Reading]]:
    """A reader for the score as a share of FMD's, of tasks whose name ends with ``only``.

    Args:
        compared: at ``equal rounds`` or at ``equal seconds``, see :mod:`fluxlib.figures.quality`.
    """

    def read(claim: Claim, tables: Tables) -> list[Reading]:
        """Every task by the rule of :mod:`fluxlib.analysis.studies.verdicts`, the ratio seed by seed; the weakest task decides.

        No effect would be 0.95 or less, the share that time to accuracy asks for. A comparison at equal seconds that
        ends before nine tenths of FMD's run is told, but is no evidence on final quality: with other tasks beside it
        the claim is agreed with in direction at most, alone it counts as not attempted.
        """
        found = []
        for name, rounds, _ in tables.plain():
            table = tables.quality
            rows = of_model(table[(table["method"] == OURS) & (table["compared"] == compared)], name)
            rows = rows[rows["task"].str.endswith(only)]
            if len(rows):
                found.append(_quality(claim, name, rows, rounds, compared))
        return found

    return read


def _quality(claim: Claim, name: str, rows: pd.DataFrame, rounds: pd.DataFrame, compared: str) -> Reading:
    assert claim.size is not None
    means = quality_table(rows).set_index("task")
    told = []
    for task, row in means.iterrows():
        at = f", at {shown(row['of_reference'], '%')} of FMD's run" if row["of_reference"] < WHOLE else ""
        told.append(f"`{task}` {shown_interval(row['ratio'], row['low'], row['high'], claim.unit)}"
                    f" ({row['score']:.3f} against {row['reference_score']:.3f}{at})")  # fmt: skip
    whole = means[means["of_reference"] >= WHOLE]
    early = [f"`{task}`" for task in means.index.difference(whole.index)]
    judged = [verdicts.judge(rows.loc[rows["task"] == task, "ratio"].to_numpy(), claim.size, null=claim.null)
              for task in whole.index]  # fmt: skip
    verdict = verdicts.weakest([*judged, *([DIRECTION] if early else [])]) if judged else MISSING
    fewest = int(means["seeds"].min())
    parts = [few(fewest) if judged else "", f"mean over tasks {shown(means['ratio'].mean(), '%')}"]
    least: Any = {"ratio": np.nan, "low": np.nan, "high": np.nan}
    if judged:
        worst = str(whole["ratio"].idxmin())
        least = whole.loc[worst]
        parts += [_trend(rounds, worst)] if verdict != AGREES and compared == EQUAL_ROUNDS else []
    parts += [f"FLUX's run ended too early for a final score on {', '.join(early)}"] if early else []
    clock = clock_of(rounds) if compared == EQUAL_SECONDS else ""
    reached = claim.reached(least["ratio"]) if judged else None
    reached = None if early and reached else reached  # not every task was seen to the end
    return Reading(
        name, verdict, "; ".join(told), least["ratio"], least["low"], least["high"], int(means["seeds"].max()),
        fewest, tuple(map(str, means.index)), clock, reached, sentence(parts),
    )  # fmt: skip


def oscillation(claim: Claim, tables: Tables) -> list[Reading]:
    """How far FMQ's score falls between scored rounds, all falls added up, over the same of FMD.

    Seed by seed, over the tasks and scored rounds that both have; a seed in which FMD never falls has no ratio.
    """
    found = []
    for name, rounds, _ in tables.plain():
        runs = rounds[rounds["method"].isin(["fmq", REFERENCE])].dropna(subset=["metric"])
        wide = runs.pivot_table(index=["seed", "task", "round"], columns="method", values="metric").dropna()
        if wide.shape[1] < 2 or wide.empty:
            continue
        falls = wide.groupby(["seed", "task"]).diff().clip(upper=0).abs().groupby("seed").sum()
        ratio = (falls["fmq"] / falls[REFERENCE].replace(0, np.nan)).dropna()
        if len(ratio):
            tasks, still = tuple(map(str, wide.index.unique("task"))), len(falls) - len(ratio)
            why = f"FMD never falls in {still} of {len(falls)} seeds, left out" if still else ""
            found.append(base.read_size(claim, name, ratio.to_numpy(dtype=float), tasks, why))
    return found


def own_share(claim: Claim, tables: Tables) -> list[Reading]:
    """FLUX's own phases (merge, quantize, profile, probe) as a share of a round on the device clock, in its plain runs.

    A profile that runs beside the upload counts as well, although nobody waits for it.
    """
    found = []
    for name, rounds, _ in tables.plain():
        ours = rounds[(rounds["method"] == OURS) & (rounds["round"] > 0)]
        if ours.empty or tables.participants is None:
            continue
        parts = tables.participants[tables.participants["run_id"].isin(ours["run_id"])]
        shares = []
        for _, runs in ours.groupby("seed"):
            phases = overhead.breakdown(runs, parts[parts["run_id"].isin(runs["run_id"])])
            own = phases[phases["phase"].isin(OWN_PHASES)].pivot_table(index="task", columns="phase", values="share")
            shares.append(own.mean())
        table = pd.DataFrame(shares)
        largest = str(table.mean().idxmax())
        why = f"of it {largest} {shown(float(table[largest].mean()), '%')}"
        tasks = tuple(pd.unique(ours["task"]))
        found.append(base.read_size(claim, name, table.sum(axis=1).to_numpy(), tasks, why, clock_of(ours)))
    return found


def absolute_targets(claim: Claim, tables: Tables) -> list[Reading]:
    """The paper's own targets, on its own data sets only.

    ``agrees``: FLUX's score reaches every target with every seed, of at least
    :data:`~fluxlib.analysis.studies.verdicts.MIN_SEEDS`. ``does not``: anything else.
    """
    found = []
    for name, rounds, _ in tables.plain():
        rows = rounds[(rounds["method"] == OURS) & rounds["task"].isin(ABSOLUTE)]
        best = rows.groupby(["task", "seed"])["metric"].max().groupby("task").min()
        if best.empty:
            continue
        hits = [score >= ABSOLUTE[str(task)] for task, score in best.items()]
        enough = int(rows.groupby("task")["seed"].nunique().min()) >= verdicts.MIN_SEEDS
        verdict = AGREES if all(hits) and len(hits) == len(ABSOLUTE) and enough else DIFFERS
        told = ", ".join(f"`{task}` {score:.3f}" for task, score in best.items())
        reason = "" if verdict == AGREES else f"{sum(hits)} of {len(ABSOLUTE)} targets"
        seeds = int(rows["seed"].nunique())
        found.append(Reading(name, verdict, told, seeds=seeds, tasks=tuple(map(str, best.index)), reason=reason))
    return found


def _trend(rounds: pd.DataFrame, task: str) -> str:
    """Whether FLUX is still gaining on its weakest task when the runs end."""
    own = rounds[(rounds["method"] == OURS) & (rounds["task"] == task)].dropna(subset=["metric"]).sort_values("round")
    last = own.groupby("seed")["metric"].agg(lambda scores: scores.tail(FINAL_ROUNDS).mean())
    before = own.groupby("seed")["metric"].agg(lambda scores: scores.iloc[-2 * FINAL_ROUNDS : -FINAL_ROUNDS].mean())
    gained = float((last - before).mean())
    return f"least on `{task}`, where FLUX gained {gained:+.3f} over the last {FINAL_ROUNDS} scored rounds"
