"""Readings from the ``measurements`` tables of the study notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.analysis.claims.judge import AGREES, DIFFERS, DIRECTION, Claim, Reading, judge, read_size, weakest
from fluxlib.analysis.claims.tables import Tables, tasks_of, values
from fluxlib.analysis.statistics import geometric, interval
from fluxlib.analysis.studies.scale import race_summary
from fluxlib.analysis.wording import sentence, shown, shown_interval, title
from fluxlib.devices import catalogue

GIB = 2**30


def study(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """A number per seed of one study, held against the claim's size."""
    for model, table in tables.measurements.get(claim.notebook, {}).items():
        numbers, none = values(table, claim.ours), None
        known = values(table, claim.without) if claim.without else pd.Series(dtype=float)
        if len(known):
            both = numbers.index.intersection(known.index)
            numbers, none = numbers.loc[both], known.loc[both].to_numpy()
        if len(numbers) and np.isfinite(numbers).all():
            beside = sentence(_told(claim, table, text, spec) for text, spec in claim.beside.items())
            yield read_size(claim, model, numbers, tasks_of(table), beside, none)


def _told(claim: Claim, table: pd.DataFrame, text: str, spec: Mapping[str, Any]) -> str:
    """One thing beside a verdict; nothing where the table lacks it."""
    found = values(table, spec)
    mean = geometric(found)[0] if "over" in spec else float(found.mean())
    return f"{text}: {shown(mean, claim.unit)}" if len(found) else ""


