"""Claims on whole federated runs, read from the tables ``rounds`` and ``participants``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from fluxlib.claims import base
from fluxlib.claims.base import AGREES, DIFFERS, DIRECTION, Claim, Reading, Tables, clock_of, of_model
from fluxlib.claims.numbers import in_order, shown, shown_interval
from fluxlib.claims.races import OURS, REFERENCE, TARGET_FRACTION, describe, races, speed_ups
from fluxlib.figures import overhead
from fluxlib.figures.canvas import interval
from fluxlib.figures.times import FINAL_ROUNDS

OWN_PHASES = ("merge", "quantize", "profile", "probe")
SCALE = (10, 20, 30)
"""Participants in the paper."""
ABSOLUTE = {"dolly": 0.50, "gsm8k": 0.62, "mmlu": 0.75, "piqa": 0.80}
"""The paper's targets on its own data."""


def up_to(claim: Claim, tables: Tables) -> list[Reading]:
    """The paper's "up to": the best task of a model.

    ``agrees``: on some task FLUX reaches the target with every seed and its mean speed-up over FMD is the paper's or
    more. ``agrees in direction``: on some task it is sooner than FMD with every seed. ``does not``: on none.
    """
    assert claim.size is not None
    found = []
    for name, rounds, raced in tables.plain(timed=True):
        rows = _against(speed_ups(raced), REFERENCE)
        if rows.empty:
            continue
        whole = rows[(rows["num_both"] == rows["seeds"]) & (rows["ahead"] == rows["seeds"])]
        best = (whole if len(whole) else rows).fillna({"speedup": 0.0}).sort_values("speedup").iloc[-1]
        value = float(best["speedup"]) if len(whole) else np.nan
        verdict = DIFFERS if not len(whole) else AGREES if value >= claim.size else DIRECTION
        low, high = (float(best[end]) if len(whole) else np.nan for end in ("low", "high"))
        unsure = "the interval includes less than the paper's" if low < claim.size else ""
        why = unsure if verdict == AGREES else _why_not_faster(best, tables, rounds)
        found.append(Reading(
            name, verdict, f"{describe(best)} on `{best['task']}`", value, low, high,
            seeds=int(best["seeds"]), tasks=tuple(rows["task"]), clock=clock_of(rounds),
            reached=claim.reached(value), reason=why,
        ))  # fmt: skip
    return found


def ahead_of(baseline: str) -> Callable[[Claim, Tables], list[Reading]]:
    """A reader for "sooner than ``baseline`` on every task"."""

    def read(claim: Claim, tables: Tables) -> list[Reading]:
        """Every task of a model; a task where neither method reaches the target, or both begin there, says nothing.

        ``agrees``: FLUX is sooner with every seed of every task (or the baseline never arrives), and none is left open:
        neither arrives, or the baseline's run was over before FLUX arrived. ``agrees in direction``: it is sooner with
        more than half of the seeds and tasks that are decided. ``does not``: anything else.
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
    undecided = int((rows["seeds"] - rows["trivial"]).sum()) - ahead - behind
    verdict = AGREES if ahead and not behind + undecided else DIRECTION if ahead > behind else DIFFERS
    told = [f"`{row['task']}` {describe(row)}" for row in rows.to_dict("records")]
    worst = float(rows["at_least"].min(skipna=False)) if not behind else np.nan
    raced = rows[(rows["ahead"] + rows["behind"]) > 0]
    lost = raced[raced["behind"] > 0]
    parts = [f"sooner in {ahead} of {ahead + behind} races"] if behind else []
    parts += [f"{row['task']}: final score {row['final_ratio']:.0%} of the other's".replace("%", " %")
              for row in lost.to_dict("records")]  # fmt: skip
    none = [f"`{row['task']}`" for row in rows.to_dict("records") if not row["ahead"] + row["behind"]]
    parts += [f"no race on {', '.join(none)}"] if none else []
    parts += [f"{undecided} of {ahead + behind + undecided} left open"] if undecided else []
    least = float(raced["at_least"].min(skipna=False)) if len(raced) and not undecided else np.nan
    reached = None if claim.reach is None else least > claim.reach
    return Reading(
        name, verdict, "; ".join(told), worst, seeds=int(rows["seeds"].max()), tasks=tuple(rows["task"]), clock=clock,
        reached=reached, reason="; ".join(parts),
    )  # fmt: skip


def final_quality(only: str = "") -> Callable[[Claim, Tables], list[Reading]]:
    """A reader for the final score as a share of FMD's, of tasks whose name ends with ``only``."""

    def read(claim: Claim, tables: Tables) -> list[Reading]:
        """Final score (mean of the last three scored rounds) over FMD's with the same seed; the mean over tasks.

        ``agrees``: the mean over seeds is the paper's ratio or more. ``agrees in direction``: it is 0.95 or more, the
        share that time to accuracy asks for. ``does not``: less.
        """
        assert claim.size is not None
        found = []
        for name, rounds, raced in tables.plain():
            times = raced[raced["task"].str.endswith(only)]
            if times.empty:
                continue
            finals = times.set_index(["task", "seed", "method"])["final_metric"].unstack("method")
            ratios = finals[OURS] / finals[REFERENCE]
            value, low, high = interval(ratios.groupby("seed").mean().to_numpy())
            verdict = AGREES if value >= claim.size else DIRECTION if value >= TARGET_FRACTION else DIFFERS
            means = finals.groupby("task").mean()
            scores = {str(task): (float(row[OURS]), float(row[REFERENCE])) for task, row in means.iterrows()}
            told = ", ".join(f"`{task}` {ours:.3f} against {other:.3f}" for task, (ours, other) in scores.items())
            found.append(Reading(
                name, verdict, f"{shown_interval(value, low, high, claim.unit)}: {told}", value, low, high,
                int(ratios.index.get_level_values("seed").nunique()), tuple(scores), "", claim.reached(value),
                "" if verdict == AGREES else _trend(rounds, scores),
            ))  # fmt: skip
        return found

    return read


