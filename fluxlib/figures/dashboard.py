"""Figures of one configuration or a few runs: before it is run, while it runs, and what ran when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.analysis.wording import METRICS, clock_shapes
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, caption, drawn, panels, unique
from fluxlib.records import PHASES

TUNED, EXPLORED, MERGED = style.METHODS["flux"].color, "#F0E442", "#DDE6EE"
DASHED = {"linewidth": 1.4, "linestyle": (0, (2, 1))}
"""Edge of an explored expert, which has the lightness of a merged one."""
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
    """Samples of each participant by label, as stacked bars.

    Args:
        histogram: one row per participant, one column per label; or one mapping label to count each.
    """
    counts = pd.DataFrame(histogram).fillna(0).rename_axis("participant")
    figure, ax = panels(counts, (7.0, 2.6))
    looks = style.in_shades(sorted(counts.columns))
    rows = counts.reset_index().melt("participant", var_name="label", value_name="samples")
    marks.stacked(ax, rows, "participant", "label", "samples", looks)
    ax.set(xlabel="participant", ylabel="samples", xticks=range(len(counts)))
    if len(looks) <= 16:
        marks.legend(ax, looks.values(), True, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
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

    Args:
        frequency: ``[layers, experts]`` shares of tokens.
        plans: one per MoE layer, with ``tuned``, ``groups`` and ``dropped``.
        explored: bool ``[layers, experts]``: experts kept as they are, and probed.
        memory: GiB by kind, for each method that is compared.
        limit_gib: memory of the device.
        seconds: device seconds by phase, for each method that is compared.
        notes: for the caption.
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
    _draw_sums(time, seconds, style.PHASE_COLORS)
    time.set_title("device seconds of the last round", loc="left")
    caption(figure, *notes)
    return figure


def _draw_sums(ax: Any, sums: Mapping[str, Mapping[str, float]], colors: Mapping[str, str]) -> None:
    """Horizontal stacked bars, one per method, without parts too small to be seen."""
    rows = pd.DataFrame([(name, kind, size) for name, parts in sums.items() for kind, size in parts.items()],
                        columns=["method", "kind", "size"])  # fmt: skip
    largest = rows.groupby("kind")["size"].max()
    seen = [
        kind for kind in {**colors, **dict.fromkeys(rows["kind"])} if largest.get(kind, 0.0) > 0.001 * largest.max()
    ]
    looks = {kind: style.Style(kind, colors.get(kind, "#009E73"), "", "", style.SETTINGS[i % 7].hatch)
             for i, kind in enumerate(seen)}  # fmt: skip
    methods = {name: style.method(name) for name in sums}
    marks.stacked(ax, rows, "method", "kind", "size", looks, methods, total="{:.3g}", horizontal=True)
    marks.legend(ax, looks.values(), True, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, fontsize=7)


@drawn
def slots(plans: Sequence[Any], explored: Any = None) -> Picture:
    """Which experts share a slot: one row per layer, one box per slot, the experts' numbers inside.

    Args:
        plans: one per MoE layer, with ``tuned``, ``groups`` and ``dropped``.
        explored: bool ``[layers, experts]``, or None: nobody is.
    """
    num_experts = len(plans[0].experts)
    marked = np.zeros((len(plans), num_experts), dtype=bool) if explored is None else np.asarray(explored, dtype=bool)
    size = min(11.0, 1.5 + 0.28 * num_experts), 0.9 + 0.42 * len(plans)
    figure, ax = panels(pd.DataFrame(marked), size)
    _draw_slots(ax, plans, marked)
    return figure


def _draw_slots(ax: Any, plans: Sequence[Any], explored: np.ndarray) -> None:
    from matplotlib.patches import Patch, Rectangle

    widest, small = 1.0, 7.0 if len(plans[0].experts) <= 20 else 5.2
    for row, plan in enumerate(plans):
        alone = [group for group in plan.groups if len(group) == 1 and explored[row, group[0]]]
        boxes: list[tuple[Any, str, dict[str, Any]]] = [((expert,), TUNED, {}) for expert in plan.tuned]
        boxes += [(group, EXPLORED, DASHED) for group in alone]
        boxes += [(group, MERGED, {}) for group in plan.groups if group not in alone]
        boxes += [((expert,), "white", {"hatch": "xxx"}) for expert in plan.dropped]
        left = 0.0
        for members, color, look in boxes:
            edge: dict[str, Any] = {"edgecolor": "#333333", "linewidth": 0.7} | look
            ax.add_patch(Rectangle((left, row - 0.4), len(members), 0.8, facecolor=color, **edge))
            text: dict[str, Any] = {"color": "white", "fontweight": "bold"} if color == TUNED else {}
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
    named: dict[str, dict[str, Any]] = {"tuned": {"facecolor": TUNED}, "explored": {"facecolor": EXPLORED} | DASHED}
    named["merged, frozen" if merged else "kept, frozen"] = {"facecolor": MERGED}
    if any(plan.dropped for plan in plans):
        named["dropped"] = {"facecolor": "white", "hatch": "xxx"}
    patches = [Patch(edgecolor="#333333", label=name, **look) for name, look in named.items()]
    ax.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=4, fontsize=7.5)


# Meanwhile and afterwards


@drawn
def curves(
    runs: Mapping[str, pd.DataFrame],
    clocks: tuple[str, ...] = ("device_s", "wall_s"),
    target: float | None = None,
    roles: Any = None,
    first_round: int = 1,
) -> Picture:
    """Score over time, one line per run, one panel per clock; below them roles over rounds where there are some.

    Args:
        runs: label to ``rounds`` table of one run.
        clocks: columns of ``rounds`` to draw over.
        target: drawn as a line.
        roles: ``[rounds, layers, experts]``, how many participants tuned each expert.
        first_round: of ``roles``.
    """
    with_roles = roles is not None and len(roles) > 0
    figure = Picture(figsize=(4.2 * len(clocks), 3.0 + 2.1 * with_roles))
    parts = np.asarray(figure.subfigures(2, 1, height_ratios=(2.9, 2.1))) if with_roles else (figure, None)
    upper, lower = parts
    axes = upper.subplots(1, len(clocks), squeeze=False)[0]
    every = [run.assign(run=label, seed=0) for label, run in runs.items() if len(run)]
    figure.numbers = pd.concat(every) if every else pd.DataFrame()
    looks = _looks(runs)
    for ax, clock in zip(axes, clocks, strict=True):
        ax.set(xlabel=style.CLOCKS[clock], ylabel="score")
        if every:
            scored = figure.numbers.dropna(subset=["metric"])
            marks.lines(ax, scored, clock, "metric", "run", looks, errorbar=None, markevery=max(1, len(scored) // 40))
            ax.set(xlabel=style.CLOCKS[clock], ylabel=METRICS.get(str(every[0]["metric_name"].iloc[0]), "score"))
        if target is not None:
            ax.axhline(target, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
            ax.annotate(f"target {target:.3f}", (0.01, target), xycoords=ax.get_yaxis_transform(), ha="left",
                        va="bottom", fontsize=7)  # fmt: skip
    if runs:
        marks.legend(upper, looks.values(), loc="outside upper center", ncols=2, fontsize=7)
    if lower is not None:
        _draw_roles(lower.subplots(), np.asarray(roles), first_round)
    shapes = "; ".join(dict.fromkeys(map(clock_shapes, every)))
    caption(figure, f"device clock: shapes of {shapes}" if shapes else "", "one line is one run: no band")
    return figure


def _looks(runs: Mapping[str, pd.DataFrame]) -> dict[str, style.Style]:
    """A method's own look for its first run, spare ones for its others."""
    found: dict[str, style.Style] = {}
    seen: set[str] = set()
    spare = 0
    for label, run in runs.items():
        method = str(run["method"].iloc[0]) if len(run) else ""
        look = style.method(method)
        if method in seen:
            look = style.SETTINGS[2:][spare % 5]
            spare += 1
        seen.add(method)
        found[label] = replace(look, title=label)
    return found


