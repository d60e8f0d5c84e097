"""Claims on who is sooner: FLUX against each method, on every task and with more participants."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.analysis.claims.base import AGREES, DIFFERS, DIRECTION, Claim, Reading, Tables, clock_of, few, of_model
from fluxlib.analysis.claims.races import OURS, REFERENCE, TARGET_FRACTION, describe, races, speed_ups
from fluxlib.analysis.claims.stored import settings
from fluxlib.analysis.studies import verdicts
from fluxlib.analysis.wording import models_in_order as in_order
from fluxlib.analysis.wording import sentence, shown
from fluxlib.figures import overhead

TUNED = ("learning_rate", "local_steps", "optimizer")
"""Settings that each method has its own of."""
SCALE = (10, 20, 30)
"""Participants in the paper."""


def up_to(claim: Claim, tables: Tables) -> list[Reading]:
    """The paper's "up to": the best task of a model, of those on which FLUX leads in every seed.

    The verdict is that of the rule on this task's speed-ups (:mod:`fluxlib.analysis.studies.verdicts`): ``agrees`` where their
    mean is the paper's or more; a seed in which either never arrives disqualifies a task, one in which both begin at
    the target is no race and does not count. The best of several is a choice made after seeing them: the number of
    tasks is told, and fewer seeds than on another task.
    """
    assert claim.size is not None
    found = []
    for name, rounds, raced in tables.plain(timed=True):
        rows = _against(speed_ups(raced), REFERENCE)
        if rows.empty:
            continue
        rows["every"] = (rows["raced"] > 0) & (rows["num_both"] == rows["raced"]) & (rows["ahead"] == rows["raced"])
        rows["enough"] = rows["raced"] >= verdicts.MIN_SEEDS
        # Enough seeds before a large number: one lucky seed must not stand for a model.
        best = rows.fillna({"speedup": 0.0}).sort_values(["every", "enough", "speedup"]).iloc[-1]
        whole, seeds = bool(best["every"]), int(best["raced"])
        value, low, high = (float(best[end]) if whole else np.nan for end in ("speedup", "low", "high"))
        verdict = verdicts.verdict(value >= claim.size, whole, low > 1, seeds) if whole else DIFFERS
        most = int(rows["raced"].max())
        parts = [few(seeds), f"{seeds} seeds, another task has {most}" if seeds < most else ""]
        parts += [f"no race in {best['trivial']} of {best['seeds']}" if best["trivial"] else ""]
        parts += ["in every seed, but the interval includes 1×" if low <= 1 else ""]
        parts += ["the interval includes less than the paper's"] if verdict == AGREES and low < claim.size else []
        parts += [_why_not_faster(best, tables, rounds)] if verdict != AGREES else []
        found.append(Reading(
            name, verdict, f"{describe(best)} on `{best['task']}`, the best of {len(rows)}", value, low, high,
            seeds=int(best["seeds"]), tasks=tuple(rows["task"]), clock=clock_of(rounds), reached=claim.reached(value),
            reason=sentence(parts),
        ))  # fmt: skip
    return found


def ahead_of(baseline: str) -> Callable[[Claim, Tables], list[Reading]]:
    """A reader for "sooner than ``baseline`` on every task"."""

    def read(claim: Claim, tables: Tables) -> list[Reading]:
        """Every task by the rule of :mod:`fluxlib.analysis.studies.verdicts`; the weakest task decides.

        Where the baseline never arrives, its whole run stands for its time. A race is left open where neither arrives,
        or the baseline's run was over before FLUX arrived: then the claim is agreed with in direction at most, and not
        at all if no more than half of the races are decided. Where both begin at the target there is no race.
        """
        found = []
        for name, rounds, raced in tables.plain(timed=True):
            rows = _against(speed_ups(raced), baseline)
            if not rows.empty:
                found.append(_every_task(claim, name, rows, clock_of(rounds)))
        return found

    return read


def _every_task(claim: Claim, name: str, rows: pd.DataFrame, clock: str) -> Reading:
    ahead, behind = int(rows["ahead"].sum()), int(rows["behind"].sum())
    undecided = int(rows["raced"].sum()) - ahead - behind
    judged = {row["task"]: _task_verdict(row) for row in rows.to_dict("records") if row["ahead"] + row["behind"]}
    verdict = verdicts.weakest(judged.values()) if ahead > undecided and judged else DIFFERS
    none = [f"`{task}`" for task in rows["task"] if task not in judged]
    if verdict == AGREES and (undecided or none):
        verdict = DIRECTION
    told = [f"`{row['task']}` {describe(row)}" for row in rows.to_dict("records")]
    worst = float(rows["at_least"].min(skipna=False)) if not behind else np.nan
    raced = rows[(rows["ahead"] + rows["behind"]) > 0]
    parts = [few(min((number for number in rows["raced"] if number), default=0))]
    parts += [f"sooner in {ahead} of {ahead + behind} races"] if behind else []
    parts += [f"{row['task']}: final score {row['final_ratio']:.0%} of the other's".replace("%", " %")
              for row in raced[(raced["behind"] > 0) & raced["final_ratio"].notna()].to_dict("records")]  # fmt: skip
    unsure = [f"`{task}`" for task, found in judged.items() if found == DIRECTION and _is_unsure(rows, task)]
    parts += [f"in every seed, but the interval includes 1× on {', '.join(unsure)}"] if unsure else []
    parts += [f"no race on {', '.join(none)}"] if none else []
    parts += [f"{undecided} of {ahead + behind + undecided} left open"] if undecided else []
    least = float(raced["at_least"].min(skipna=False)) if len(raced) and not undecided else np.nan
    return Reading(
        name, verdict, "; ".join(told), worst, seeds=int(rows["seeds"].max()), fewest=int(rows["seeds"].min()),
        tasks=tuple(rows["task"]), clock=clock, reached=claim.reached(least), reason=sentence(parts),
    )  # fmt: skip


def _task_verdict(row: Mapping[Any, Any]) -> str:
    """One task of :func:`ahead_of` that has a decided race; open races are no evidence either way."""
    every = row["ahead"] > 0 and row["behind"] == 0
    decided = row["ahead"] + row["behind"] == row["raced"]
    return verdicts.verdict(bool(decided), every, row["at_least_low"] > 1, row["raced"])


def _is_unsure(rows: pd.DataFrame, task: str) -> bool:
    row = rows[rows["task"] == task].iloc[0]
    return bool(row["ahead"] == row["raced"] and row["at_least_low"] <= 1)


def participants(claim: Claim, tables: Tables) -> list[Reading]:
    """Runs that differ in the number of participants alone, each number by the rule; the weakest number decides.

    ``agrees`` needs 10, 20 and 30 participants; with two or more numbers, but not these, it is in direction at most.
    """
    found = []
    for name, rounds in _swept(tables):
        rows = []
        for count, part in rounds.groupby("num_participants"):
            row = _against(speed_ups(races(part.assign(variant=""))), REFERENCE)
            rows += [{"count": int(str(count)), **item} for item in row.to_dict("records")]
        counts = sorted({row["count"] for row in rows})
        if len(counts) < 2:
            continue
        verdict = verdicts.weakest(_task_verdict(row) for row in rows)
        verdict = DIRECTION if verdict == AGREES and not set(SCALE) <= set(counts) else verdict
        seeds = [row["seeds"] for row in rows]
        told = "; ".join(f"{row['count']}: {describe(row)}" for row in rows)
        parts = [few(min(row["raced"] for row in rows)), "not at every number" if verdict == DIFFERS else ""]
        parts += [f"at {', '.join(map(str, counts))} participants" if not set(SCALE) <= set(counts) else ""]
        found.append(Reading(
            name, verdict, told, float(min(row["speedup"] for row in rows)), seeds=max(seeds), fewest=min(seeds),
            tasks=tuple(pd.unique(rounds["task"])), clock=clock_of(rounds), reason=sentence(parts),
        ))  # fmt: skip
    return found


def _swept(tables: Tables) -> Iterator[tuple[str, pd.DataFrame]]:
    """Runs of FLUX and FMD that differ in the number of participants alone, by model: the sweep with most runs.

    Settings that are tuned per method (:data:`TUNED`) may differ between the two, never between one method's runs.
    """
    if tables.rounds is None:
        return
    runs = tables.rounds[tables.rounds["method"].isin([OURS, REFERENCE])]
    fields = {name: (name, "first") for name in ("model", "task", "seed", "method")}
    trained = runs[(runs["round"] > 0) & runs["run_id"].isin(list(tables.parameters))]
    one = trained.groupby("run_id").agg(**fields, count=("num_participants", "max"))
    for column, names in (("tuned", TUNED), ("rest", None)):
        one[column] = [_settings(tables.parameters[str(run)], names) for run in one.index]
    for name in in_order(one["model"]):
        sweeps = [sweep for _, alike in of_model(one, name).groupby("rest") for sweep in _sweeps(alike)]
        if sweeps:
            yield name, runs[runs["run_id"].isin(max(sweeps, key=len)["run_id"])]


def _settings(parameters: Mapping[str, Any], names: Sequence[str] | None) -> str:
    """The named settings as text, or all that must be alike in runs that are compared."""
    free = {"method", "variant", "participants", "seed", *TUNED}
    kept = {k: v for k, v in settings(parameters).items() if (k not in free if names is None else k in names)}
    return json.dumps(kept, sort_keys=True)


def _sweeps(alike: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Every pairing of one setting of FLUX with one of FMD that has two or more numbers of participants in common."""
    parts = {method: [part for _, part in own.groupby("tuned")] for method, own in alike.groupby("method")}
    for ours, theirs in itertools.product(parts.get(OURS, []), parts.get(REFERENCE, [])):
        both = pd.concat([ours, theirs]).reset_index().drop_duplicates(["method", "task", "seed", "count"])
        shared = set(ours["count"]) & set(theirs["count"])
        if len(shared) > 1:
            yield both[both["count"].isin(list(shared))]


