"""Where FLUX or FLUX+ pays: against the best baseline that fits, by the memory of a device and its link.

Nothing is trained for it. Runs with several budgets, and with few bits on the link, are stored; on a device each method
enters with those of them that its memory holds (:func:`fluxlib.devices.memory.fits`), and the device clock
counts their works there. Everybody takes the fastest of his own runs. The target is set by the plain run of FMD.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd

from fluxlib import methods
from fluxlib.analysis.statistics import geometric
from fluxlib.analysis.studies.scale import recounts
from fluxlib.analysis.time_to_target import PAIR, TARGET_FRACTION, times_to_target
from fluxlib.config import Offloading, RunConfig
from fluxlib.devices import catalogue
from fluxlib.devices.memory import fits

DEVICES = ("rtx-3060", "rtx-4080", "rtx-4090", "jetson-agx-orin-32", "l20", "jetson-agx-orin")
"""Of the catalogue, by memory: 12, 16, 24, 32, 48 and 64 GB."""
OURS = ("flux", "flux_plus")
"""Neither is a baseline of the other."""
SOONER, LATER, NEVER, ABSENT = "", "≥", "≤", "–"
"""What a factor is: known, a lower bound (no baseline arrives), an upper one (FLUX does not), or there is none."""


def budgets(participants: pd.DataFrame, runs: Mapping[str, RunConfig]) -> pd.Series:
    """Places of tuned experts that a participant has, at most, by ``run_id``; explored ones take some, or a share."""
    place = participants["run_id"].map(lambda name: methods.get(runs[name].method).explored_place)
    kept = participants["num_tuned"] + participants["num_explored"] * place
    return kept.groupby(participants["run_id"]).max()


def races(
    rounds: pd.DataFrame,
    participants: pd.DataFrame,
    runs: Mapping[str, RunConfig],
    devices: Sequence[str] = DEVICES,
    links: Sequence[str] = tuple(catalogue.LINKS),
    fraction: float = TARGET_FRACTION,
    offloading: Offloading | None = None,
) -> pd.DataFrame:
    """Time to the target of every run that fits, for every device and link.

    A task that a model ran with some of the variants only is left out: everybody would race there with those.

    Args:
        rounds, participants, runs: tables of runs with one or more budgets per method, and their configurations.
        fraction: share of FMD's final score that is the target.
        offloading: how experts come to FMD's devices that do not fit; None: as in the run.

    Returns:
        :func:`fluxlib.analysis.time_to_target.times_to_target`, with the ``device``, the ``rank`` of adapters, and the
        ``kind``, method and variant.
    """
    own = rounds.groupby(["model", "task"])["variant"].transform("nunique")
    rounds = rounds[own == rounds.groupby("model")["variant"].transform("nunique")]
    participants = participants[participants["run_id"].isin(rounds["run_id"])]
    tuned = budgets(participants, runs) / rounds.groupby("run_id")["num_experts"].max()
    counted = recounts(participants, rounds, runs, devices, links, offloading)
    kind = counted["method"].where(counted["variant"] == "", counted["method"] + " " + counted["variant"])
    counted = counted.assign(kind=kind).rename(columns={"fleet": "device"})
    if counted.empty:
        return counted.assign(rank=0)
    times = times_to_target(counted, fraction, by="kind", pairs=("device", "link", *PAIR))
    memories = {name: int(catalogue.DEVICES[name].memory_bytes) for name in devices}
    fitting = {(name, run) for (name, memory), run in itertools.product(memories.items(), tuned.index)
               if fits(runs[run], float(tuned[run]), memory)}  # fmt: skip
    kept = times[[place in fitting for place in zip(times["device"], times["run_id"], strict=True)]]
    return kept.assign(rank=[runs[name].adapter.used_rank for name in kept["run_id"]]).reset_index(drop=True)


def with_all_adapters(raced: pd.DataFrame) -> pd.DataFrame:
    """Of :func:`races`, those (task and seed) that every kind of run with adapters took part in; all, if none has any.

    Elsewhere a method, or a budget of it, would not be met for no other reason than that nobody ran it.
    """
    adapted = raced[raced["rank"] > 0]
    kinds = adapted.groupby(list(PAIR))["kind"].nunique()
    if kinds.empty:
        return raced
    pairs = kinds.index[kinds == kinds.groupby("model").transform("max")]
    return raced[pd.MultiIndex.from_frame(raced[list(PAIR)]).isin(pairs)]


def duels(raced: pd.DataFrame, ours: str = "flux") -> pd.DataFrame:
    """Our factor over the best baseline that fits, of :func:`races`: one row per model, task, seed, device and link.

    Returns:
        ``factor``, the best baseline's device seconds to the target over ours; ``sign``, what that number is;
        ``baseline``, which one it is; ``our_run`` and ``baseline_run``, the runs that were the fastest; their times
        ``our_s`` and ``baseline_s`` (the whole run where the target was not reached).
    """
    keys = [*PAIR, "device", "link"]
    ordered = raced.assign(missed=raced["device_s_to_target"].isna())
    ordered = ordered.sort_values(["missed", "device_s_at_least"], kind="stable").set_index(keys)
    places = pd.MultiIndex.from_frame(raced[keys].drop_duplicates())
    sides = ordered["method"] == ours, ~ordered["method"].isin(OURS)
    own, other = (ordered[side].groupby(keys).head(1).reindex(places) for side in sides)
    signs = {(False, False): SOONER, (False, True): LATER, (True, False): NEVER}
    table = pd.DataFrame({
        "factor": other["device_s_at_least"] / own["device_s_at_least"],
        "sign": [signs.get(missed, ABSENT) for missed in zip(own["missed"], other["missed"], strict=True)],
        "baseline": other["method"].fillna(""), "our_run": own["run_id"], "baseline_run": other["run_id"],
        "our_s": own["device_s_at_least"], "baseline_s": other["device_s_at_least"],
    })  # fmt: skip
    table["factor"] = table["factor"].where(table["sign"] != ABSENT)
    fastest = ["our_run", "baseline_run", "our_s", "baseline_s"]  # of two that meet
    table[fastest] = table[fastest].where(table[["our_run", "baseline_run"]].notna().all(axis=1))
    return table.reset_index()


def first(raced: pd.DataFrame) -> pd.DataFrame:
    """Who of :func:`races` is at the target first: one row per model, device and link.

    A method with adapters and the same without are two that race, where :func:`with_all_adapters` says. Who does not
    arrive in every race is not first.

    Returns:
        ``method``, ``rank`` of its adapters, ``seconds`` to the target (mean over races), ``num_races``, and ``lead``,
        the next one's seconds over these (NaN: nobody else arrives). All are NaN where nobody arrives.
    """
    kept, place = with_all_adapters(raced), ["model", "device", "link"]
    num_races = kept.groupby("model")[list(PAIR)].apply(lambda pairs: len(pairs.drop_duplicates()))
    arrived = kept.dropna(subset="device_s_to_target")
    times = arrived.groupby([*PAIR, "device", "link", "method", "rank"], sort=False)["device_s_to_target"].min()
    means = times.groupby([*place, "method", "rank"]).agg(["mean", "size"]).reset_index()
    means = means[means["size"] == means["model"].map(num_races)].sort_values("mean", kind="stable")
    best = means.drop_duplicates(place).set_index(place)
    lead = means[means.duplicated(place)].drop_duplicates(place).set_index(place)["mean"] / best["mean"]
    found = best.rename(columns={"mean": "seconds", "size": "num_races"}).assign(lead=lead)
    return kept[place].drop_duplicates().join(found, on=place).reset_index(drop=True)


def over_tasks(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`duels` over tasks and seeds: geometric mean of ``factor`` and its ``sign``, by model, device and link.

    A mean with a lower bound in it is a lower bound, with an upper one an upper bound; with both, or with a race that
    nobody finished, there is none.
    """
    rows = []
    for (model, device, link), part in table.groupby(["model", "device", "link"], sort=False):
        bounds = set(part["sign"]) - {SOONER}
        sign = SOONER if not bounds else bounds.pop() if len(bounds) == 1 else ABSENT
        most = part["baseline"].mode()
        rows.append({
            "model": model, "device": device, "link": link, "sign": sign, "num_races": len(part),
            "factor": geometric(part["factor"])[0] if sign != ABSENT else float("nan"),
            "baseline": most.iloc[0] if len(most) else "",
        })  # fmt: skip
    return pd.DataFrame(rows)
