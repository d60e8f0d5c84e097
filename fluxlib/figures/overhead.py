"""What a round costs, by phase, memory, link and device, and who is ahead elsewhere (notebook 06)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm

from fluxlib.analysis import where
from fluxlib.analysis.statistics import geometric, interval
from fluxlib.analysis.time_to_target import PAIR, TARGET_FRACTION, times_to_target
from fluxlib.analysis.wording import clock_shapes, percent, title
from fluxlib.devices import catalogue
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, caption, drawn, facets, notice, panels, split, study, unique

GIB = 2**30
CELL = ["model", "task", "fleet", "link", "baseline"]
REACHED, AT_LEAST, AT_MOST, NEITHER = "", "at least", "at most", "neither"
"""What a speed-up is where somebody missed the target: the baseline, FLUX, or both."""
FULL = 1 + 1e-6
"""What offloads fills the memory to the last byte, and bytes are rounded."""
FACTORS = LogNorm(0.25, 4.0, clip=True)
"""How factors of the map become colours of :data:`fluxlib.figures.style.DIVERGING`."""


# Tables


def times_elsewhere(recounted: pd.DataFrame, fraction: float = TARGET_FRACTION) -> pd.DataFrame:
    """Time to target of every run on other devices and links, where both FLUX and FMD ran.

    Args:
        recounted: of :func:`fluxlib.analysis.studies.scale.recounts`.

    Returns:
        :func:`fluxlib.analysis.time_to_target.times_to_target`, with ``fleet``, ``link`` and ``fits``: whether the
        predicted memory of a step is there on every device.
    """
    names = recounted.groupby(["model", "task"])["method"]
    kept = recounted[names.transform(lambda methods: {"flux", "fmd"} <= set(methods)).astype(bool)]
    found = [pd.DataFrame(columns=[*PAIR, "method", "fleet", "link"])] if kept.empty else []
    for (fleet, link), part in kept.groupby(["fleet", "link"], sort=False):
        times = times_to_target(part, fraction)
        shares = times["run_id"].map(part.groupby("run_id")["memory_share"].max())
        found.append(times.assign(fleet=str(fleet), link=str(link), fits=shares <= FULL))
    return pd.concat(found, ignore_index=True)


def elsewhere(times: pd.DataFrame) -> pd.DataFrame:
    """How much sooner FLUX is at the target than each other method, in device seconds.

    Args:
        times: of :func:`times_elsewhere`.

    Returns:
        One row per model, task, fleet, link, ``baseline`` and seed that both have: ``speedup`` is the baseline's time
        over FLUX's. A run that never reached the target took at least as long as it was followed, so ``bound`` says
        whether the speed-up is at least or at most that; ``neither``: nothing is known.
    """
    if times.empty:
        return pd.DataFrame(columns=[*CELL, "seed", "speedup", "bound"])
    times, flux = times.assign(missed=times["device_s_to_target"].isna()), times["method"] == "flux"
    others = times[~flux].rename(columns={"method": "baseline"})
    found = times[flux].merge(others, on=[*PAIR, "fleet", "link"], suffixes=("", "_of_baseline"))
    bounds = {(False, False): REACHED, (False, True): AT_LEAST, (True, False): AT_MOST, (True, True): NEITHER}
    found["bound"] = [bounds[who] for who in zip(found["missed"], found["missed_of_baseline"], strict=True)]
    ratio = found["device_s_at_least_of_baseline"] / found["device_s_at_least"]
    found["speedup"] = ratio.where(found["bound"] != NEITHER)
    shown = ["device_s_at_least", "device_s_at_least_of_baseline", "target", "target_fraction", "clock_model", "fits"]
    return found[[*CELL, "seed", "speedup", "bound", *shown, "fits_of_baseline"]]


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`elsewhere` over seeds: one row per cell of the map, with the geometric mean and its ``bound``."""
    groups = table.groupby(CELL, sort=False)
    found = groups.agg(bound=("bound", _bound), num_seeds=("seed", "nunique"), fits=("fits", "all"))
    speedup = groups["speedup"].agg(lambda ratios: geometric(ratios)[0])
    return found.assign(speedup=speedup.where(found["bound"] != NEITHER)).reset_index()