def _against(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Rows of one baseline, and how many of their seeds ``raced``: those whose base model is not at the target yet."""
    if table.empty:
        return table
    rows = table[table["baseline"] == baseline].reset_index(drop=True)
    return rows.assign(raced=rows["seeds"] - rows["trivial"])


def _why_not_faster(best: pd.Series, tables: Tables, rounds: pd.DataFrame) -> str:
    """Rounds against seconds per round, where FLUX's seconds go, and whether a variant does better."""
    parts = []
    if best["num_both"]:
        number, seconds = best["rounds_ratio"], best["round_s_ratio"]
        parts.append(f"in {number:.2f} times FMD's rounds, each {seconds:.2f} times shorter")
    elif best["ours_missed"]:
        final = f"{best['final_ratio']:.0%}".replace("%", " %")
        parts.append(f"FLUX ends at {final} of FMD's score, the target is {TARGET_FRACTION:.0%}".replace("%,", " %,"))
    ours = rounds[(rounds["method"] == OURS) & (rounds["task"] == best["task"])]
    if tables.participants is not None and len(ours):
        phases = overhead.breakdown(ours, tables.participants[tables.participants["run_id"].isin(ours["run_id"])])
        share = phases.set_index("phase")["share"]
        parts.append(f"{shown(float(share['download'] + share['upload']), '%')} of FLUX's round is transfer")
    return "; ".join(parts)
