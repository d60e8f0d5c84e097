"""Readings from whole runs, the tables ``rounds`` and ``participants``: who is sooner, final quality, overhead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.analysis import store, where
from fluxlib.analysis.claims.judge import (
    AGREES,
    DIFFERS,
    DIRECTION,
    MIN_SEEDS,
    MISSING,
    Claim,
    Reading,
    few,
    judge,
    read_size,
    verdict,
    weakest,
)
from fluxlib.analysis.claims.tables import Tables, of_model
from fluxlib.analysis.runs import EQUAL_SECONDS, OWN_PHASES, WHOLE, breakdown, quality_over_seeds
from fluxlib.analysis.runs import final_quality as beside_reference
from fluxlib.analysis.speedups import OURS, REFERENCE, against_all, describe, speed_ups
from fluxlib.analysis.statistics import geometric
from fluxlib.analysis.wording import (
    clock_shapes,
    methods_in_order,
    models_in_order,
    percent,
    sentence,
    shown,
    shown_interval,
    title,
)

PARTICIPANTS = (10, 20, 30)
"""Numbers of participants in the paper."""


def up_to(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """The paper's "up to": the best task of a model, of those on which FLUX leads in every seed.

    ``agrees`` where this task's mean is the paper's or more. A seed in which either never arrives disqualifies a task,
    one in which both begin at the target does not count. The best of several is a choice made after seeing them: the
    number of tasks is told, and fewer seeds than on another task.
    """
    for name, rounds, rows in _compared(tables, REFERENCE):
        every = (rows["compared"] > 0) & (rows["num_both"] == rows["compared"]) & (rows["ahead"] == rows["compared"])
        # Enough seeds before a large number: one lucky seed must not stand for a model.
        order = rows.assign(every=every, enough=rows["compared"] >= MIN_SEEDS).fillna({"speedup": 0.0})
        best = order.sort_values(["every", "enough", "speedup"]).iloc[-1]
        whole, seeds, most = bool(best["every"]), int(best["compared"]), int(rows["compared"].max())
        value, low, high = (float(best[end]) if whole else np.nan for end in ("speedup", "low", "high"))
        judged = verdict(value >= claim.size, whole, low > 1, seeds) if whole else DIFFERS
        parts = [few(seeds), f"{seeds} seeds, another task has {most}" if seeds < most else ""]
        parts += [f"no race in {best['trivial']} of {best['seeds']}" if best["trivial"] else ""]
        parts += ["in every seed, but the interval includes 1×" if low <= 1 else ""]
        parts += ["the interval includes less than the paper's" if judged == AGREES and low < claim.size else ""]
        parts += [_why_not_faster(best, tables, rounds) if judged != AGREES else ""]
        yield Reading(
            name, judged, f"{describe(best)} on `{best['task']}`, the best of {len(rows)}", value, low, high,
            seeds=int(best["seeds"]), tasks=tuple(rows["task"]), clock=_clock(rounds), reached=claim.reached(value),
            reason=sentence(parts),
        )  # fmt: skip


def _compared(tables: Tables, baseline: str) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Model by model: its name, its plain runs, and FLUX's speed-ups over ``baseline`` in them, one row per task."""
    for name, rounds in tables.runs():
        rows = speed_ups(of_model(tables.times, name))
        if len(rows) and baseline in set(rows["baseline"]):
            yield name, rounds, rows[rows["baseline"] == baseline].reset_index(drop=True)


def _clock(rounds: pd.DataFrame) -> str:
    return f"device clock, {clock_shapes(rounds)}"


def _why_not_faster(best: pd.Series, tables: Tables, rounds: pd.DataFrame) -> str:
    """Rounds against seconds per round, and where FLUX's seconds go."""
    parts = []
    if best["num_both"]:
        number, seconds = best["rounds_ratio"], best["round_s_ratio"]
        parts.append(f"in {number:.2f} times FMD's rounds, each {seconds:.2f} times shorter")
    elif best["ours_missed"]:
        parts.append(f"FLUX ends at {percent(best['final_ratio'])} of FMD's score")
    ours = rounds[(rounds["method"] == OURS) & (rounds["task"] == best["task"])]
    if tables.participants is not None and len(ours):
        phases = breakdown(ours, tables.participants)
        share = phases.set_index("phase")["share"]
        parts.append(f"{shown(float(share['download'] + share['upload']), '%')} of FLUX's round is transfer")
    return sentence(parts)


