"""Who reaches the target first: time to accuracy of every run against FMD's, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.analysis.statistics import geometric
from fluxlib.analysis.wording import models_in_order as in_order
from fluxlib.analysis.wording import shown_interval
from fluxlib.figures import style
from fluxlib.figures.times import FINAL_ROUNDS, times_to_target

OURS, REFERENCE = "flux", "fmd"
TARGET_FRACTION = 0.95
LONG = "long"
"""Variant of runs with more rounds than the plain ones and the same settings otherwise.

They do not begin with the same rounds: epsilon rises over a third of a run.
"""
BEYOND = "improved"
"""Variant with all that goes beyond the paper: FLUX+ against FMD+ and FMES+."""
RACED = ("", BEYOND)
"""Variants that race: others change what a method is compared by (local work, budgets, participants)."""


def timed(rounds: pd.DataFrame, variants: Sequence[str] = RACED) -> pd.DataFrame:
    """The runs that race for time: each plain one, or the run of variant ``long`` in its place, and other ``variants``.

    A method whose rounds are short has had little time when all have had twenty rounds; where it has not reached the
    target by then a run of its own may last as long as FMD's.

    Args:
        rounds: without longer runs with other settings (:func:`fluxlib.analysis.claims.stored.left_out`).
    """
    longer = rounds.loc[rounds["variant"] == LONG].assign(variant="")
    key = ["model", "task", "seed", "method"]
    replaced = pd.MultiIndex.from_frame(rounds[key]).isin(pd.MultiIndex.from_frame(longer[key]))
    kept = rounds[rounds["variant"].isin(variants) & ~(replaced & (rounds["variant"] == ""))]
    return pd.concat([kept, longer], ignore_index=True)


def races(
    rounds: pd.DataFrame | None, target_fraction: float = TARGET_FRACTION, final_rounds: int = FINAL_ROUNDS
) -> pd.DataFrame:
    """Time to target of FLUX and of every method beside it, one row per model, task, variant, seed and method.

    Seeds are paired: the target of a seed is ``target_fraction`` of FMD's final score with that seed. A variant of FLUX
    meets each method in the same variant, or else as it is, if that run has as many participants, and as many rounds or
    at least as many device seconds. Seeds and variants without FMD are left out.

    Returns:
        columns of :func:`fluxlib.figures.times.times_to_target` and ``variant`` (FLUX's), ``own_variant`` (the run's),
        ``end_s`` (device seconds of the whole run) and ``round_s`` (mean of its rounds).
    """
    found = []
    groups: Any = [] if rounds is None else rounds.groupby(["model", "task", "seed"], sort=False)
    for _, runs in groups:
        for variant in sorted(runs.loc[runs["method"] == OURS, "variant"].unique()):
            entered = _field(runs, variant)
            if REFERENCE not in set(entered["method"]):
                continue
            times = times_to_target(entered, target_fraction, REFERENCE, final_rounds)
            found.append(times.assign(variant=variant).merge(_ends(entered), on="method"))
    columns = ["model", "task", "variant", "seed", "method"]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)


def _field(runs: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Who runs against FLUX in ``variant``: runs of one model, task and seed, one per method."""
    ours = runs[(runs["method"] == OURS) & (runs["variant"] == variant)]
    entered = [ours]
    for method in style.order(set(runs["method"]) - {OURS}):
        own = runs[runs["method"] == method]
        same, plain = own[own["variant"] == variant], own[own["variant"] == ""]
        as_long = plain["round"].max() == ours["round"].max() or plain["device_s"].max() >= ours["device_s"].max()
        alike = as_long and plain["num_participants"].max() == ours["num_participants"].max()
        entered.append(same if len(same) else plain if alike else own.head(0))
    return pd.concat(entered, ignore_index=True)


def _ends(runs: pd.DataFrame) -> pd.DataFrame:
    trained = runs[runs["round"] > 0].groupby("method")
    kept = {"own_variant": ("variant", "first"), "end_s": ("device_s", "max"), "round_s": ("round_device_s", "mean")}
    return trained.agg(**kept).reset_index()