def _draw_roles(ax: Any, counts: np.ndarray, first_round: int) -> None:
    """How many participants tuned each expert: ``counts`` ``[rounds, layers, experts]``."""
    num_rounds, num_layers, num_experts = counts.shape
    rounds = np.arange(0, num_rounds, max(1, num_rounds // 6))
    marks.heat(ax, counts.reshape(num_rounds, -1), "", xticklabels=False, yticklabels=False)
    ax.vlines(np.arange(1, num_layers) * num_experts, 0, num_rounds, color="white", linewidth=1)
    ax.set_xticks((np.arange(num_layers) + 0.5) * num_experts, [f"layer {layer}" for layer in range(num_layers)])
    ax.set_yticks(rounds + 0.5, rounds + first_round)
    ax.set(ylabel="round", xlabel=f"one column per expert, {num_experts} in each layer")
    ax.set_title("roles over rounds: how many participants tuned each expert", loc="left")


@drawn
def phases(participants: pd.DataFrame) -> Picture:
    """Where each round's time goes on the device clock, for its slowest participant.

    Args:
        participants: the ``participants`` table of one run; refused replies are left out.
    """
    columns = {f"{phase}_device_s": phase for phase in PHASES}
    accepted = participants.loc[participants["rejected"] == ""]
    slowest = accepted.loc[accepted[list(columns)].sum(axis=1).groupby(accepted["round"]).idxmax()]
    rows = slowest[["round", *columns]].rename(columns=columns).melt("round", var_name="phase", value_name="seconds")
    rows = rows[rows["seconds"] > 0]
    figure, ax = panels(rows, (7.0, 2.6))
    looks = style.of_phases(rows["phase"])
    marks.stacked(ax, rows, "round", "phase", "seconds", looks)
    ax.set(xlabel="round", ylabel=style.CLOCKS["device_s"])
    ax.xaxis.get_major_locator().set_params(integer=True)
    marks.legend(ax, looks.values(), True, loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption(figure, unique(participants, "run_id"), "profiles for the next round run beside upload and server")
    return figure