def participants(claim: Claim, tables: Tables) -> list[Reading]:
    """Runs that differ in the number of participants alone.

    ``agrees``: FLUX is sooner than FMD with every seed at 10, 20 and 30 participants. ``agrees in direction``: it is at
    every number there is, two at least. ``does not``: anything else.
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
        sooner = all(row["behind"] == 0 and row["ahead"] > 0 for row in rows)
        verdict = DIFFERS if not sooner else AGREES if set(SCALE) <= set(counts) else DIRECTION
        told = "; ".join(f"{row['count']}: {describe(row)}" for row in rows)
        why = f"at {', '.join(map(str, counts))} participants" if sooner else "not at every number"
        why = "" if verdict == AGREES else why
        found.append(Reading(
            name, verdict, told, float(min(row["speedup"] for row in rows)), seeds=max(row["seeds"] for row in rows),
            tasks=tuple(pd.unique(rounds["task"])), clock=clock_of(rounds), reason=why,
        ))  # fmt: skip
    return found


def _swept(tables: Tables) -> Iterator[tuple[str, pd.DataFrame]]:
    """Runs of FLUX and FMD whose parameters differ from another's in the number of participants alone, by model."""
    if tables.rounds is None:
        return
    free = {"method", "variant", "participants", "seed", "learning_rate", "local_steps", "optimizer"}
    runs = tables.rounds[tables.rounds["method"].isin([OURS, REFERENCE])]
    one = (
        runs[runs["round"] > 0]
        .groupby("run_id")
        .agg(
            model=("model", "first"),
            task=("task", "first"),
            seed=("seed", "first"),
            method=("method", "first"),
            count=("num_participants", "max"),
        )
    )
    one["rest"] = [
        json.dumps({k: v for k, v in tables.parameters.get(str(run), {}).items() if k not in free}, sort_keys=True)
        for run in one.index
    ]
    for name in in_order(one["model"]):
        for _, alike in of_model(one, name).groupby("rest"):
            per_method = alike.groupby("method")["count"].nunique()
            if len(per_method) == 2 and per_method.min() > 1:
                once = alike.reset_index().drop_duplicates(["method", "task", "seed", "count"])
                yield name, runs[runs["run_id"].isin(once["run_id"])]
                break


def oscillation(claim: Claim, tables: Tables) -> list[Reading]:
    """How far FMQ's score falls between scored rounds, all falls added up, over the same of FMD."""
    found = []
    for name, rounds, _ in tables.plain():
        falls = {method: _falls(rounds[rounds["method"] == method]) for method in ("fmq", REFERENCE)}
        if not all(map(len, falls.values())):
            continue
        ratio = (falls["fmq"] / falls[REFERENCE].replace(0, np.nan)).dropna()
        if len(ratio):
            tasks = tuple(pd.unique(rounds["task"]))
            found.append(base.read_size(claim, name, ratio.to_numpy(dtype=float), tasks))
    return found


def _falls(runs: pd.DataFrame) -> pd.Series:
    """Mean over tasks of the sum of all falls of the score, by seed."""
    scored = runs.dropna(subset=["metric"]).sort_values("round")
    falls = scored.groupby(["seed", "task"])["metric"].agg(lambda scores: float(-scores.diff().clip(upper=0).sum()))
    return falls.groupby("seed").mean()


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

    ``agrees``: FLUX's score reaches every target with every seed. ``agrees in direction``: some. ``does not``: none.
    """
    found = []
    for name, rounds, _ in tables.plain():
        rows = rounds[(rounds["method"] == OURS) & rounds["task"].isin(ABSOLUTE)]
        best = rows.groupby(["task", "seed"])["metric"].max().groupby("task").min()
        if best.empty:
            continue
        hits = [score >= ABSOLUTE[str(task)] for task, score in best.items()]
        verdict = AGREES if all(hits) and len(hits) == len(ABSOLUTE) else DIRECTION if any(hits) else DIFFERS
        told = ", ".join(f"`{task}` {score:.3f}" for task, score in best.items())
        reason = "" if verdict == AGREES else f"{sum(hits)} of {len(ABSOLUTE)} targets"
        seeds = int(rows["seed"].nunique())
        found.append(Reading(name, verdict, told, seeds=seeds, tasks=tuple(map(str, best.index)), reason=reason))
    return found


def _against(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    return table if table.empty else table[table["baseline"] == baseline].reset_index(drop=True)


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


def _trend(rounds: pd.DataFrame, scores: dict[str, tuple[float, float]]) -> str:
    """Where the difference is largest, and whether FLUX is still gaining when the runs end."""
    task = min(scores, key=lambda name: scores[name][0] / scores[name][1])
    own = rounds[(rounds["method"] == OURS) & (rounds["task"] == task)].dropna(subset=["metric"]).sort_values("round")
    last = own.groupby("seed")["metric"].agg(lambda scores: scores.tail(FINAL_ROUNDS).mean())
    before = own.groupby("seed")["metric"].agg(lambda scores: scores.iloc[-2 * FINAL_ROUNDS : -FINAL_ROUNDS].mean())
    gained = float((last - before).mean())
    return f"least on `{task}`, where FLUX gained {gained:+.3f} over the last {FINAL_ROUNDS} scored rounds"
