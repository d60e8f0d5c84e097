"""What a round costs, by phase, memory, link and device, where FLUX pays, and more participants (notebook 06)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from scipy.stats import gmean

from fluxlib.analysis import where
from fluxlib.analysis.statistics import interval
from fluxlib.analysis.time_to_target import TARGET_FRACTION
from fluxlib.analysis.wording import METRICS, clock_shapes, methods_in_order, percent, title
from fluxlib.devices import catalogue
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, caption, drawn, facets, footer, notice, panels, split, study, unique
from fluxlib.records import seconds

GIB = 2**30
FACTORS = LogNorm(0.25, 4.0, clip=True)
"""How factors of the map become colours of :data:`fluxlib.figures.style.DIVERGING`."""
CURVE = ["run_id", "method", "seed", "round", "metric", "device_s", "participants", "participants_per_round"]


def clock_table(table: pd.DataFrame) -> pd.DataFrame:
    """Measured beside predicted seconds of each block of a round, and of all together, from the study ``clock_check``.

    One row per model, task and block, means over seeds: ``predicted_s``, ``measured_s``, ``factor`` (measured over
    predicted, between ``low`` and ``high``), and each block's share of the whole by both. Where all factors are alike
    the clock is wrong in seconds and right in shares; where they differ, shares are wrong as well.
    """
    rows, place = split(study(table, "clock_check"), "block", "kind"), ["model", "task", "block"]
    every = pd.concat([rows, rows.assign(block="together")])
    seconds = every.groupby([*place, "seed", "kind"], sort=False)["value"].sum().unstack()[["predicted", "measured"]]
    groups = seconds.groupby(place, sort=False)
    means = groups.mean()
    out = groups.size().to_frame("num_seeds").join(means.add_suffix("_s"))
    out[["factor", "low", "high"]] = [interval(part["measured"] / part["predicted"]) for _, part in groups]
    return out.join((means / means.groupby(["model", "task"]).transform("max")).add_suffix("_share")).reset_index()


@drawn
def round_phases(table: pd.DataFrame, rounds: pd.DataFrame) -> Picture:
    """Stacked bars of :func:`fluxlib.analysis.runs.breakdown`, made of ``rounds``: a panel per model and task."""
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
    """Speed-up over FMD against the link's upload rate, one panel per model and task; a miss leaves no mark.

    ``table`` is the time to target of :func:`fluxlib.analysis.studies.scale.recounts`, link by link.
    """
    place = ["model", "task", "method", "link"]
    every = table.groupby(place, sort=False)["speedup_device_s"].agg(gmean).reset_index()
    rows = every.assign(mb_per_s=[8e-6 * catalogue.LINKS[name].up_bytes_per_s for name in every["link"]], seed=0)
    figure, places = facets(table, rows, ["model", "task"], 2.5, 2.6)
    looks = style.of_methods(table["method"])
    for ax, part in places:
        marks.lines(ax, part, "mb_per_s", "speedup_device_s", "method", looks, errorbar=None)
        ax.set(xscale="log", xlabel="upload (Mb/s)", ylabel="", ylim=(0, None))
    places[0][0].set_ylabel("speed-up over FMD")
    marks.legend(figure, looks, loc="outside right center")
    share = percent(table["target_fraction"].iloc[0])
    told = f"time to {share} of FMD's final score, geometric mean of all seeds"
    caption(figure, told, f"shapes of {unique(table, 'clock_model')}")
    return figure


@drawn
def scale_participants(rounds: pd.DataFrame) -> Picture:
    """Score over rounds and over device seconds, one row of panels per method, one line per number of participants."""
    if rounds.empty:
        return notice("No runs of this model with other numbers of participants.", rounds)
    shown = rounds.sort_values(["participants", "round"], kind="stable")
    asked, known = shown["participants_per_round"].astype(str), shown["participants"].astype(str)
    shown = shown.assign(crowd=asked.where(asked == known, asked + " of " + known))
    methods, looks = style.of_methods(shown["method"]), style.in_shades(shown["crowd"].unique())
    size = 6.4, 0.7 + 1.8 * len(methods)
    figure, axes = panels(rounds[CURVE], size, len(methods), 2, sharey=True, sharex="col", squeeze=False)
    score = METRICS.get(unique(shown, "metric_name"), "score")
    for ax, (method, clock) in zip(axes.flat, itertools.product(methods, ("round", "device_s")), strict=True):
        marks.curves(ax, shown[shown["method"] == method], clock, "crowd", looks, errorbar=None)
        ax.set(ylabel=f"{methods[method].title}: {score}")
        ax.label_outer()
    marks.legend(figure, looks, loc="outside right upper", title="participants\nin a round")
    footer(figure, shown)
    return figure


@drawn
def clock_check(table: pd.DataFrame) -> Picture:
    """Predicted beside measured seconds of each block of the study ``clock_check``, and the factor between them."""
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
    table["model"] = [Path(model).name for model in table["model"]]
    marks.bars(ax, table, "model", "gib", looks, by="method", fmt="{:.0f}")
    ax.set_ylabel("memory of a step (GiB)")
    marks.legend(figure, looks, filled=True, loc="outside right center")
    caption(figure, f"predicted, shapes of {clock_shapes(rounds)}", "offloading fills the device's memory")
    return figure


@drawn
def pays(table: pd.DataFrame, fraction: float = TARGET_FRACTION, ours: str = "flux") -> Picture:
    """The map: FLUX or FLUX+ over the best baseline that fits, memory of the device down, link across, by model.

    A thick line is the break-even. The name below a factor is the baseline that FLUX meets there. ``table`` is that of
    :func:`fluxlib.analysis.where.duels` for ``ours``.
    """
    if table.empty:
        why = "No runs of this model to make this map of."
        return notice(why, pd.DataFrame({"notice": [why]}))
    cells = where.over_tasks(table)
    figure, axes = _maps(cells.assign(text=cells.apply(_race, axis=1)), table, "factor", FACTORS, style.DIVERGING)
    for ax, factors in axes:
        _break_even(ax, factors.to_numpy())
    bar = figure.colorbar(mpl.cm.ScalarMappable(FACTORS, style.DIVERGING), ax=figure.axes, fraction=0.03, pad=0.02)
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["≤ 1/4", "1/2", "1", "2", "≥ 4"])
    bar.minorticks_off()
    bar.set_label(f"{title(ours)} sooner by this factor")
    races = f"time to {percent(fraction)} of FMD's final score", f"geometric mean over {unique(table, 'task')}"
    rule = f"{table['seed'].nunique()} seed(s)", "every method with the fastest of its stored budgets that fits"
    caption(figure, *races, *rule, f"≥: no baseline arrives · ≤: {title(ours)} does not · –: neither, or none fits")
    return figure


@drawn
def first(table: pd.DataFrame, fraction: float = TARGET_FRACTION) -> Picture:
    """The map of :func:`fluxlib.analysis.where.first`: memory of the device down, link across, by model."""
    known = methods_in_order(table["method"].dropna())
    colors = ListedColormap([sns.light_palette(style.METHODS[name].color, 4)[1] for name in known])  # text is dark
    numbers = {name: float(number) for number, name in enumerate(known)}
    cells = table.assign(number=table["method"].map(numbers), text=table.apply(_winner, axis=1))
    figure, _ = _maps(cells, cells, "number", BoundaryNorm(np.arange(len(known) + 1) - 0.5, colors.N), colors)
    rule = "of all stored runs that fit, with adapters (LoRA) or without", f"mean of {table['num_races'].max()} race(s)"
    caption(figure, f"first at {percent(fraction)} of FMD's final score", "device seconds", *rule, "–: nobody arrives")
    return figure


def _winner(cell: pd.Series) -> str:
    """Who it is, with or without adapters, and below it when."""
    if cell["seconds"] != cell["seconds"]:
        return "–"
    adapted = " LoRA" if cell["rank"] else ""
    return f"{title(cell['method'])}{adapted}\n{seconds(cell['seconds'])} s"


def _maps(
    cells: pd.DataFrame, table: pd.DataFrame, value: str, norm: Any, colors: Any
) -> tuple[Any, list[tuple[Any, pd.DataFrame]]]:
    """Panels by model, devices down and links across: ``value`` as colours, none where it is NaN, ``text`` in all."""
    models, devices, links = (list(pd.unique(cells[name])) for name in ("model", "device", "link"))
    figure, axes = panels(table, (1.6 + 3.3 * len(models), 3.4), 1, len(models), sharey=True, squeeze=False)
    grid, drawn_axes = pd.MultiIndex.from_product([devices, links]), []
    look = {"cbar": False, "linewidths": 0.5, "linecolor": "#bbbbbb", "annot_kws": {"fontsize": 7}}
    for ax, model in zip(axes[0], models, strict=True):
        own = cells[cells["model"] == model].set_index(["device", "link"]).reindex(grid)
        values, texts = own[value].unstack(sort=False), own["text"].fillna("–").unstack(sort=False)
        sns.heatmap(values, ax=ax, annot=texts, fmt="", norm=norm, cmap=colors, **look)
        for y, x in np.argwhere(values.isna().to_numpy()):  # seaborn writes in coloured cells only
            ax.text(x + 0.5, y + 0.5, texts.iloc[y, x], ha="center", va="center", fontsize=7)
        ax.set(xlabel="", ylabel="", title=Path(model).name)
        ax.grid(visible=False)
        ax.tick_params(length=0, rotation=0)
        ax.set_xticks(np.arange(len(links)) + 0.5, [catalogue.LINKS[name].title for name in links], fontsize=7)
        ax.set_yticks(np.arange(len(devices)) + 0.5, [memory_of(name) for name in devices], fontsize=7, rotation=0)
        drawn_axes.append((ax, values))
    return figure, drawn_axes


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
    for y, x in np.argwhere(np.abs(np.diff(above, axis=1)) == 1):
        ax.plot([x + 1, x + 1], [y, y + 1], color="black", linewidth=2)
    for y, x in np.argwhere(np.abs(np.diff(above, axis=0)) == 1):
        ax.plot([x, x + 1], [y + 1, y + 1], color="black", linewidth=2)
