"""Claims on profiling, merging and roles, read from the ``measurements`` tables of the study notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from fluxlib.claims import base
from fluxlib.claims.base import AGREES, DIFFERS, DIRECTION, Claim, Reading, Tables
from fluxlib.claims.numbers import geometric, shown, shown_interval
from fluxlib.devices import catalogue
from fluxlib.studies.verdicts import CLOCK_LINK, by_seed

GIB = 2**30
Values = Callable[[pd.DataFrame], np.ndarray]
CLOCK = f"device clock, real shapes over {CLOCK_LINK}"


def study(
    stem: str, values: Values, why: Callable[[pd.DataFrame], str] | None = None, clock: str = ""
) -> Callable[[Claim, Tables], list[Reading]]:
    """A reader of one notebook's table: a number per seed, held against the paper's by :func:`base.read_size`.

    Args:
        values: one number per seed; empty where the table lacks what it needs.
        why: what the table says on the reason, told where the verdict is not ``agrees``.
    """

    def read(claim: Claim, tables: Tables) -> list[Reading]:
        found = []
        for model, table in tables.measurements.get(stem, {}).items():
            numbers = values(table)
            if len(numbers) and np.isfinite(numbers).all():
                reason = why(table) if why else ""
                found.append(base.read_size(claim, model, numbers, _tasks(table), reason, clock))
        return found

    return read


def of(name: str, setting: str | None = None, **more: float) -> Values:
    """Values of one study and setting, one per seed."""
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


def _paired(table: pd.DataFrame, name: str, one: str, other: str, join: Callable[..., np.ndarray]) -> np.ndarray:
    first, second = by_seed(table, name, one), by_seed(table, name, other)
    return join(first, second) if len(first) == len(second) else np.array([])


def _tasks(table: pd.DataFrame) -> list[str]:
    return [task for task in table["task"].unique() if task]


def unevenness(claim: Claim, tables: Tables) -> list[Reading]:
    """The busiest expert of the first layer, of the last, and the rarest of the first.

    ``agrees``: with every seed the first layer has an expert above 30 % and one below 5 %, and its busiest is busier
    than the last layer's. ``agrees in direction``: the last of these alone. ``does not``: anything else.
    """
    found = []
    for model, table in tables.measurements.get("01_profiling", {}).items():
        top = by_seed(table, "activation", reduce="max", by="layer")
        low = by_seed(table, "activation", reduce="min", by="layer")
        first, last = top[:, 0], top[:, -1]
        skewed = bool((first > last).all())
        whole = skewed and bool((first > 0.30).all() and (low[:, 0] < 0.05).all())
        verdict = AGREES if whole else DIRECTION if skewed else DIFFERS
        told = f"{shown(first.mean(), '%')} and {shown(low[:, 0].mean(), '%')}; last layer {shown(last.mean(), '%')}"
        ratio = shown(geometric(first / last)[0], "x")
        reason = "" if whole else f"busiest expert of the first layer over that of the last: {ratio}"
        found.append(Reading(model, verdict, told, seeds=len(first), tasks=tuple(_tasks(table)), reason=reason))
    return found


def drift(table: pd.DataFrame) -> np.ndarray:
    """How far activation has moved by the last round of the study over how far by the first, per seed."""
    rows = table[(table["study"] == "drift") & (table["setting"] == "a quarter tuned")]
    ends = [by_seed(rows, "drift", x=place) for place in (rows["x"].max(), rows["x"].min())]
    return ends[0] / ends[1] if rows["x"].nunique() > 1 else np.array([])


def rare_but_attended(table: pd.DataFrame) -> np.ndarray:
    """Share of the experts rarer than their layer's median that receive more attention than its median, per seed."""
    both = table[table["study"].isin(["activation", "attention"])]
    keys = ["seed", "task", "layer", "expert"]
    wide = both.pivot_table(index=keys, columns="study", values="value").reset_index()
    if "attention" not in wide:
        return np.array([])
    medians = wide.groupby(keys[:3])[["activation", "attention"]].transform("median")
    rare = wide["activation"] < medians["activation"]
    attended = rare & (wide["activation"] > 0) & (wide["attention"] > medians["attention"])
    counts = pd.DataFrame({"seed": wide["seed"], "rare": rare, "attended": attended}).groupby("seed").sum()
    return (counts["attended"] / counts["rare"]).to_numpy(dtype=float)


