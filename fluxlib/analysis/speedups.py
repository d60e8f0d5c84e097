"""FLUX's speed-up over each method: time to target seed by seed, then over seeds, with misses counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fluxlib import records
from fluxlib.analysis import store
from fluxlib.analysis.statistics import geometric
from fluxlib.analysis.time_to_target import PAIR, TARGET_FRACTION, times_to_target, without_reference
from fluxlib.analysis.wording import in_order, markdown_table, methods_in_order, shown_interval, title
from fluxlib.io import ConfigError

OURS, REFERENCE = "flux", "fmd"


def raced(folder: Path, reference: str = REFERENCE) -> tuple[pd.DataFrame, dict[str, str]]:
    """The ``rounds`` of all plain runs in ``folder`` that can be compared; and why others cannot, by run id.

    ConfigError: none is finished.
    """
    every, left_out = store.finished(folder, "rounds"), records.unfinished(folder)
    if every is None:
        raise ConfigError(f"{folder} holds no finished run; `make smoke` or `make reproduce` makes some")
    plain = every[every["variant"] == ""]
    alone = without_reference(plain, reference)
    left_out |= dict.fromkeys(alone, f"{reference} was not run on its model and task with its seed")
    return plain[~plain["run_id"].isin(alone)], left_out


def against_all(rounds: pd.DataFrame, fraction: float = TARGET_FRACTION, **target: Any) -> pd.DataFrame:
    """Time to target of the plain runs, wherever FLUX and FMD have one: one row per model, task, seed and method.

    Other arguments are those of :func:`fluxlib.analysis.time_to_target.times_to_target`.
    """
    plain = rounds[rounds["variant"] == ""]
    both = plain.groupby(list(PAIR))["method"].transform(lambda methods: {OURS, REFERENCE} <= set(methods))
    raced = plain[both.astype(bool)]
    return times_to_target(raced, fraction, REFERENCE, **target) if len(raced) else raced


def speed_ups(times: pd.DataFrame) -> pd.DataFrame:
    """FLUX against each method, from :func:`against_all`: one row per model, task and ``baseline``, over seeds.

    Returns:
        ``speedup``, the geometric mean of the baseline's device seconds over FLUX's in the ``num_both`` seeds where
        both reach the target, ``low`` and ``high`` its interval. A miss is censored, not dropped: ``ours_missed`` and
        ``baseline_missed`` count seeds, and ``at_least`` is the geometric mean over all seeds with the baseline's whole
        run in the place of a time it never had (NaN if FLUX missed one), ``at_least_low`` its interval's lower end.
        ``trivial`` counts seeds whose base model is at the target already: they say nothing, are in none of the others,
        and not in ``compared``. ``ahead`` counts seeds in which FLUX is sooner, ``behind`` those in which it is not;
        the rest is open: neither reaches the target, or the other's run ended before FLUX reached it. ``rounds_ratio``
        is FLUX's rounds to the target over the baseline's, ``round_s_ratio`` the baseline's seconds of a round over
        FLUX's; ``final_ratio`` leaves out seeds in which the baseline ends at 0.
    """
    rows, place = [], ["model", "task"]
    for key, group in times.sort_values(place, key=in_order, kind="stable").groupby(place, sort=False):
        ours = group[group["method"] == OURS].set_index("seed")
        for baseline in methods_in_order(set(group["method"]) - {OURS}):
            other = group[group["method"] == baseline].set_index("seed")
            seeds = ours.index[ours.index.isin(other.index)]
            row = _against(ours.loc[seeds], other.loc[seeds])
            rows.append(dict(zip(place, key, strict=True)) | {"baseline": baseline} | row)
    return pd.DataFrame(rows)


def _against(ours: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    mine, theirs = (table["device_s_to_target"].to_numpy(dtype=float) for table in (ours, other))
    end = other["end_s"].to_numpy(dtype=float)
    raced = (mine != 0) & (theirs != 0)
    reached, they = ~np.isnan(mine) & raced, ~np.isnan(theirs) & raced
    both = reached & they
    ratios = theirs[both] / mine[both]
    bounds = np.where(they, theirs, end)[reached] / mine[reached]
    ahead = int((ratios > 1).sum() + (reached & ~they & (mine <= end)).sum())
    known = geometric(bounds) if reached[raced].all() and raced.any() else (np.nan, np.nan, np.nan)
    speedup, low, high = geometric(ratios)
    finals = ours["final_metric"] / other["final_metric"].replace(0.0, np.nan)
    rounds = (ours["round_to_target"] / other["round_to_target"]).to_numpy(dtype=float)
    return {
        "seeds": len(ours), "compared": int(raced.sum()), "trivial": int((~raced).sum()), "num_both": int(both.sum()),
        "ours_missed": int((raced & ~reached).sum()), "baseline_missed": int((raced & ~they).sum()),
        "ahead": ahead, "behind": int((both | (they & ~reached)).sum() - (ratios > 1).sum()),
        "speedup": speedup, "low": low, "high": high, "at_least": known[0], "at_least_low": known[1],
        "rounds_ratio": geometric(rounds[both])[0],
        "round_s_ratio": geometric(other["round_s"].to_numpy() / ours["round_s"].to_numpy())[0],
        "final_ratio": geometric(finals)[0],
        "clock_model": ours["clock_model"].iloc[0], "link": ours["link"].iloc[0],
    }  # fmt: skip


def describe(row: Any) -> str:
    """One row of :func:`speed_ups` in words: ``3.66× (3.1 to 4.3)``, ``> 2.9×``, ``never (1 of 3), 3.4× otherwise``."""
    num = row["compared"]
    if not num:
        return "no race: the base model is at the target"
    value = shown_interval(row["speedup"], row["low"], row["high"], "x") if row["num_both"] else ""
    if row["ours_missed"] == num and row["baseline_missed"] == num:
        return f"neither ({num} of {num})"
    if row["ours_missed"]:
        rest = f", {value} otherwise" if value else " FLUX only otherwise" if row["ours_missed"] < num else ""
        return f"never ({row['ours_missed']} of {num}){rest}"
    if row["baseline_missed"]:
        still = num - row["ahead"] - row["behind"]
        ended = f", and stopped before FLUX arrived in {still}" if still else ""
        return f"> {row['at_least']:.3g}×, {title(row['baseline'])} never ({row['baseline_missed']} of {num}){ended}"
    return value


def to_markdown(table: pd.DataFrame) -> str:
    """:func:`speed_ups` as Markdown: one line per model and task, one column per baseline."""
    if table.empty:
        return "*No FLUX and FMD runs with the same model, task and seed.*"
    baselines = methods_in_order(table["baseline"])
    names = list(map(title, baselines))
    header = ["model", "task", "seeds", f"FLUX sooner than {names[0]}", *names[1:]]
    rows = []
    for (model, task), part in table.groupby(["model", "task"], sort=False):
        by_name = {row["baseline"]: row for row in part.to_dict("records")}
        cells = [describe(by_name[name]) if name in by_name else "no run" for name in baselines]
        own = by_name[REFERENCE]
        number = f"{own['rounds_ratio']:.2f}×" if own["num_both"] else "–"
        place = f"`{Path(str(model)).name}`", f"`{task}`"
        rows.append([*place, own["seeds"], *cells, number, f"{own['round_s_ratio']:.2f}×"])
    return markdown_table([*header, "rounds, of FMD's", "a round shorter by"], rows)
