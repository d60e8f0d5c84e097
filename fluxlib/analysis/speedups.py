"""FLUX's speed-up over each method: time to target seed by seed, then over seeds, with misses counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.analysis import store
from fluxlib.analysis.statistics import geometric
from fluxlib.analysis.time_to_target import PAIR, TARGET_FRACTION, by_loss, times_to_target
from fluxlib.analysis.wording import (
    METRICS,
    in_order,
    markdown_table,
    methods_in_order,
    percent,
    shown_interval,
    title,
)
from fluxlib.config import results_dir

OURS, REFERENCE = "flux", "fmd"
BEYOND = "improved"
"""Variant with all that goes beyond the paper: FLUX+ against FMD+ and FMES+."""


def entered(rounds: pd.DataFrame) -> pd.DataFrame:
    """The runs that are compared by time: plain ones, and those with all that goes beyond the paper."""
    return rounds[rounds["variant"].isin(["", BEYOND])]


def against_all(rounds: pd.DataFrame, fraction: float = TARGET_FRACTION, **target: Any) -> pd.DataFrame:
    """Time to target of FLUX and of every method beside it, one row per model, task, seed, variant and method.

    A variant of FLUX meets each method in the same variant, or else as it is, if that run has as many participants, and
    as many rounds or at least as many device seconds. Seeds and variants without FMD are left out.

    Args:
        fraction, target: of :func:`fluxlib.analysis.time_to_target.times_to_target`.

    Returns:
        its columns, with FLUX's ``variant`` and the run's ``own_variant``.
    """
    found = []
    for _, runs in rounds.groupby(list(PAIR), sort=False):
        for variant in sorted(runs.loc[runs["method"] == OURS, "variant"].unique()):
            field = _opponents(runs, variant)
            if REFERENCE in set(field["method"]):
                times = times_to_target(field, fraction, REFERENCE, **target)
                found.append(times.rename(columns={"variant": "own_variant"}).assign(variant=variant))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=[*PAIR, "variant", "method"])


def _opponents(runs: pd.DataFrame, variant: str) -> pd.DataFrame:
    """FLUX in ``variant`` and who runs against it: runs of one model, task and seed, one per method."""
    ours = runs[(runs["method"] == OURS) & (runs["variant"] == variant)]
    field = [ours]
    for method in methods_in_order(set(runs["method"]) - {OURS}):
        own = runs[runs["method"] == method]
        same, plain = own[own["variant"] == variant], own[own["variant"] == ""]
        as_long = plain["round"].max() == ours["round"].max() or plain["device_s"].max() >= ours["device_s"].max()
        alike = as_long and plain["num_participants"].max() == ours["num_participants"].max()
        field.append(same if len(same) else plain if alike else own.head(0))
    return pd.concat(field, ignore_index=True)


def speed_ups(times: pd.DataFrame) -> pd.DataFrame:
    """FLUX against each method: one row per model, task, variant and ``baseline``, over seeds.

    Args:
        times: of :func:`against_all`.

    Returns:
        ``speedup``, the geometric mean of the baseline's device seconds over FLUX's in the ``num_both`` seeds where
        both reach the target, ``low`` and ``high`` its interval. A miss is censored, not dropped: ``ours_missed`` and
        ``baseline_missed`` count seeds, and ``at_least`` is the geometric mean over all seeds with the baseline's whole
        run in the place of a time it never had (NaN if FLUX missed one), ``at_least_low`` its interval's lower end.
        ``trivial`` counts seeds whose base model is at the target already: they say nothing, are in none of the others,
        and not in ``compared``. ``ahead`` counts seeds in which FLUX is sooner, ``behind`` those in which it is not;
        the rest is open: neither reaches the target, or the other's run ended before FLUX reached it. ``rounds_ratio``
        is FLUX's rounds to the target over the baseline's, ``round_s_ratio`` the baseline's seconds of a round over
        FLUX's; ``final_ratio`` leaves out seeds in which the baseline ends at 0. ``as_it_is``: in a variant of FLUX the
        baseline's plain run stands in.
    """
    rows, place = [], ["model", "task", "variant"]
    ordered = times.sort_values(["model", "variant", "task"], key=in_order, kind="stable")
    for key, group in ordered.groupby(place, sort=False):
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
        "as_it_is": bool((other["own_variant"].to_numpy() != ours["own_variant"].to_numpy()).any()),
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
        ended = f", its run over before FLUX arrived in {still}" if still else ""
        return f"> {row['at_least']:.3g}×, {title(row['baseline'])} never ({row['baseline_missed']} of {num}){ended}"
    return value


def to_markdown(table: pd.DataFrame) -> str:
    """:func:`speed_ups` as Markdown: one line per model, task and variant, one column per baseline."""
    if table.empty:
        return "*No FLUX and FMD runs with the same model, task and seed.*"
    baselines = methods_in_order(table["baseline"])
    plus = "+" if (table["variant"] == BEYOND).all() else ""
    names = [title(name) + plus * (name != "fmq") for name in baselines]
    header = ["model", "task", "seeds", f"FLUX{plus} sooner than {names[0]}", *names[1:]]
    rows = []
    for (model, task, variant), part in table.groupby(["model", "task", "variant"], sort=False):
        by_name = {row["baseline"]: row for row in part.to_dict("records")}
        cells = [
            describe(by_name[name]) + " (unchanged)" * by_name[name]["as_it_is"] if name in by_name else "no run"
            for name in baselines
        ]
        own = by_name[REFERENCE]
        number = f"{own['rounds_ratio']:.2f}×" if own["num_both"] else "–"
        name = f"`{Path(str(model)).name}`" + (f" ({variant})" if variant and not plus else "")
        rows.append([name, f"`{task}`", own["seeds"], *cells, number, f"{own['round_s_ratio']:.2f}×"])
    return markdown_table([*header, f"rounds, of FMD{plus}'s", "a round shorter by"], rows)


def scores_to_markdown(times: pd.DataFrame, rounds: pd.DataFrame) -> str:
    """Final scores and times to target of the plain runs, means over seeds: one line per model and task.

    Args:
        times: of :func:`against_all`.
        rounds: the runs, whose first rows are the base models' scores.
    """
    plain = times[times["variant"] == ""].sort_values("model", key=in_order, kind="stable")
    first = rounds[(rounds["round"] == 0) & (rounds["variant"] == "")]
    methods = methods_in_order(plain["method"])
    scores: dict[Any, float] = first.groupby(["model", "task"])["metric"].mean().to_dict()
    rows = []
    for (model, task), part in plain.groupby(["model", "task"], sort=False):
        metric, seeds = part["metric_name"].iloc[0], part["seed"].nunique()
        cells = [f"`{Path(str(model)).name}`", f"`{task}`", METRICS.get(metric, metric), seeds]
        cells.append(f"{scores[model, task]:.3f}")
        for column, write in (("final_metric", "{:.3f}"), ("device_s_to_target", ""), ("round_s", "{:.0f}")):
            cells.append(" / ".join(_mean(part.loc[part["method"] == name, column], write) for name in methods))
        rows.append(cells)
    listed = " / ".join(map(title, methods))
    header = [f"{listed} on", "", "metric", "seeds", "before", "final score", "device s to the target"]
    return markdown_table([*header, "device s a round"], rows)


def _mean(values: pd.Series, write: str) -> str:
    """Mean over seeds; of a time (no ``write``) over those that reached the target, whose number is told."""
    if values.isna().all():
        return "–" if write or values.empty else "never"
    some = "" if write or values.notna().all() else f" ({values.count()} of {len(values)})"
    return (write or "{:.0f}").format(values.mean()) + some


def page(results: Path | None = None) -> str:
    """``docs/races.md``: scores and speed-ups of the paper's methods, then of FLUX+, which goes beyond the paper.

    Args:
        results: a profile's results with runs that finished; the tracked profile's if it is not given.
    """
    rounds = store.finished(results or results_dir("full"), "rounds")
    if rounds is None:
        return "# Time to target\n\n*No runs.*\n"
    times, share = against_all(entered(rounds)), percent(TARGET_FRACTION)
    plain, beyond = (times[(times["variant"] == BEYOND) == whether] for whether in (False, True))
    parts = [
        "# Time to target",
        f"The target of a seed is {share} of FMD's final score with that seed; seconds are those of the device clock."
        " A factor is a geometric mean over seeds with its 95 % t interval. *never*: the target was not reached.",
        scores_to_markdown(against_all(rounds[rounds["variant"] == ""]), rounds),
        to_markdown(speed_ups(plain)),
        f"**By loss**: the same runs, the target {share} of how far FMD's negative log-likelihood of the right answers"
        " falls. It has less noise than a score, and counts what a score does not see.",
        to_markdown(speed_ups(against_all(by_loss(rounds[rounds["variant"] == ""])))),
    ]
    if len(beyond):
        parts += [
            "**Beyond the paper**, no evidence for its claims: FLUX+ against FMD+ and FMES+, each with the options that"
            f" help it, seeds paired; the target is {share} of FMD+'s final score. `unchanged`: a plain run stands in"
            " for a missing one.",
            to_markdown(speed_ups(beyond)),
        ]
    return "\n\n".join(parts) + "\n"