def best_saving(table: pd.DataFrame) -> np.ndarray:
    """The largest share of a round that a stale profile saves over any number of samples, at the clock's link."""
    rows = table[(table["study"] == "round_saving") & (table["setting"] == CLOCK_LINK)]
    return np.array([rows["value"].max()] if len(rows) else [])


def clustering(claim: Claim, tables: Tables) -> list[Reading]:
    """Seconds of clustering layer by layer over those of clustering all layers at once, for each shape of experts."""
    found: list[Reading] = []
    both = list(tables.measurements.get("02_merging", {}).values())
    for shape in ("32 x 16 experts", "27 x 64 experts"):
        speeds, inertias = [], []
        for table in both:
            kinds = [f"{shape}, {kind}" for kind in ("per layer", "fused")]
            slow, fast = (by_seed(table, "clustering_seconds", kind, "median") for kind in kinds)
            worse, own = (by_seed(table, "clustering_inertia", kind) for kind in kinds)
            if len(slow) and len(slow) == len(fast):
                speeds.append(slow / fast)
                inertias.append(own / worse)
        if speeds:
            why = f"inertia {shown(float(np.mean(inertias)))} of the reference's"
            found.append(base.read_size(claim, shape, np.mean(speeds, axis=0), (), why))
    return found


def fastest_epsilon(claim: Claim, tables: Tables) -> list[Reading]:
    """Device seconds to the target with each fixed epsilon, over those with the rising one.

    ``agrees``: the rising one is sooner than every fixed one with every seed. ``agrees in direction``: sooner than
    every fixed one in the geometric mean over seeds. ``does not``: anything else. A run that missed the target counts
    with its whole time.
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
        whole = all((values > 1).all() for values in ratios.values())
        leads = all(mean[0] > 1 for mean in means.values())
        worst = min(means, key=lambda s: means[s][0])
        told = "; ".join(f"against {s}: {shown_interval(*mean, 'x')}" for s, mean in means.items())
        rounds = shown(geometric(over("epsilon_round_at_least", worst, "dynamic")(table))[0], "x")
        found.append(Reading(
            model, AGREES if whole else DIRECTION if leads else DIFFERS, told, *means[worst],
            seeds=len(ratios[worst]), tasks=tuple(_tasks(table)), clock=CLOCK,
            reason="" if whole else f"in rounds, against {worst}: {rounds}",
        ))  # fmt: skip
    return found


def memory(claim: Claim, tables: Tables) -> list[Reading]:
    """Predicted peak of a training step of each method at the public model's shapes, nothing offloaded.

    ``agrees``: FLUX's fits the paper's 48 GB device and FMD's does not. ``agrees in direction``: FLUX's is the smaller.
    ``does not``: anything else.
    """
    device = catalogue.fleet("l20", 1)[0].memory_bytes
    found = []
    for model, table in tables.measurements.get("07_real_models", {}).items():
        rows = table[table["study"] == "real_peak"].groupby("setting", sort=False)["value"].mean()
        if not {"flux", "fmd"} <= set(rows.index):
            continue
        fits = rows["flux"] <= device < rows["fmd"]
        verdict = AGREES if fits else DIRECTION if rows["flux"] < rows["fmd"] else DIFFERS
        told = ", ".join(f"{str(name).upper()} {value / GIB:.0f}" for name, value in rows.items()) + " GiB"
        found.append(Reading(
            model, verdict, told, rows["flux"] / rows["fmd"], clock="memory planner, real shapes",
            reason="" if fits else f"the device has {device / GIB:.0f} GiB",
        ))  # fmt: skip
    return found


def why_budgets(table: pd.DataFrame) -> str:
    """Where errors are made here, and what budgets from another objective come to."""
    parts = []
    rows = table[table["study"] == "growth"]
    if len(rows):
        last = rows[rows["layer"] == rows["layer"].max()]
        ends = [last[last["x"] == place]["value"].mean() for place in (0, rows["x"].max())]
        part = shown(float(ends[0] / ends[1]), "%")
        parts.append(f"eq. 1 favours early layers; the first layer's error is {part} of the last's here")
    ours = list(_beyond(table))
    return "; ".join([*parts, *ours])


def _beyond(table: pd.DataFrame) -> Iterator[str]:
    joint = [below("error", "joint + squared gate", other)(table) for other in ("single", "uniform")]
    if all(map(len, joint)):
        shares = " / ".join(shown(float(values.mean()), "%") for values in joint)
        yield f"budgets and clusters from one objective (ours): {shares} below one slot / uniform"


def why_weights(table: pd.DataFrame) -> str:
    """How much attention differs between experts beside frequency, and what goes beyond it."""
    spread = {
        name: float(rows.groupby(["seed", "task", "layer"])["value"].agg(lambda v: v.std(ddof=0) / v.mean()).mean())
        for name, rows in table.groupby("study")
        if name in ("activation", "attention")
    }
    parts = []
    if len(spread) == 2:
        told = " and ".join(shown(spread[name], "%") for name in ("attention", "activation"))
        parts.append(f"attention and frequency vary by {told} between the experts of a layer")
    for setting, name in (("aligned", "neurons aligned"), ("weights: squared gate", "squared gate weights")):
        gained = below("error", setting, "weights: frequency")(table)
        if len(gained):
            parts.append(f"{name} (ours): {shown(float(gained.mean()), '%')}")
    return "; ".join(parts)


def why_share(table: pd.DataFrame) -> str:
    """The largest of FLUX's own phases, and the share with more samples a round."""
    rows = table[table["study"] == "phase_device_s"]
    own = {name: rows[(rows["setting"] == f"{CLOCK_LINK}: {name}") & (rows["x"] == 64)]["value"].mean()
           for name in ("merge", "quantize", "profile", "probe")}  # fmt: skip
    parts = []
    if len(rows):
        largest = max(own, key=lambda name: own[name])
        parts.append(f"{largest} is {shown(own[largest] / sum(own.values()), '%')} of it")
    many = by_seed(table, "own_share_device", f"{CLOCK_LINK}, overlapped", x=512)
    if len(many):
        parts.append(f"{shown(float(many.mean()), '%')} with 512 samples a round")
    return "; ".join(parts)