def speed_ups(found: pd.DataFrame) -> pd.DataFrame:
    """FLUX against each method: one row per model, task, variant and baseline, over seeds.

    ``speedup`` is the geometric mean of the baseline's device seconds over FLUX's in the seeds where both reach the
    target (``num_both``), ``low`` and ``high`` its interval. A miss is censored, not dropped: ``ours_missed`` and
    ``baseline_missed`` count seeds, and ``at_least`` is the geometric mean over all seeds with the baseline's whole run
    in the place of a time it never had (NaN if FLUX missed one), ``at_least_low`` its interval's lower end. ``trivial``
    counts seeds whose base model is at the target already: they say nothing and are in none of the others. ``ahead``
    counts seeds in which FLUX is sooner, ``behind`` those in which it is not; in the rest neither reaches the target,
    or the other's run ended before FLUX reached it. ``final_ratio`` leaves out seeds in which the baseline ends at 0.
    """
    rows = []
    for (model, task, variant), group in found.groupby(["model", "task", "variant"], sort=False):
        ours = group[group["method"] == OURS].set_index("seed")
        for baseline in style.order(set(group["method"]) - {OURS}):
            other = group[group["method"] == baseline].set_index("seed")
            seeds = [seed for seed in ours.index if seed in other.index]
            row = _against(ours.loc[seeds], other.loc[seeds])
            rows.append({"model": model, "task": task, "variant": variant, "baseline": baseline, **row})
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    order = in_order(table["model"])
    place = [order.index(Path(model).name) for model in table["model"]]
    return table.assign(place=place).sort_values(["place", "variant", "task"], kind="stable").drop(columns="place")