def _bound(bounds: pd.Series) -> str:
    """A mean of lower bounds and values is a lower bound; of lower and upper bounds it is nothing."""
    kinds = set(bounds) - {REACHED}
    return kinds.pop() if len(kinds) == 1 else NEITHER if kinds else REACHED


def clock_table(table: pd.DataFrame) -> pd.DataFrame:
    """Measured beside predicted seconds of each block of a round, and of all of them together.

    Args:
        table: ``measurements`` with the study ``clock_check``.

    Returns:
        One row per model, task and block, means over seeds: ``predicted_s``, ``measured_s``, ``factor`` (measured over
        predicted, between ``low`` and ``high``), and each block's share of the whole by both. Where all factors are
        alike the clock is wrong in seconds and right in shares; where they differ, shares are wrong as well.
    """
    rows, place = split(study(table, "clock_check"), "block", "kind"), ["model", "task", "block"]
    every = pd.concat([rows, rows.assign(block="together")])
    seconds = every.groupby([*place, "seed", "kind"], sort=False)["value"].sum().unstack()[["predicted", "measured"]]
    groups = seconds.groupby(place, sort=False)
    means = groups.mean()
    out = groups.size().to_frame("num_seeds").join(means.add_suffix("_s"))
    out[["factor", "low", "high"]] = [interval(part["measured"] / part["predicted"]) for _, part in groups]
    return out.join((means / means.groupby(["model", "task"]).transform("max")).add_suffix("_share")).reset_index()


# Pictures


@drawn
def round_phases(table: pd.DataFrame, rounds: pd.DataFrame) -> Picture:
    """Stacked bars, one panel per model and task, one bar per method.

    Args:
        table: of :func:`fluxlib.analysis.runs.breakdown`.
        rounds: what it was made of, for the caption.
    """
    figure, places = facets(table, table, ["model", "task"], 2.5, 2.9)
    looks, methods = style.of_phases(table["phase"]), style.of_methods(table["method"])
    for ax, part in places:
        marks.stacked(ax, part, "method", "phase", "seconds", looks, methods, total="{:.0f}")
    places[0][0].set_ylabel("device clock (s per round)")
    marks.legend(figure, looks, filled=True, loc="outside right center")
    told = "slowest participant of each round, mean over rounds", "a profile runs beside upload and server"
    caption(figure, *told, f"shapes of {clock_shapes(rounds)}")
    return figure


@drawn
def link_speed(table: pd.DataFrame) -> Picture:
    """Speed-up over FMD against the link's upload rate, one panel per model and task; a miss leaves a gap.

    Args:
        table: of :func:`times_elsewhere`, of one fleet.
    """
    rows = table.assign(mb_per_s=[8e-6 * catalogue.LINKS[name].up_bytes_per_s for name in table["link"]])
    figure, places = facets(table.drop(columns=["fleet", "fits"]), rows, ["model", "task"], 2.5, 2.6)
    looks = style.of_methods(table["method"])
    for ax, part in places:
        marks.lines(ax, part, "mb_per_s", "speedup_device_s", "method", looks, errorbar=None)
        ax.set(xscale="log", xlabel="upload (Mb/s)", ylabel="", ylim=(0, None))
    places[0][0].set_ylabel("speed-up over FMD")
    marks.legend(figure, looks, loc="outside right center")
    share = percent(table["target_fraction"].iloc[0])
    caption(
        figure, f"time to {share} of FMD's final score, mean over seeds", f"shapes of {unique(table, 'clock_model')}"
    )
    return figure


@drawn
def clock_check(table: pd.DataFrame) -> Picture:
    """Predicted beside measured seconds of each block, logarithmic; the factor between them is written.

    Args:
        table: ``measurements`` with the study ``clock_check``.
    """
    rows = split(study(table, "clock_check"), "block", "kind")
    figure, ax = panels(clock_table(table), (4.6, 2.6))
    looks = style.of_settings(["predicted", "measured"])
    marks.bars(ax, rows, "block", "value", looks, by="kind")
    means = rows.groupby(["block", "kind"], sort=False)["value"].mean().unstack(sort=False)
    for place, factor in enumerate(means["measured"] / means["predicted"]):
        ax.text(place, 0.93, f"x {factor:.1f}", transform=ax.get_xaxis_transform(), ha="center", fontsize=8)
    ax.set(yscale="log", ylabel="seconds", ylim=(0.3 * means.min().min(), 10 * means.max().max()))
    marks.legend(figure, looks, filled=True, loc="outside right center")
    caption(figure, f"{unique(rows, 'model')} on one thread here", "x: measured over predicted")
    return figure


