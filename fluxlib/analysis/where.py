"""Where FLUX pays: against the best baseline that fits, by the memory of a device and its link.

Nothing is trained for it. Runs of FLUX and FMES with several budgets are stored; on a device each method enters with
those of them that its memory holds (:func:`fluxlib.devices.memory.share_that_fits`), and the device clock counts their
works there. Everybody takes the fastest of his own runs, FLUX as well as each baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from fluxlib import methods
from fluxlib.analysis.statistics import geometric
from fluxlib.analysis.studies.scale import recounts
from fluxlib.analysis.time_to_target import PAIR, TARGET_FRACTION, times_to_target
from fluxlib.config import Offloading, RunConfig
from fluxlib.devices import catalogue
from fluxlib.devices.memory import share_that_fits

DEVICES = ("rtx-3060", "rtx-4080", "rtx-4090", "jetson-agx-orin-32", "l20", "jetson-agx-orin")
"""Of the catalogue, by memory: 12, 16, 24, 32, 48 and 64 GB."""
SOONER, LATER, NEVER, ABSENT = "", "≥", "≤", "–"
"""What a factor is: known, a lower bound (no baseline arrives), an upper one (FLUX does not), or there is none."""


def budgets(participants: pd.DataFrame, runs: Mapping[str, RunConfig]) -> pd.Series:
    """Experts that a participant has a place for, at most, by ``run_id``: tuned ones, and FLUX's explored ones."""
    explores = participants["run_id"].map(lambda name: methods.get(runs[name].method).explores)
    kept = participants["num_tuned"] + participants["num_explored"].where(explores, 0)
    return kept.groupby(participants["run_id"]).max()


def fits(config: RunConfig, tuned: float, device: catalogue.Device) -> bool:
    """Whether a run that tunes a share ``tuned`` of the experts fits on ``device``, at the clock's shapes.

    FMD and FMQ offload what does not fit; they need what is left to be there.
    """
    try:
        most, _ = share_that_fits(config, int(device.memory_bytes))
    except ValueError:
        return False
    return config.method in ("fmd", "fmq") or tuned <= most


def pays(
    rounds: pd.DataFrame,
    participants: pd.DataFrame,
    runs: Mapping[str, RunConfig],
    devices: Sequence[str] = DEVICES,
    links: Sequence[str] = tuple(catalogue.LINKS),
    fraction: float = TARGET_FRACTION,
    offloading: Offloading | None = None,
) -> pd.DataFrame:
    """FLUX's factor over the best baseline, for every device and link: one row per model, task, seed, device and link.

    Args:
        rounds, participants: tables of runs with one or more budgets per method.
        runs: their configurations, of :func:`fluxlib.analysis.store.configs`.
        fraction: share of FMD's final score that is the target.
        offloading: how experts come to FMD's devices that do not fit; None: as in the run.

    Returns:
        ``factor``, the best baseline's device seconds to the target over FLUX's; ``sign``, what that number is;
        ``baseline``, which one it is; ``flux_run`` and ``baseline_run``, the runs that were the fastest; their times
        ``flux_s`` and ``baseline_s`` (the whole run where the target was not reached).
    """
    tuned = budgets(participants, runs) / rounds.groupby("run_id")["num_experts"].max()
    counted = recounts(participants, rounds, runs, devices, links, offloading)
    fitting = {name: [run for run in tuned.index if fits(runs[run], float(tuned[run]), catalogue.DEVICES[name])]
               for name in devices}  # fmt: skip
    rows = []
    for key, part in counted.groupby(["fleet", "link"], sort=False):
        times = times_to_target(part, fraction)
        entered = times["run_id"].isin(fitting[str(key[0])])
        for pair, found in times[entered].groupby(list(PAIR), sort=False):
            rows.append(dict(zip((*PAIR, "device", "link"), (*pair, *key), strict=True)) | _best(found))
    return pd.DataFrame(rows)


def _best(times: pd.DataFrame) -> dict[str, object]:
    """Of the runs that fit: FLUX's fastest against the fastest of the others."""
    ordered = times.assign(missed=times["device_s_to_target"].isna())
    ordered = ordered.sort_values(["missed", "device_s_at_least"], kind="stable")
    ours, others = (ordered[(ordered["method"] == "flux") == whether] for whether in (True, False))
    if ours.empty or others.empty:
        return {"factor": float("nan"), "sign": ABSENT, "baseline": "" if others.empty else others["method"].iloc[0]}
    flux, other = ours.iloc[0], others.iloc[0]
    signs = {(False, False): SOONER, (False, True): LATER, (True, False): NEVER, (True, True): ABSENT}
    sign = signs[bool(flux["missed"]), bool(other["missed"])]
    factor = other["device_s_at_least"] / flux["device_s_at_least"]
    return {
        "factor": factor if sign != ABSENT else float("nan"),
        "sign": sign,
        "baseline": other["method"],
        "flux_run": flux["run_id"],
        "baseline_run": other["run_id"],
        "flux_s": flux["device_s_at_least"],
        "baseline_s": other["device_s_at_least"],
    }


def over_tasks(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`pays` over tasks and seeds: geometric mean of ``factor`` and its ``sign``, by model, device and link.

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
