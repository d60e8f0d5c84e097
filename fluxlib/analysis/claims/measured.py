"""Claims on profiling, merging and roles, read from the ``measurements`` tables of the study notebooks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from fluxlib.analysis.claims import base
from fluxlib.analysis.claims.base import AGREES, DIFFERS, DIRECTION, Claim, Reading, Tables
from fluxlib.analysis.statistics import geometric, interval
from fluxlib.analysis.studies import verdicts
from fluxlib.analysis.studies.verdicts import CLOCK_LINK, by_layer, by_seed
from fluxlib.analysis.wording import shown, shown_interval
from fluxlib.devices import catalogue

GIB = 2**30
Values = Callable[[pd.DataFrame], pd.Series]
"""A number per seed, by seed."""
CLOCK = f"device clock, real shapes over {CLOCK_LINK}"


def study(
    stem: str,
    values: Values,
    why: Callable[[pd.DataFrame], str] | None = None,
    clock: str = "",
    null: Values | None = None,
) -> Callable[[Claim, Tables], list[Reading]]:
    """A reader of one notebook's table: a number per seed, held against the paper's by :func:`base.read_size`.

    Args:
        values: empty where the table lacks what it needs.
        why: what the table says on the reason.
        null: what each seed has without the thing, see :func:`fluxlib.analysis.studies.verdicts.beside`.
    """

    def read(claim: Claim, tables: Tables) -> list[Reading]:
        found = []
        for model, table in tables.measurements.get(stem, {}).items():
            numbers, known = verdicts.beside(values(table), null(table)) if null else (values(table), None)
            if len(numbers) and np.isfinite(numbers).all():
                reason, without = why(table) if why else "", None if known is None else known.to_numpy()
                found.append(base.read_size(claim, model, numbers.to_numpy(), _tasks(table), reason, clock, without))
        return found

    return read


def of(name: str, setting: str | None = None, **more: float) -> Values:
    """Values of one study and setting."""
    return lambda table: by_seed(table, name, setting, **more)  # type: ignore[arg-type]


def below(name: str, better: str, worse: str) -> Values:
    """How far one setting lies below another, as a share of it."""
    return lambda table: _paired(table, name, better, worse, lambda a, b: 1 - a / b)


def over(name: str, one: str, other: str) -> Values:
    """One setting divided by another."""
    return lambda table: _paired(table, name, one, other, lambda a, b: a / b)


def more(name: str, one: str, other: str) -> Values:
    """One setting minus another."""
    return lambda table: _paired(table, name, one, other, lambda a, b: a - b)


def _paired(table: pd.DataFrame, name: str, one: str, other: str, join: Callable[..., pd.Series]) -> pd.Series:
    return join(*verdicts.paired(table, name, one, other))


def _tasks(table: pd.DataFrame) -> list[str]:
    return [task for task in table["task"].unique() if task]


def unevenness(claim: Claim, tables: Tables) -> list[Reading]:
    """The busiest expert of the first layer, of the last, and the rarest of the first.

    The size is reached where, with every seed, the first layer has an expert above 30 % and one below 5 %, and the
    last layer's busiest has no more than twice an even share. The direction is that the first layer's busiest is busier
    than the last layer's, by the rule of :mod:`fluxlib.analysis.studies.verdicts`.
    """
    found = []
    for model, table in tables.measurements.get("01_profiling", {}).items():
        top, low = (by_layer(table, "activation", reduce) for reduce in ("max", "min"))
        first, last, rarest = top.iloc[:, 0], top.iloc[:, -1], low.iloc[:, 0]
        even = 1 / table["expert"].nunique()
        size = bool((first > 0.30).all() and (rarest < 0.05).all() and (last <= 2 * even).all())
        verdict = verdicts.judge(first / last, 1.0, ratio=True)
        verdict = DIRECTION if verdict == AGREES and not size else verdict
        told = f"{shown(first.mean(), '%')} and {shown(rarest.mean(), '%')}; last layer {shown(last.mean(), '%')}"
        ratio = shown_interval(*geometric(first / last), "x")
        reason = f"busiest expert of the first layer over that of the last: {ratio}; an even share: {shown(even, '%')}"
        found.append(Reading(model, verdict, told, seeds=len(first), tasks=tuple(_tasks(table)), reason=reason))
    return found


def drift(table: pd.DataFrame) -> pd.Series:
    """How far activation has moved by the last round of the study over how far by the first, by seed."""
    first, last = verdicts.ends(table[(table["study"] == "drift") & (table["setting"] == "a quarter tuned")], "drift")
    return last / first


def attended(claim: Claim, tables: Tables) -> list[Reading]:
    """Whether being rare and much attended is a property of an expert, and not the noise of few tokens.

    Rare: below its layer's median activation; attended: above the median attention of the layer's experts that have
    tokens. Some rare experts always are. So those are taken that were rare and attended with every other seed, and rare
    with this one: the value of a seed is by how much more often they are attended again than rare experts on the whole.
    The verdict is that of the rule, 0 being no effect, but in direction at most: each seed is held against all others,
    so the values share their seeds, and an interval that takes them for independent is too narrow. One seed says
    nothing.
    """
    found = []
    for model, table in tables.measurements.get("01_profiling", {}).items():
        marks = _marks(table)
        if marks.empty or marks.index.nlevels < 2 or len(marks.columns.unique("seed")) < 2:
            continue
        rare, both = pd.DataFrame(marks["rare"]), pd.DataFrame(marks["attended"])
        again, usual = [], []
        for seed in rare.columns:
            known = rare.all(axis=1) & both.drop(columns=seed).all(axis=1)
            if known.any():
                again.append(float(both.loc[known, seed].mean()))
                usual.append(float(both.loc[rare[seed], seed].mean()))
        gains = np.array(again) - np.array(usual)
        if not len(gains):
            continue
        verdict = verdicts.judge(gains, 0.0)
        verdict = DIRECTION if verdict == AGREES else verdict
        value, low, high = interval(gains)
        share = both.sum().to_numpy() / marks["below"].to_numpy().sum(axis=0)
        told = f"{shown_interval(*interval(share), '%')}"
        reason = (f"of those that were with the other seeds, {shown(float(np.mean(again)), '%')} are again: "
                  f"{shown_interval(value, low, high, '%')} above the share of rare ones that have tokens; "
                  "each seed is held against the others, not independent: in direction at most")  # fmt: skip
        tasks = tuple(_tasks(table))
        found.append(Reading(model, verdict, told, value, low, high, len(gains), tasks=tasks, reason=reason))
    return found


def _marks(table: pd.DataFrame) -> pd.DataFrame:
    """By seed, one row per task, layer and expert: ``below`` the median activation, ``rare``: that, with tokens, and of
    these ``attended``.
    """
    rows = table[table["study"].isin(["activation", "attention"])]
    keys = ["seed", "task", "layer", "expert"]
    wide = rows.pivot_table(index=keys, columns="study", values="value").reset_index()
    if "attention" not in wide:
        return pd.DataFrame()
    used = wide["activation"] > 0
    wide["attention"] = wide["attention"].where(used)
    medians = wide.groupby(keys[:3])[["activation", "attention"]].transform("median")
    below, much = wide["activation"] < medians["activation"], wide["attention"] > medians["attention"]
    wide = wide.assign(below=below, rare=below & used, attended=below & used & much)
    marks = ["below", "rare", "attended"]
    return wide.pivot_table(index=keys[1:], columns="seed", values=marks).dropna().astype(bool)


def clustering(claim: Claim, tables: Tables) -> list[Reading]:
    """Seconds of clustering layer by layer over those of clustering all layers at once, for each shape of experts.

    Per seed the geometric mean over models, of the seeds that all have.
    """
    found: list[Reading] = []
    for shape in ("32 x 16 experts", "27 x 64 experts"):
        speeds, inertias = [], []
        for table in tables.measurements.get("02_merging", {}).values():
            layer, fused = (f"{shape}, {kind}" for kind in ("per layer", "fused"))
            slow, fast = verdicts.paired(table, "clustering_seconds", layer, fused, "median")
            if len(slow):
                speeds.append(slow / fast)
                inertias.append(over("clustering_inertia", fused, layer)(table))
        speed, inertia = (_over_models(parts) for parts in (speeds, inertias))
        if len(speed):
            why = f"inertia {shown(geometric(inertia)[0])} of the reference's"
            found.append(base.read_size(claim, shape, speed, (), why))
    return found


def _over_models(ratios: list[pd.Series]) -> np.ndarray:
    """Geometric mean over models, one value per seed that all have."""
    if not ratios:
        return np.array([])
    return np.exp(np.log(pd.concat(ratios, axis=1, join="inner")).mean(axis=1)).to_numpy()


def fastest_epsilon(claim: Claim, tables: Tables) -> list[Reading]:
    """Device seconds to the target with each fixed epsilon, over those with the rising one.

    Against each fixed one by the rule of :mod:`fluxlib.analysis.studies.verdicts`, seed by seed; the weakest decides. A run that
    missed the target counts with its whole time.
    """
    found = []
    for model, table in tables.measurements.get("03_role_assignment", {}).items():
        name = "epsilon_device_s_at_least"
        fixed = [s for s in table.loc[table["study"] == name, "setting"].unique() if s != "dynamic"]
        ratios = {s: over(name, s, "dynamic")(table) for s in fixed}
        ratios = {s: values for s, values in ratios.items() if len(values)}
        if not ratios:
            continue
        means = {s: geometric(values) for s, values in ratios.items()}
        verdict = verdicts.weakest(verdicts.judge(values, 1.0, ratio=True) for values in ratios.values())
        worst = min(means, key=lambda s: means[s][0])
        told = "; ".join(f"against {s}: {shown_interval(*mean, 'x')}" for s, mean in means.items())
        rounds = shown(geometric(over("epsilon_round_at_least", worst, "dynamic")(table))[0], "x")
        found.append(Reading(
            model, verdict, told, *means[worst], seeds=len(ratios[worst]), tasks=tuple(_tasks(table)), clock=CLOCK,
            reason=f"in rounds, against {worst}: {rounds}",
        ))  # fmt: skip
    return found


def memory(claim: Claim, tables: Tables) -> list[Reading]:
    """Predicted peak of a training step of each method at the public model's shapes, nothing offloaded.

    ``agrees``: FLUX's fits the paper's 48 GB device and FMD's does not. ``does not``: anything else; that fewer tuned
    experts need less memory cannot come out otherwise, so a smaller step alone is no direction.
    """
    device = catalogue.fleet("l20", 1)[0].memory_bytes
    found = []
    for model, table in tables.measurements.get("07_real_models", {}).items():
        rows = table[table["study"] == "real_peak"].groupby("setting", sort=False)["value"].mean()
        if not {"flux", "fmd"} <= set(rows.index):
            continue
        fits = rows["flux"] <= device < rows["fmd"]
        budget = by_seed(table, "real_fits", "l20, B_tune")
        less = f", FLUX fits with {budget.iloc[0]:.0f} experts tuned" if len(budget) else ""
        told = ", ".join(f"{str(name).upper()} {value / GIB:.0f}" for name, value in rows.items()) + " GiB"
        found.append(Reading(
            model, AGREES if fits else DIFFERS, told, rows["flux"] / rows["fmd"], clock="memory planner, real shapes",
            reason="" if fits else f"with a quarter of the experts tuned; the device has {device / GIB:.0f} GiB{less}",
        ))  # fmt: skip
    return found


def clock_check(table: pd.DataFrame) -> dict[str, float]:
    """Measured over predicted seconds of each block (notebook 06): how far the device clock is from this machine."""
    rows = table[table["study"] == "clock_check"]
    means = rows.groupby("setting", sort=False)["value"].mean()
    blocks = dict.fromkeys(setting.split(", ")[0] for setting in means.index)
    return {block: round(float(means[f"{block}, measured"] / means[f"{block}, predicted"]), 2) for block in blocks}
