"""Figures of one configuration or a few runs: before it is run, while it runs, and what ran when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Patch, Rectangle

from fluxlib.analysis.runs import slowest
from fluxlib.analysis.wording import METRICS, clock_shapes
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, caption, drawn, panels, unique
from fluxlib.records import PHASES

TUNED, MERGED, EDGE = style.METHODS["flux"].color, "#DDE6EE", {"edgecolor": "#333333", "linewidth": 0.7}
SLOTS: dict[str, dict[str, Any]] = {
    "tuned": EDGE | {"facecolor": TUNED},
    "explored": EDGE | {"facecolor": "#F0E442", "linewidth": 1.4, "linestyle": (0, (2, 1))},
    "frozen": EDGE | {"facecolor": MERGED},
    "dropped": EDGE | {"facecolor": "white", "hatch": "xxx"},
}
"""How slots are drawn; explored experts have the lightness of merged ones, so their edge is dashed."""
MEMORY_COLORS = {
    "other weights": "#999999",
    "tuned experts": TUNED,
    "frozen experts": MERGED,
    "gradients": "#E69F00",
    "optimizer state": "#CC79A7",
    "activations": "#0072B2",
}
"""Kinds of memory, in the order in which they are stacked."""
GAP = 0.35
"""Space between two slots, in widths of an expert."""


# Before


@drawn
def partition(histogram: pd.DataFrame | Sequence[Mapping[str, int]]) -> Picture:
    """Samples of each participant (a row or mapping each) by label (a column each), as stacked bars."""
    counts = pd.DataFrame(histogram).fillna(0).rename_axis("participant")
    figure, ax = panels(counts, (7.0, 2.6))
    looks = style.in_shades(sorted(counts.columns))
    rows = counts.reset_index().melt("participant", var_name="label", value_name="samples")
    marks.stacked(ax, rows, "participant", "label", "samples", looks)
    ax.set(xlabel="participant", ylabel="samples", xticks=range(len(counts)))
    if len(looks) <= 16:
        marks.legend(ax, looks, True, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    return figure


@drawn
def overview(
    frequency: Any,
    plans: Sequence[Any],
    explored: Any,
    memory: Mapping[str, Mapping[str, float]],
    limit_gib: float,
    seconds: Mapping[str, Mapping[str, float]],
    notes: Sequence[str] = (),
) -> Picture:
    """A configuration on one page: activation, the merge plan, predicted memory and predicted time of a round.

    ``frequency`` and ``explored`` are ``[layers, experts]``: shares of tokens; experts kept as they are, and probed.
    ``memory`` and ``seconds``: GiB by kind, device seconds by phase, for each method. ``notes`` go to the caption.
    """
    shares = np.asarray(frequency, dtype=float)
    num_layers, num_experts = shares.shape
    figure = Picture(figsize=(9.0, 3.0 + 0.52 * num_layers))
    figure.numbers = pd.DataFrame(shares)
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(0.6 + 0.52 * num_layers, 2.0)))
    left, right = top.subplots(1, 2, width_ratios=(1.0, 1.7))
    marks.heat(left, shares, "", xticklabels=max(1, num_experts // 8))
    left.set(xlabel="expert", ylabel="MoE layer")
    left.set_title(f"share of tokens (even: {1 / num_experts:.3f})", loc="left")
    _draw_slots(right, plans, np.asarray(explored, dtype=bool))
    space, time = bottom.subplots(1, 2)
    _draw_sums(space, memory, MEMORY_COLORS)
    title = f"GiB at the peak, on a device of {limit_gib:.0f}"
    # A device that is many times larger than what it holds is named, not drawn.
    if limit_gib <= 2 * space.get_xlim()[1]:
        space.axvline(limit_gib, color="black", linestyle="--", linewidth=1.2)
        title += " (dashed)"
    space.set_title(title, loc="left")
    _draw_sums(time, seconds, {name: look.color for name, look in style.PHASES.items()})
    time.set_title("device seconds of the last round", loc="left")
    caption(figure, *notes)
    return figure


def _draw_sums(ax: Any, sums: Mapping[str, Mapping[str, float]], colors: Mapping[str, str]) -> None:
    """Horizontal stacked bars, one per method, without parts too small to be seen."""
    rows = pd.DataFrame(sums).rename_axis("kind").reset_index().melt("kind", var_name="method", value_name="size")
    largest = rows.groupby("kind", sort=False)["size"].max()
    seen = set(largest.index[largest > 0.001 * largest.max()])
    looks = style.colored({kind: color for kind, color in colors.items() if kind in seen})
    methods = {name: style.method(name) for name in sums}
    marks.stacked(ax, rows.dropna(), "method", "kind", "size", looks, methods, total="{:.3g}", horizontal=True)
    marks.legend(ax, looks, True, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, fontsize=7)


@drawn
def slots(plans: Sequence[Any], explored: Any = None) -> Picture:
    """Which experts share a slot: one row per layer, one box per slot, the experts' numbers inside.

    ``plans`` one per MoE layer; ``explored`` bool ``[layers, experts]``, or None: nobody is.
    """
    shape = len(plans), len(plans[0].experts)
    marked = np.zeros(shape, dtype=bool) if explored is None else np.asarray(explored, dtype=bool)
    figure, ax = panels(pd.DataFrame(marked), (min(11.0, 1.5 + 0.28 * shape[1]), 0.9 + 0.42 * shape[0]))
    _draw_slots(ax, plans, marked)
    return figure


def _draw_slots(ax: Any, plans: Sequence[Any], explored: np.ndarray) -> None:
    widest, small = 1.0, 7.0 if len(plans[0].experts) <= 20 else 5.2
    for row, plan in enumerate(plans):
        kinds = ["explored" if len(group) == 1 and explored[row, group[0]] else "frozen" for group in plan.groups]
        boxes: list[tuple[str, Sequence[int]]] = [("tuned", (expert,)) for expert in plan.tuned]
        boxes += sorted(zip(kinds, plan.groups, strict=True), key=lambda box: box[0])
        boxes += [("dropped", (expert,)) for expert in plan.dropped]
        left = 0.0
        for kind, members in boxes:
            ax.add_patch(Rectangle((left, row - 0.4), len(members), 0.8, **SLOTS[kind]))
            text: dict[str, Any] = {"color": "white", "fontweight": "bold"} if kind == "tuned" else {}
            for place, expert in enumerate(members):
                ax.text(left + place + 0.5, row, str(expert), ha="center", va="center", fontsize=small, **text)
            left += len(members) + GAP
        widest = max(widest, left)
    num_slots = sum(len(plan.tuned) + len(plan.groups) for plan in plans)
    num_experts = sum(len(plan.experts) for plan in plans)
    ax.set(xlim=(-0.3, widest), ylim=(len(plans) - 0.5, -0.5), xticks=[], yticks=range(len(plans)), ylabel="MoE layer")
    ax.set_title(f"{num_experts} experts in {num_slots} slots: a box is a slot", loc="left")
    ax.grid(visible=False)
    ax.spines["bottom"].set_visible(False)
    merged = any(len(group) > 1 for plan in plans for group in plan.groups)
    titles = {"tuned": "tuned", "explored": "explored", "frozen": "merged, frozen" if merged else "kept, frozen"}
    titles |= {"dropped": "dropped"} if any(plan.dropped for plan in plans) else {}
    patches = [Patch(label=title, **SLOTS[kind]) for kind, title in titles.items()]
    ax.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=4, fontsize=7.5)


# Meanwhile and afterwards


@drawn
def curves(runs: Mapping[str, pd.DataFrame], target: float) -> Picture:
    """Score over time, one line per run (label to ``rounds``), one panel per clock, the target as a line."""
    every = [run.assign(run=label, seed=0) for label, run in runs.items()]
    clocks, looks = ("device_s", "wall_s"), _looks(runs)
    figure, axes = panels(pd.concat(every), (8.4, 3.0), 1, 2)
    scored = figure.numbers.dropna(subset=["metric"])
    for ax, clock in zip(axes, clocks, strict=True):
        marks.lines(ax, scored, clock, "metric", "run", looks, errorbar=None, markevery=max(1, len(scored) // 40))
        ax.set(xlabel=style.CLOCKS[clock], ylabel=METRICS.get(every[0]["metric_name"].iloc[0], "score"))
        marks.reference(ax, target, f"target {target:.3f}")
    marks.legend(figure, looks, loc="outside upper center", ncols=2, fontsize=7)
    shapes = "; ".join(dict.fromkeys(map(clock_shapes, every)))
    caption(figure, f"device clock: shapes of {shapes}", "one line is one run: no band")
    return figure


def _looks(runs: Mapping[str, pd.DataFrame]) -> dict[str, style.Style]:
    """A method's own look for its first run, spare ones for its others."""
    methods = [str(run["method"].iloc[0]) for run in runs.values()]
    spare = [style.SETTINGS[2 + place % 5] for place in range(len(methods))]
    looks = [spare[i] if method in methods[:i] else style.method(method) for i, method in enumerate(methods)]
    return {label: replace(look, title=label) for label, look in zip(runs, looks, strict=True)}


@drawn
def phases(participants: pd.DataFrame) -> Picture:
    """Where each round's time of one run goes on the device clock, for its slowest participant."""
    rows = slowest(participants).melt("round", list(PHASES), "phase", "seconds").query("seconds > 0")
    figure, ax = panels(rows, (7.0, 2.6))
    looks = style.of_phases(rows["phase"])
    marks.stacked(ax, rows, "round", "phase", "seconds", looks)
    ax.set(xlabel="round", ylabel=style.CLOCKS["device_s"])
    ax.xaxis.get_major_locator().set_params(integer=True)
    marks.legend(ax, looks, True, loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption(figure, unique(participants, "run_id"), "profiles for the next round run beside upload and server")
    return figure