@drawn
def round_memory(rounds: pd.DataFrame) -> Picture:
    """Largest predicted memory of a participant, by model and method."""
    largest = rounds[rounds["round"] > 0].groupby(["model", "method"], sort=False)["device_memory_bytes"].max() / GIB
    figure, ax = panels(rounds[["run_id", "round", "device_memory_bytes"]], (4.6, 2.6))
    looks = style.of_methods(rounds["method"])
    table = largest.rename("gib").reset_index().assign(seed=0)
    marks.bars(ax, table, "model", "gib", looks, by="method", fmt="{:.0f}")
    ax.set_ylabel("memory of a step (GiB)")
    marks.legend(figure, looks, filled=True, loc="outside right center")
    caption(figure, f"predicted, shapes of {clock_shapes(rounds)}", "offloading fills the device's memory")
    return figure


@drawn
def sensitivity(table: pd.DataFrame) -> Picture:
    """Heat map of :func:`elsewhere`: a row of panels per baseline, a column per task; fleets down, links across.

    Only what is known is coloured. A bound is written with its sign, a dash where both missed;
    brackets: FLUX's step would not fit in the memory of every device of that fleet.
    """
    if table.empty:
        return notice("No FLUX and FMD runs of this model that can be counted anew: older ones kept no works.", table)
    cells = over_seeds(table)
    baselines, tasks = style.of_methods(cells["baseline"]), list(pd.unique(cells["task"]))
    fleets, links = list(pd.unique(cells["fleet"])), list(pd.unique(cells["link"]))
    size = max(5.4, 2.2 + 1.6 * len(tasks)), 0.8 + (0.4 + 0.2 * len(fleets)) * len(baselines)
    figure, axes = panels(table, size, len(baselines), len(tasks), sharex=True, sharey=True, squeeze=False)
    shown = cells.loc[cells["bound"].isin([REACHED, AT_LEAST]), "speedup"].dropna()
    low, high = min([0.5, *shown]), max([2.0, *shown])
    norm = LogNorm(low, high)
    for (row, baseline), (column, task) in itertools.product(enumerate(baselines), enumerate(tasks)):
        ax, own = axes[row, column], cells[(cells["baseline"] == baseline) & (cells["task"] == task)]
        own = own.set_index(["fleet", "link"]).reindex(pd.MultiIndex.from_product([fleets, links]))
        known = own["speedup"].where(own["bound"].isin([REACHED, AT_LEAST])).unstack(sort=False)
        _map(ax, known, own.apply(_text, axis=1).unstack(sort=False), norm, style.SEQUENTIAL)
        ax.set_title(f"{task}\n" * (row == 0) + f"over {baselines[baseline].title}")
        ax.set_xticks(np.arange(len(links)) + 0.5, [catalogue.LINKS[name].title for name in links], fontsize=7)
        ax.set_yticks(np.arange(len(fleets)) + 0.5, fleets, fontsize=7)
    bar = figure.colorbar(mpl.cm.ScalarMappable(norm, style.SEQUENTIAL), ax=axes, fraction=0.03, pad=0.02)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    bar.set_label("FLUX sooner by this factor")
    share, seeds = percent(table["target_fraction"].iloc[0]), int(cells["num_seeds"].min())
    told = f"{unique(table, 'model')}: time to {share} of FMD's final score", f"geometric mean of {seeds} seed(s)"
    signs = "below 1 without ≥: FLUX is later · ( ): FLUX's step exceeds the memory · ≥: the baseline never got there"
    more = "≤: FLUX did not in every seed", "–: neither", "paper: NVIDIA L20"
    caption(figure, *told, f"device clock, shapes of {unique(table, 'clock_model')}", signs, *more)
    return figure