def ahead_of(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """Sooner than a baseline on every task: every task by the rule; the weakest decides.

    Where the baseline never arrives, its whole run stands for its time. A seed is left open where neither arrives, or
    the baseline's run was over before FLUX arrived: then the claim is agreed with in direction at most, and not at all
    if no more than half of the seeds are decided. Where both begin at the target nothing is compared.
    """
    for name, rounds, rows in _compared(tables, claim.ours["baseline"]):
        decided = rows[rows["ahead"] + rows["behind"] > 0]
        ahead, behind = int(rows["ahead"].sum()), int(rows["behind"].sum())
        still = int(rows["compared"].sum()) - ahead - behind
        judged = {row["task"]: _task_verdict(row) for row in decided.to_dict("records")}
        none = [f"`{task}`" for task in rows["task"] if task not in judged]
        overall = weakest(judged.values()) if ahead > still and judged else DIFFERS
        overall = DIRECTION if overall == AGREES and (still or none) else overall
        wide = decided[(decided["ahead"] == decided["compared"]) & (decided["at_least_low"] <= 1)]["task"]
        unsure = [f"`{task}`" for task in wide if judged[task] == DIRECTION]
        parts = [few(min((number for number in rows["compared"] if number), default=0))]
        parts += [f"sooner in {ahead} of {ahead + behind} seeds and tasks" if behind else ""]
        parts += [f"{row['task']}: final score {percent(row['final_ratio'])} of the other's"
                  for row in decided.to_dict("records") if row["behind"] and row["final_ratio"] > 0]  # fmt: skip
        parts += [f"in every seed, but the interval includes 1× on {', '.join(unsure)}" if unsure else ""]
        parts += [f"nothing to compare on {', '.join(none)}" if none else ""]
        parts += [f"{still} of {ahead + behind + still} left open" if still else ""]
        least = float(decided["at_least"].min(skipna=False)) if len(decided) and not still else np.nan
        yield Reading(
            name, overall, "; ".join(f"`{row['task']}` {describe(row)}" for row in rows.to_dict("records")),
            float(rows["at_least"].min(skipna=False)) if not behind else np.nan, seeds=int(rows["seeds"].max()),
            fewest=int(rows["seeds"].min()), tasks=tuple(rows["task"]), clock=_clock(rounds),
            reached=claim.reached(least), reason=sentence(parts),
        )  # fmt: skip


def _task_verdict(row: Any) -> str:
    """One task, or number of participants, by the rule; seeds that were left open are no evidence either way."""
    decided = row["ahead"] + row["behind"] == row["compared"]
    every = row["ahead"] > 0 and not row["behind"]
    return verdict(decided, every, row["at_least_low"] > 1, row["compared"])


def participants(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """Variants ``participants-<N>``, each number of participants by the rule; the weakest decides.

    ``agrees`` needs 10, 20 and 30 participants; with two or more numbers, but not these, it is in direction at most.
    """
    for name, _ in tables.runs():
        runs = of_model(tables.rounds, name)  # type: ignore[arg-type]
        runs = runs[runs["variant"].str.fullmatch(r"participants-\d+")]
        rows = []
        for count, part in runs.groupby(runs["variant"].str.removeprefix("participants-").astype(int)):
            table = speed_ups(against_all(part.assign(variant="")))
            rows += [{"count": count} | row for row in table.to_dict("records") if row["baseline"] == REFERENCE]
        counts = sorted({row["count"] for row in rows})
        if len(counts) > 1:
            judged, all_three = weakest(map(_task_verdict, rows)), set(PARTICIPANTS) <= set(counts)
            parts = [few(min(row["compared"] for row in rows)), "not at every number" if judged == DIFFERS else ""]
            parts += [f"at {', '.join(map(str, counts))} participants" if not all_three else ""]
            seeds = [row["seeds"] for row in rows]
            yield Reading(
                name, DIRECTION if judged == AGREES and not all_three else judged,
                "; ".join(f"{row['count']}: {describe(row)}" for row in rows),
                float(min(row["speedup"] for row in rows)), seeds=max(seeds), fewest=min(seeds),
                tasks=tuple(runs["task"].unique()), clock=_clock(runs), reason=sentence(parts),
            )  # fmt: skip


def final_quality(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """The score as a share of FMD's, every task by the rule, seed by seed; the weakest task decides.

    No effect would be 0.95 or less, the share that time to accuracy asks for. A comparison at equal seconds that ends
    before nine tenths of FMD's run is told, but is no evidence on final quality: with other tasks beside it the claim
    is agreed with in direction at most, alone it counts as not attempted.
    """
    if tables.rounds is None:
        return
    compared = claim.ours["compared"]
    ours, reference = (tuple(claim.ours.get(*kind)) for kind in (("run", (OURS, "")), ("reference", (REFERENCE, ""))))
    asked = pd.MultiIndex.from_frame(tables.rounds[["method", "variant"]]).isin([ours, reference])
    table = beside_reference(tables.rounds[asked], reference[0])
    for name, rounds in tables.runs(ours[1]):
        rows = of_model(table[(table["method"] == ours[0]) & (table["compared"] == compared)], name)
        rows = rows[rows["task"].str.endswith(claim.ours.get("only", ""))]
        if rows.empty:
            continue
        means = quality_over_seeds(rows).set_index("task")
        told = []
        for task, row in means.iterrows():
            at = f", at {shown(row['of_reference'], '%')} of FMD's run" if row["of_reference"] < WHOLE else ""
            told.append(f"`{task}` {shown_interval(row['ratio'], row['low'], row['high'], claim.unit)}"
                        f" ({row['score']:.3f} against {row['reference_score']:.3f}{at})")  # fmt: skip
        whole = means[means["of_reference"] >= WHOLE]
        early = [f"`{task}`" for task in means.index.difference(whole.index)]
        judged = [judge(rows.loc[rows["task"] == task, "ratio"], claim.size, none=claim.none) for task in whole.index]
        overall = weakest([*judged, *([DIRECTION] if early else [])]) if judged else MISSING
        least = whole.sort_values("ratio").iloc[0] if judged else pd.Series(np.nan, ["ratio", "low", "high"])
        fewest, reached = int(means["seeds"].min()), claim.reached(least["ratio"]) if judged else None
        parts = [few(fewest) if judged else "", f"mean over tasks {shown(means['ratio'].mean(), '%')}"]
        parts += [f"least on `{least.name}`" if overall != AGREES and judged else ""]
        parts += [f"{title(ours[0])}'s run ended too early for a final score on {', '.join(early)}" if early else ""]
        yield Reading(
            name, overall, "; ".join(told), least["ratio"], least["low"], least["high"], int(means["seeds"].max()),
            fewest, tuple(means.index), _clock(rounds) if compared == EQUAL_SECONDS else "",
            None if early and reached else reached, sentence(parts),  # not every task was seen to the end
        )  # fmt: skip


def oscillation(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """How far FMQ's score falls between scored rounds, all falls added up, over the same of FMD.

    Seed by seed, over the tasks and scored rounds that both have; a seed in which FMD never falls has no ratio.
    """
    for name, rounds in tables.runs():
        runs = rounds[rounds["method"].isin(["fmq", REFERENCE])].dropna(subset=["metric"])
        wide = runs.pivot_table(index=["seed", "task", "round"], columns="method", values="metric").dropna()
        if wide.shape[1] < 2 or wide.empty:
            continue
        falls = wide.groupby(["seed", "task"]).diff().clip(upper=0).abs().groupby("seed").sum()
        ratio = (falls["fmq"] / falls[REFERENCE].replace(0, np.nan)).dropna()
        if len(ratio):
            still = len(falls) - len(ratio)
            why = f"FMD never falls in {still} of {len(falls)} seeds, left out" if still else ""
            yield read_size(claim, name, ratio, wide.index.unique("task"), why)


def own_share(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """FLUX's own phases (merge, quantize, profile, probe) as a share of a round on the device clock, in its own runs.

    A profile that runs beside the upload counts as well, although nobody waits for it.
    """
    method, variant = claim.ours.get("run", (OURS, ""))
    for name, rounds in tables.runs(variant):
        ours = rounds[(rounds["method"] == method) & (rounds["round"] > 0)]
        if ours.empty or tables.participants is None:
            continue
        by_seed = [breakdown(runs, tables.participants).assign(seed=seed) for seed, runs in ours.groupby("seed")]
        phases = pd.concat(by_seed)
        table = phases[phases["phase"].isin(OWN_PHASES)].pivot_table(index="phase", columns="seed", values="share")
        means = table.mean(axis=1)
        why = f"of it {means.idxmax()} {shown(float(means.max()), '%')}"
        yield replace(read_size(claim, name, table.sum(), ours["task"].unique(), why), clock=_clock(ours))


def absolute_targets(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """The paper's own targets, on its own data sets only.

    ``agrees``: FLUX's score reaches every target with every seed, of at least
    :data:`~fluxlib.analysis.claims.judge.MIN_SEEDS`. ``does not``: anything else.
    """
    targets = claim.ours["targets"]
    for name, rounds in tables.runs():
        rows = rounds[(rounds["method"] == OURS) & rounds["task"].isin(targets)]
        best = rows.groupby(["task", "seed"])["metric"].max().groupby("task").min()
        if len(best):
            hits = [score >= targets[task] for task, score in best.items()]
            enough = int(rows.groupby("task")["seed"].nunique().min()) >= MIN_SEEDS
            agrees = all(hits) and len(hits) == len(targets) and enough
            yield Reading(
                name, AGREES if agrees else DIFFERS, ", ".join(f"`{task}` {score:.3f}" for task, score in best.items()),
                seeds=int(rows["seed"].nunique()), tasks=tuple(best.index),
                reason="" if agrees else f"{sum(hits)} of {len(targets)} targets",
            )  # fmt: skip


def plus_sooner(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """FLUX+ against the best baseline that fits an L20 at 1 Gb/s, every task by the rule; the weakest decides.

    FMD's plain run sets the target. Everybody takes the fastest of his runs (:mod:`fluxlib.analysis.where`).
    """
    if tables.rounds is None or tables.participants is None or tables.folder is None:
        return
    every = tables.rounds
    rounds = every[every["variant"].isin(claim.ours["variants"])]
    configs = store.configs(tables.folder, rounds["run_id"].unique())
    replies = tables.participants[tables.participants["run_id"].isin(list(configs))]
    raced = where.races(rounds, replies, configs, ("l20",), ("1gbps",))
    adapters = claim.ours.get("adapters", False)
    raced = where.with_all_adapters(raced).query("rank > 0") if adapters else raced[raced["rank"] == 0]
    duels = where.duels(raced, "flux_plus")
    if "our_run" not in duels:
        return
    duels = duels.dropna(subset="our_run")
    for name in models_in_order(duels["model"]):
        own = of_model(duels, name)
        judged, told, means = {}, [], {}
        for task in map(str, own["task"].unique()):
            rows = own[own["task"] == task]
            known = bool(rows["sign"].isin([where.SOONER, where.LATER]).all())
            judged[task] = judge(rows["factor"], claim.size, none=1.0, ratio=True) if known else DIFFERS
            means[task] = geometric(rows["factor"]) if known else (np.nan, np.nan, np.nan)
            others = " and ".join(map(title, methods_in_order(set(rows["baseline"]))))
            told.append(f"`{task}` {shown_interval(*means[task], 'x')}, against {others}")
        seeds = own.groupby("task")["seed"].nunique()
        least = min(means, key=lambda task: (means[task][0] == means[task][0], means[task][0]))
        yield Reading(
            name, weakest(judged.values()), "; ".join(told), *means[least], int(seeds.max()), int(seeds.min()),
            tuple(means), _clock(of_model(every, name)), claim.reached(means[least][0]),
            sentence([few(int(seeds.min())), f"least on `{least}`" if len(means) > 1 else ""]),
        )  # fmt: skip
