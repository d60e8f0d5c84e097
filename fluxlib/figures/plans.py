"""Figures of a plan before anything is run: who shares a slot, what it needs, and how roles go over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, caption, drawn

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
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(0.6 + 0.52 * num_layers, 2.0)))
    left, right = top.subplots(1, 2, width_ratios=(1.0, 1.7))
    _activation(top, left, shares)
    draw_slots(right, plans, np.asarray(explored, dtype=bool))
    space, time = bottom.subplots(1, 2)
    title = f"GiB at the peak, on a device of {limit_gib:.0f}"
    _stacked(space, memory, MEMORY_COLORS, title)
    # A device that is many times larger than what it holds is named, not drawn.
    if limit_gib <= 2 * space.get_xlim()[1]:
        space.axvline(limit_gib, color="black", linestyle="--", linewidth=1.2)
        space.set_title(f"{title} (dashed)", loc="left")
    _stacked(time, seconds, style.PHASE_COLORS, "device seconds of the last round")
    caption(figure, *notes)
    return figure


@drawn
def slots(plans: Sequence[Any], explored: Any = None) -> Picture:
    """Which experts share a slot: one row per layer, one box per slot, the experts' numbers inside.

    Args:
        plans: one per MoE layer, with ``tuned``, ``groups`` and ``dropped``.
        explored: bool ``[layers, experts]``, or None: nobody is.
    """
    num_experts = len(plans[0].experts)
    marked = np.zeros((len(plans), num_experts), dtype=bool) if explored is None else np.asarray(explored, dtype=bool)
    figure = Picture(figsize=(min(11.0, 1.5 + 0.28 * num_experts), 0.9 + 0.42 * len(plans)))
    draw_slots(axes_grid(figure, 1, 1)[0, 0], plans, marked)
    return figure


def draw_slots(ax: Any, plans: Sequence[Any], explored: np.ndarray) -> None:
    """The picture of :func:`slots` on ``ax``."""
    from matplotlib.patches import Patch, Rectangle

    widest = 1.0
    for row, plan in enumerate(plans):
        alone = [group for group in plan.groups if len(group) == 1 and explored[row, group[0]]]
        shared = [group for group in plan.groups if group not in alone]
        left = 0.0
        for members, color, hatch, edge in (
            *(((expert,), TUNED, "", {}) for expert in plan.tuned),
            *((group, EXPLORED, "", DASHED) for group in alone),
            *((group, MERGED, "", {}) for group in shared),
            *(((expert,), "white", "xxx", {}) for expert in plan.dropped),
        ):
            look: dict[str, Any] = {"linewidth": 0.7} | edge
            ax.add_patch(Rectangle((left, row - 0.4), len(members), 0.8, facecolor=color, edgecolor="#333333",
                                   hatch=hatch, **look))  # fmt: skip
            for place, expert in enumerate(members):
                ax.text(left + place + 0.5, row, str(expert), ha="center", va="center", fontsize=_font(plans),
                        color="white" if color == TUNED else "black",
                        fontweight="bold" if color == TUNED else "normal")  # fmt: skip
            left += len(members) + GAP
        widest = max(widest, left)
    num_slots = sum(len(plan.tuned) + len(plan.groups) for plan in plans)
    num_experts = sum(len(plan.experts) for plan in plans)
    ax.set(xlim=(-0.3, widest), ylim=(len(plans) - 0.5, -0.5), xticks=[], yticks=range(len(plans)), ylabel="MoE layer")
    ax.set_title(f"{num_experts} experts in {num_slots} slots: a box is a slot", loc="left")
    ax.grid(visible=False)
    ax.spines["bottom"].set_visible(False)
    patches = [Patch(facecolor=color, edgecolor="#333333", label=name, **look) for name, color, look in _legend(plans)]
    ax.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=4, fontsize=7.5)


def _legend(plans: Sequence[Any]) -> list[tuple[str, str, dict[str, Any]]]:
    frozen = "merged, frozen" if any(len(group) > 1 for plan in plans for group in plan.groups) else "kept, frozen"
    found: list[tuple[str, str, dict[str, Any]]] = [("tuned", TUNED, {}), ("explored", EXPLORED, DASHED)]
    found.append((frozen, MERGED, {}))
    return found + [("dropped", "white", {"hatch": "xxx"})] * any(plan.dropped for plan in plans)


def _font(plans: Sequence[Any]) -> float:
    return 7.0 if len(plans[0].experts) <= 20 else 5.2


def _activation(figure: Any, ax: Any, shares: np.ndarray) -> None:
    image = ax.imshow(shares, cmap=style.SEQUENTIAL, vmin=0, aspect="auto")
    ax.set(xlabel="expert", ylabel="MoE layer", yticks=range(len(shares)))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_title(f"share of tokens (even: {1 / shares.shape[1]:.3f})", loc="left")
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax)


def _stacked(ax: Any, bars: Mapping[str, Mapping[str, float]], colors: Mapping[Any, str], label: str) -> None:
    """Horizontal stacked bars, one per entry of ``bars``, their sums behind them."""
    kinds = [kind for kind in colors if any(kind in parts for parts in bars.values())]
    kinds += [kind for parts in bars.values() for kind in parts if kind not in kinds]
    totals = {name: sum(parts.values()) for name, parts in bars.items()}
    hatches = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
    left = np.zeros(len(bars))
    for index, kind in enumerate(kinds):
        widths = np.array([parts.get(kind, 0.0) for parts in bars.values()])
        if widths.sum() > 0.002 * max(totals.values()):
            color, hatch = colors.get(kind, "#009E73"), hatches[index % len(hatches)]
            ax.barh(range(len(bars)), widths, 0.62, left=left, color=color, edgecolor="white", label=kind, hatch=hatch)
        left += widths
    for row, total in enumerate(totals.values()):
        ax.annotate(f" {total:.3g}", (total, row), va="center", fontsize=8)
    ax.set(yticks=range(len(bars)), ylim=(len(bars) - 0.5, -0.5))
    ax.set_yticklabels([style.method(name).title for name in bars])
    ax.set_xlim(0, 1.18 * max(*totals.values(), 1e-9))
    ax.set_title(label, loc="left")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, fontsize=7)


@drawn
def roles_over_rounds(tuned: Any, first_round: int = 1) -> Picture:
    """How many participants tuned each expert, round by round.

    Args:
        tuned: ``[rounds, layers, experts]`` counts.
        first_round: number of the first row.
    """
    counts = np.asarray(tuned, dtype=float)
    figure = Picture(figsize=(7.0, 1.4 + 0.16 * len(counts)))
    ax = axes_grid(figure, 1, 1)[0, 0]
    draw_roles(figure, ax, counts, first_round)
    return figure


def draw_roles(figure: Any, ax: Any, counts: np.ndarray, first_round: int) -> None:
    """The picture of :func:`roles_over_rounds` on ``ax``."""
    num_rounds, num_layers, num_experts = counts.shape
    last = first_round + num_rounds - 1
    image = ax.imshow(counts.reshape(num_rounds, -1), cmap=style.SEQUENTIAL, vmin=0, aspect="auto",
                      extent=(0, num_layers * num_experts, last + 0.5, first_round - 0.5))  # fmt: skip
    for layer in range(1, num_layers):
        ax.axvline(layer * num_experts, color="white", linewidth=1)
    middles = [(layer + 0.5) * num_experts for layer in range(num_layers)]
    ax.set_xticks(middles, [f"layer {layer}" for layer in range(num_layers)])
    ax.set_yticks(range(first_round, last + 1, max(1, num_rounds // 6)))
    ax.set(ylabel="round", xlabel=f"one column per expert, {num_experts} in each layer")
    ax.set_title("roles over rounds: how many participants tuned each expert", loc="left")
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax, pad=0.01).ax.yaxis.get_major_locator().set_params(integer=True)