@drawn
def pays(table: pd.DataFrame, fraction: float = TARGET_FRACTION, ours: str = "flux") -> Picture:
    """The map: FLUX or FLUX+ over the best baseline that fits, memory of the device down, link across, by model.

    A thick line is the break-even. The name below a factor is the baseline that FLUX meets there.

    Args:
        table: of :func:`fluxlib.analysis.where.pays`.
        ours: the method that it was made for.
    """
    cells = where.over_tasks(table)
    models, devices, links = (list(pd.unique(cells[name])) for name in ("model", "device", "link"))
    figure, axes = panels(table, (1.6 + 3.3 * len(models), 3.4), 1, len(models), sharey=True, squeeze=False)
    grid = pd.MultiIndex.from_product([devices, links])
    for ax, model in zip(axes[0], models, strict=True):
        own = cells[cells["model"] == model].set_index(["device", "link"]).reindex(grid)
        factors = own["factor"].unstack(sort=False)
        _map(ax, factors, own.apply(_race, axis=1).unstack(sort=False), FACTORS, style.DIVERGING)
        _break_even(ax, factors.to_numpy())
        ax.set_title(Path(model).name)
        ax.set_xticks(np.arange(len(links)) + 0.5, [catalogue.LINKS[name].title for name in links], fontsize=7)
        ax.set_yticks(np.arange(len(devices)) + 0.5, [memory_of(name) for name in devices], fontsize=7, rotation=0)
    bar = figure.colorbar(mpl.cm.ScalarMappable(FACTORS, style.DIVERGING), ax=axes, fraction=0.03, pad=0.02)
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["≤ 1/4", "1/2", "1", "2", "≥ 4"])
    bar.minorticks_off()
    bar.set_label(f"{title(ours)} sooner by this factor")
    races = f"time to {percent(fraction)} of FMD's final score", f"geometric mean over {unique(table, 'task')}"
    rule = f"{table['seed'].nunique()} seed(s)", "every method with the fastest of its stored budgets that fits"
    caption(figure, *races, *rule, f"≥: no baseline arrives · ≤: {title(ours)} does not · –: neither, or none fits")
    return figure


def _race(cell: pd.Series) -> str:
    """A factor with its sign, and below it whom FLUX meets."""
    if cell["factor"] != cell["factor"]:
        return "–"
    return f"{cell['sign']}{cell['factor']:.2g}\n{cell['baseline']}"


def memory_of(name: str) -> str:
    """A device of the catalogue by its memory, its name below."""
    device = catalogue.DEVICES[name]
    return f"{device.memory_bytes / GIB:.0f} GB\n{name}"


def _break_even(ax: Any, factors: np.ndarray) -> None:
    """A line between cells on different sides of 1."""
    above = np.where(np.isnan(factors), np.nan, factors > 1)
    for (y, x), here in np.ndenumerate(above):
        if x + 1 < above.shape[1] and {here, above[y, x + 1]} == {0.0, 1.0}:
            ax.plot([x + 1, x + 1], [y, y + 1], color="black", linewidth=2)
        if y + 1 < above.shape[0] and {here, above[y + 1, x]} == {0.0, 1.0}:
            ax.plot([x, x + 1], [y + 1, y + 1], color="black", linewidth=2)


def _map(ax: Any, factors: pd.DataFrame, texts: pd.DataFrame, norm: Any, colors: str) -> None:
    """One panel: ``factors`` as colours, none where they are NaN, with ``texts`` in all cells."""
    look = {"cbar": False, "linewidths": 0.5, "linecolor": "#bbbbbb", "annot_kws": {"fontsize": 7}}
    sns.heatmap(factors, ax=ax, annot=texts, fmt="", norm=norm, cmap=colors, **look)
    for y, x in np.argwhere(factors.isna().to_numpy()):  # seaborn writes in coloured cells only
        ax.text(x + 0.5, y + 0.5, texts.iloc[y, x], ha="center", va="center", fontsize=7)
    ax.set(xlabel="", ylabel="")
    ax.grid(visible=False)
    ax.tick_params(length=0, rotation=0)


def _text(cell: pd.Series) -> str:
    """A cell's number with its sign, in brackets where the memory would not do."""
    value, sign = cell["speedup"], {REACHED: "", AT_LEAST: "≥", AT_MOST: "≤"}.get(cell["bound"])
    if value != value or sign is None:
        return "–" if cell["bound"] == cell["bound"] else ""
    text = sign + (f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}")
    return text if cell["fits"] else f"({text})"