def unevenness(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """The busiest expert of the first layer, of the last, and the rarest of the first.

    The size is reached where, with every seed, the first layer has an expert above 30 % and one below 5 %, and the
    last layer's busiest has no more than twice an even share. The direction is that the first layer's busiest is busier
    than the last layer's.
    """
    for model, table in tables.measurements.get(claim.notebook, {}).items():
        per_task = table[table["study"] == "activation"].groupby(["layer", "seed", "task"])["value"].agg(["max", "min"])
        by_layer = per_task.groupby(["layer", "seed"]).mean()
        layers = by_layer.index.unique("layer")
        rarest, first, last = by_layer["min"][layers[0]], by_layer["max"][layers[0]], by_layer["max"][layers[-1]]
        even = 1 / table["expert"].nunique()
        size = bool((first > 0.30).all() and (rarest < 0.05).all() and (last <= 2 * even).all())
        verdict = judge(first / last, 1.0, ratio=True)
        told = f"{shown(first.mean(), '%')} and {shown(rarest.mean(), '%')}; last layer {shown(last.mean(), '%')}"
        ratio = shown_interval(*geometric(first / last), "x")
        yield Reading(
            model, DIRECTION if verdict == AGREES and not size else verdict, told, seeds=len(first),
            tasks=tasks_of(table), reason=f"first layer's busiest over last layer's: {ratio}; an even share: "
            f"{shown(even, '%')}",
        )  # fmt: skip


def attended(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """Whether being rare and much attended is a property of an expert, and not the noise of few tokens.

    Rare: below its layer's median activation; attended: above the median attention of the layer's experts that have
    tokens. Some rare experts always are. So those are taken that were rare and attended with every other seed, and rare
    with this one: the value of a seed is by how much more often they are attended again than rare experts on the whole.
    In direction at most: each seed is held against all others, so an interval that takes the values for independent is
    too narrow.
    """
    for model, table in tables.measurements.get(claim.notebook, {}).items():
        below, rare, both = _marks(table)
        again, usual = [], []
        for seed in rare.columns if len(rare.columns) > 1 else ():
            known = rare.all(axis=1) & both.drop(columns=seed).all(axis=1)
            if known.any():
                again.append(float(both.loc[known, seed].mean()))
                usual.append(float(both.loc[rare[seed], seed].mean()))
        if again:
            gains = np.array(again) - np.array(usual)
            verdict, gained = judge(gains, 0.0), interval(gains)
            share = interval(both.sum() / below.sum())
            yield Reading(
                model, DIRECTION if verdict == AGREES else verdict, shown_interval(*share, "%"), *gained, len(gains),
                tasks=tasks_of(table),
                reason=f"of those that were with the other seeds, {shown(float(np.mean(again)), '%')} are again: "
                f"{shown_interval(*gained, '%')} above the share of rare ones that have tokens; seeds are held against "
                "each other, not independent: in direction at most",
            )  # fmt: skip


def _marks(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """bool, a row per task, layer and expert, a column per seed: below the median activation; that, and with tokens;
    of these much attended."""
    rows, layer = table[table["study"].isin(["activation", "attention"])], ["seed", "task", "layer"]
    wide = rows.pivot_table(index=[*layer, "expert"], columns="study", values="value")
    wide = wide.reindex(columns=["activation", "attention"])
    used = wide["activation"] > 0
    wide["attention"] = wide["attention"].where(used)
    medians = wide.groupby(layer).transform("median")
    below, high = wide["activation"] < medians["activation"], wide["attention"] > medians["attention"]
    marks = pd.DataFrame({"below": below, "rare": below & used, "both": below & used & high})
    by_seed: Any = marks.unstack("seed").dropna().astype(bool)
    return by_seed["below"], by_seed["rare"], by_seed["both"]


def clustering(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """Seconds of clustering layer by layer over those of clustering all layers at once, for each shape of experts.

    Per seed the geometric mean over models, of the seeds that all have.
    """
    for shape in ("32 x 16 experts", "27 x 64 experts"):
        layer, fused = (f"{shape}, {kind}" for kind in ("per layer", "fused"))
        speeds = {"study": "clustering_seconds", "setting": layer, "over": fused, "reduce": "median"}
        inertias = {"study": "clustering_inertia", "setting": fused, "over": layer}
        every = tables.measurements.get(claim.notebook, {}).values()
        speed, inertia = (_over_models([values(table, spec) for table in every]) for spec in (speeds, inertias))
        if len(speed):
            why = f"inertia {shown(geometric(inertia)[0])} of the reference's"
            yield read_size(claim, shape, speed, (), why)


def _over_models(ratios: list[pd.Series]) -> np.ndarray:
    """Geometric mean over the models that have any, one value per seed that all have."""
    ratios = [ratio for ratio in ratios if len(ratio)]
    return np.exp(np.log(pd.concat(ratios, axis=1, join="inner")).mean(axis=1)).to_numpy() if ratios else np.array([])


def soonest(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """Device seconds to the target in each other setting of a group of runs, over those in the group's first one.

    Against each by the rule, seed by seed; the weakest decides. A run that missed the target counts with its whole
    time.
    """
    group = claim.ours["group"]
    for model, table in tables.measurements.get(claim.notebook, {}).items():
        times = table.loc[table["study"] == f"{group}_device_s_at_least", "setting"].unique()
        first = times[0] if len(times) else ""
        spec = {"study": f"{group}_device_s_at_least", "over": first}
        ratios = {other: values(table, spec | {"setting": other}) for other in times[1:]}
        ratios = {other: ratio for other, ratio in ratios.items() if len(ratio)}
        if ratios:
            means = {other: geometric(ratio) for other, ratio in ratios.items()}
            worst = min(means, key=lambda other: means[other][0])
            rounds = values(table, {"study": f"{group}_round_at_least", "setting": worst, "over": first})
            yield Reading(
                model, weakest(judge(ratio, 1.0, ratio=True) for ratio in ratios.values()),
                "; ".join(f"against {other}: {shown_interval(*mean, 'x')}" for other, mean in means.items()),
                *means[worst], seeds=len(ratios[worst]), tasks=tasks_of(table), clock=claim.clock,
                reason=f"in rounds, against {worst}: {shown(geometric(rounds)[0], 'x')}",
            )  # fmt: skip


def memory(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """Predicted peak of a training step of each method at the public model's shapes, nothing offloaded.

    ``agrees``: FLUX's fits the paper's 48 GB device and FMD's does not. ``does not``: anything else; that fewer tuned
    experts need less memory cannot come out otherwise, so a smaller step alone is no direction.
    """
    device = catalogue.fleet("l20", 1)[0].memory_bytes
    for model, table in tables.measurements.get(claim.notebook, {}).items():
        peaks = table[table["study"] == "real_peak"].groupby("setting", sort=False)["value"].mean()
        if {"flux", "fmd"} <= set(peaks.index):
            fits = peaks["flux"] <= device < peaks["fmd"]
            budget = values(table, {"study": "real_fits", "setting": "l20, B_tune"})
            less = f", FLUX fits with {budget.iloc[0]:.0f} experts tuned" if len(budget) else ""
            told = ", ".join(f"{str(name).upper()} {value / GIB:.0f}" for name, value in peaks.items()) + " GiB"
            why = f"with a quarter of the experts tuned; the device has {device / GIB:.0f} GiB{less}"
            yield Reading(
                model, AGREES if fits else DIFFERS, told, peaks["flux"] / peaks["fmd"],
                clock="memory planner, real shapes", reason="" if fits else why,
            )  # fmt: skip


def rivals(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """Others' divergence over FLUX+'s, of the one that is lowest over all seeds and tasks: chosen after seeing them."""
    for model, table in tables.measurements.get(claim.notebook, {}).items():
        rows = table[table["study"] == claim.ours["study"]]
        cells = np.log(rows.pivot_table(index=["seed", "task"], columns="setting", values="value"))
        over = cells[claim.ours["others"]].sub(cells["FLUX+"], axis=0).groupby("seed").mean()
        best = str(over.mean().idxmin())
        yield read_size(claim, model, np.exp(over[best]), tasks_of(rows), f"the best: {best}")


def clock_error(claim: Claim, tables: Tables) -> Iterator[Reading]:
    """How far the device clock's seconds are off, for the method and link where they are furthest; one run each."""
    for model, table in tables.measurements.get(claim.notebook, {}).items():
        found = race_summary(table)
        worst = found.sort_values("clock_error").iloc[-1]
        usual = shown(found["clock_error"].median(), "%")
        why = f"{title(str(worst['method']))}, {worst['link']}; median over methods and links {usual}"
        yield read_size(claim, model, [float(worst["clock_error"])], tasks_of(table), why)