def why_stale(table: pd.DataFrame) -> str:
    """What the stale profile costs where it is used: the merged model."""
    costs = over("stale_merge", "stale", "fresh")(table)
    if not len(costs):
        return ""
    fresh = float(by_seed(table, "profile_age", "fresh, a quarter tuned").mean())
    merged = shown(float(costs.mean()) - 1, "%")
    return f"a fresh profile is {shown(fresh, '%')} off; the model merged by a stale one has {merged} more error"


def why_saving(table: pd.DataFrame) -> str:
    """What can be hidden at most."""
    rows = table[(table["study"] == "round_saving") & (table["setting"] == CLOCK_LINK)]
    best = rows.sort_values("value")["x"].iloc[-1]
    worst = shown(float(rows["value"].min()), "%")
    return f"only the profile can be hidden; best at {best:.0f} samples a round, least {worst}"


def clock_check(table: pd.DataFrame) -> dict[str, float]:
    """Measured over predicted seconds of each block (notebook 06): how far the device clock is from this machine."""
    rows = table[table["study"] == "clock_check"]
    means = rows.groupby("setting", sort=False)["value"].mean()
    blocks = dict.fromkeys(setting.split(", ")[0] for setting in means.index)
    return {block: round(float(means[f"{block}, measured"] / means[f"{block}, predicted"]), 2) for block in blocks}