def _against(ours: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    mine, theirs = ours["device_s"].to_numpy(dtype=float), other["device_s"].to_numpy(dtype=float)
    trivial = (mine == 0) | (theirs == 0)
    reached, they = ~np.isnan(mine) & ~trivial, ~np.isnan(theirs) & ~trivial
    both = reached & they
    ratios = theirs[both] / mine[both]
    bounds = np.where(they, theirs, other["end_s"].to_numpy(dtype=float))[reached] / mine[reached]
    speedup, low, high = geometric(ratios)
    final = geometric((ours["final_metric"] / other["final_metric"].replace(0.0, np.nan)).to_numpy(dtype=float))
    outlasted = np.nan_to_num(mine, nan=np.inf) <= other["end_s"].to_numpy(dtype=float)
    ahead = int((ratios > 1).sum() + (reached & ~they & outlasted).sum())
    raced = ~trivial
    known = geometric(bounds) if reached[raced].all() and raced.any() else (np.nan, np.nan, np.nan)
    return {
        "seeds": len(ours), "trivial": int(trivial.sum()), "num_both": int(both.sum()),
        "ours_missed": int((raced & ~reached).sum()), "baseline_missed": int((raced & ~they).sum()),
        "ahead": ahead, "behind": int((both | (they & ~reached)).sum() - (ratios > 1).sum()),
        "speedup": speedup, "low": low, "high": high,
        "at_least": known[0], "at_least_low": known[1],
        "rounds_ratio": geometric((ours["round"] / other["round"]).to_numpy(dtype=float)[both])[0],
        "round_s_ratio": geometric(other["round_s"].to_numpy() / ours["round_s"].to_numpy())[0],
        "final_ratio": final[0], "final_low": final[1], "final_high": final[2],
        "clock_model": ours["clock_model"].iloc[0], "link": ours["link"].iloc[0],
        "as_it_is": bool((other["own_variant"].to_numpy() != ours["own_variant"].to_numpy()).any()),
    }  # fmt: skip


def scores(found: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """Final scores and times to target of the plain runs, means over seeds: one row per model, task and method.

    ``reached`` counts the seeds that reached the target; ``device_s`` and ``rounds`` are means over them. ``base`` is
    the score before any training.
    """
    plain = found[found["variant"] == ""] if len(found) else found
    if plain.empty:
        return pd.DataFrame()
    first = rounds[(rounds["round"] == 0) & (rounds["variant"] == "")]
    base = first.groupby(["model", "task"])["metric"].mean().rename("base")
    table = plain.groupby(["model", "task", "method"], sort=False).agg(
        metric=("metric_name", "first"),
        seeds=("seed", "nunique"),
        final=("final_metric", "mean"),
        reached=("device_s", "count"),
        device_s=("device_s", "mean"),
        rounds=("round", "mean"),
        round_s=("round_s", "mean"),
    )
    joined = table.join(base).reset_index()
    place = {name: number for number, name in enumerate(in_order(joined["model"]))}
    return joined.sort_values("model", key=lambda names: names.map(lambda name: place[Path(name).name]), kind="stable")


def scores_markdown(table: pd.DataFrame) -> str:
    """:func:`scores` as a Markdown table: one line per model and task, the methods side by side."""
    if table.empty:
        return "*No FLUX and FMD runs with the same model, task and seed.*"
    methods = style.order(table["method"])
    titles = " / ".join(style.method(name).title for name in methods)
    lines = [
        f"| {titles} on | | metric | seeds | before | final score | device s to the target | device s a round |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, task), rows in table.groupby(["model", "task"], sort=False):
        by_name = rows.set_index("method").reindex(methods)
        finals = " / ".join(f"{value:.3f}" if value == value else "–" for value in by_name["final"])
        times = " / ".join(_seconds(row) for row in by_name.to_dict("records"))
        lengths = " / ".join(f"{value:.0f}" if value == value else "–" for value in by_name["round_s"])
        one = rows.iloc[0]
        metric = style.METRICS.get(one["metric"], one["metric"])
        cells = [f"`{Path(str(model)).name}`", f"`{task}`", metric, str(one["seeds"]), f"{one['base']:.3f}"]
        lines.append("| " + " | ".join([*cells, finals, times, lengths]) + " |")
    return "\n".join(lines)


def _seconds(row: Any) -> str:
    if not row["reached"] > 0:
        return "never"
    some = "" if row["reached"] == row["seeds"] else f" ({row['reached']:.0f} of {row['seeds']:.0f})"
    return f"{row['device_s']:.0f}{some}"


def describe(row: Any) -> str:
    """One row of :func:`speed_ups` in words: ``3.66× (3.1 to 4.3)``, ``> 2.9×``, ``never (1 of 3), 3.4× otherwise``."""
    title = style.method(row["baseline"]).title
    raced = row["seeds"] - row["trivial"]
    if not raced:
        return "no race: the base model is at the target"
    value = shown_interval(row["speedup"], row["low"], row["high"], "x") if row["num_both"] else ""
    if row["ours_missed"] == raced and row["baseline_missed"] == raced:
        return f"neither ({raced} of {raced})"
    if row["ours_missed"]:
        rest = f", {value} otherwise" if value else ""
        only = " FLUX only otherwise" if not rest and row["ours_missed"] < raced else ""
        return f"never ({row['ours_missed']} of {raced}){rest}{only}"
    if row["baseline_missed"]:
        open_races = raced - row["ahead"] - row["behind"]
        ended = f", its run over before FLUX arrived in {open_races}" if open_races else ""
        return f"> {row['at_least']:.3g}×, {title} never ({row['baseline_missed']} of {raced}){ended}"
    return value


def speed_up_markdown(table: pd.DataFrame) -> str:
    """The speed-ups as a Markdown table: one line per model, task and variant, one column per baseline.

    ``unchanged``: a variant of FLUX met a baseline without what the variant changes, on the link above all.
    """
    if table.empty:
        return "*No race: no FLUX and FMD runs with the same model, task and seed.*"
    baselines = style.order(table["baseline"])
    plus = "+" if (table["variant"] == BEYOND).all() else ""
    titles = [style.method(name).title + plus * (name != "fmq") for name in baselines]
    lines = [
        f"| model | task | seeds | FLUX{plus} sooner than "
        + " | ".join(titles)
        + f" | rounds, of FMD{plus}'s | a round shorter by |",
        "|---|---|---|" + "---|" * (len(titles) + 2),
    ]
    for (model, task, variant), rows in table.groupby(["model", "task", "variant"], sort=False):
        by_name = {row["baseline"]: row for row in rows.to_dict("records")}
        cells = [
            describe(by_name[name]) + " (unchanged)" * by_name[name]["as_it_is"] if name in by_name else "no run"
            for name in baselines
        ]
        own = by_name[REFERENCE]
        number = f"{own['rounds_ratio']:.2f}×" if own["num_both"] else "–"
        name = f"`{Path(str(model)).name}`" + (f" ({variant})" if variant and not plus else "")
        cells += [number, f"{own['round_s_ratio']:.2f}×"]
        lines.append(f"| {name} | `{task}` | {own['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
