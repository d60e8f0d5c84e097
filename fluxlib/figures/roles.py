"""Figures of section 6: which experts get tuned, and what comes of assigning them by one rule or another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, caption, clock_shapes, drawn, interval_name, unique
from fluxlib.figures.role_tables import coverage, load

LOOKS = (
    ("#D55E00", "o", "-", ""),
    ("#0072B2", "s", "--", "//"),
    ("#009E73", "^", "-.", ".."),
    ("#CC79A7", "D", ":", "xx"),
    ("#56B4E9", "v", (0, (5, 1)), "\\\\"),
    ("#E69F00", "P", (0, (1, 1)), "++"),
    ("#000000", "X", (0, (3, 1, 1, 1)), "oo"),
)
"""Colour, marker, line and hatch of settings, in the order in which they are named."""


def looks_of(settings: pd.Series) -> dict[str, tuple[Any, ...]]:
    """The look of each setting, in the order of its first row."""
    names = list(pd.unique(settings))
    return {name: LOOKS[i % len(LOOKS)] for i, name in enumerate(names)}


def about(frame: pd.DataFrame) -> list[str]:
    """Model, task and seeds, for a caption."""
    seeds = frame["seed"].nunique()
    return [f"{unique(frame, 'model')}, {unique(frame, 'task')}", interval_name(seeds)]


@drawn
def role_map(roles: pd.DataFrame, num_experts: int, participants: Sequence[int] = (0, 1, 2, 3)) -> Picture:
    """Which experts some participants tuned and explored, round by round: one map per participant.

    Args:
        roles: of :func:`~fluxlib.figures.role_tables.roles_table`, one run.
        num_experts: experts per layer.
    """
    shown = [p for p in participants if p in set(roles["participant"])]
    num_layers, num_rounds = int(roles["layer"].max()) + 1, int(roles["round"].max())
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Picture(figsize=(3.7 * columns, 0.7 + rows * max(1.7, 0.024 * num_layers * num_experts)))
    axes = axes_grid(figure, rows, columns, sharex=True, sharey=True)
    colors = ["#FFFFFF", "#F0C36D", LOOKS[0][0]]
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    for ax, participant in zip(axes.flat, shown, strict=False):
        grid = np.zeros((num_layers * num_experts, num_rounds))
        mine = roles[roles["participant"] == participant]
        for role, level in (("explored", 1), ("exploited", 2)):
            part = mine[mine["role"] == role]
            grid[part["layer"] * num_experts + part["expert"], part["round"] - 1] = level
        ax.imshow(grid, cmap=ListedColormap(colors), vmin=0, vmax=2, aspect="auto", interpolation="nearest",
                  extent=(0.5, num_rounds + 0.5, num_layers * num_experts, 0))  # fmt: skip
        for layer in range(1, num_layers):
            ax.axhline(layer * num_experts, color="black", linewidth=0.7)
        ax.set_yticks([(layer + 0.5) * num_experts for layer in range(num_layers)], [str(i) for i in range(num_layers)])
        ax.set_title(f"participant {participant}")
        ax.grid(visible=False)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("round")
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel(f"MoE layer ({num_experts} experts each)", fontsize=9)
    names = ("merged", "explored", "tuned")
    handles = [
        Patch(facecolor=c, edgecolor="black", linewidth=0.5, label=n) for c, n in zip(colors, names, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3)
    return figure


@drawn
def role_convergence(
    rounds: pd.DataFrame, clocks: Sequence[str] = ("round", "device_s"), varied: str = "assignment"
) -> Picture:
    """Score and test loss of runs that differ in one setting, over rounds and over the device clock.

    Args:
        rounds: the ``rounds`` table of runs of one model and task, with the column ``setting``.
        varied: what the settings are settings of, for the legend.
    """
    figure = Picture(figsize=(3.7 * len(clocks), 4.6))
    axes = axes_grid(figure, 2, len(clocks), sharex="col", sharey="row")
    looks = looks_of(rounds["setting"])
    scored = rounds.dropna(subset=["metric"])
    metric = style.METRICS.get(unique(rounds, "metric_name"), "score")
    for row, (column, title) in enumerate((("metric", metric), ("loss", "test loss"))):
        for ax, clock in zip(axes[row], clocks, strict=True):
            for name, (color, marker, line, _) in looks.items():
                mine = scored[scored["setting"] == name]
                mean = mine.groupby("round", as_index=False)[["device_s", "wall_s", column]].mean()
                ax.plot(mean[clock], mean[column], color=color, marker=marker, linestyle=line, label=name,
                        markevery=max(1, len(mean) // 6))  # fmt: skip
                for _, run in mine.groupby("seed") if mine["seed"].nunique() > 1 else ():
                    ax.plot(run[clock], run[column], color=color, linewidth=0.6, alpha=0.45, zorder=1)
        axes[row, 0].set_ylabel(title)
    for ax, clock in zip(axes[1], clocks, strict=True):
        ax.set_xlabel(style.CLOCKS[clock])
    axes[1, 0].legend(fontsize=8, title=varied, title_fontsize=8)
    seeds = rounds["seed"].nunique()
    shown = f"{seeds} seeds: mean, and each one thin" if seeds > 1 else "1 seed"
    caption(figure, about(rounds)[0], shown, f"device clock: shapes of {clock_shapes(rounds)}")
    return figure


@drawn
def role_ablation(outcome: pd.DataFrame, rounds: pd.DataFrame) -> Picture:
    """Final score, rounds and device seconds to target, one bar per setting, one mark per seed.

    Args:
        outcome: of :func:`~fluxlib.figures.role_tables.outcomes`.
        rounds: the table it is made of, for the caption.
    """
    panels = {"final_metric": "final score", "round": "rounds to target", "device_s": "device seconds to target"}
    figure = Picture(figsize=(8.2, 2.8))
    axes = axes_grid(figure, 1, len(panels))[0]
    looks = looks_of(outcome["setting"])
    for ax, (column, title) in zip(axes, panels.items(), strict=True):
        for place, (name, (color, _, _, hatch)) in enumerate(looks.items()):
            values = outcome.loc[outcome["setting"] == name, column].to_numpy(dtype=float)
            reached = values[~np.isnan(values)]
            missed = len(values) - len(reached)
            if column == "final_metric":  # a bar would have to begin at 0
                ax.plot([place - 0.3, place + 0.3], [values.mean()] * 2, color=color, linewidth=3)
            elif not missed:
                ax.bar(place, values.mean(), 0.7, color=color, hatch=hatch, edgecolor="white")
            else:
                ax.annotate(f"not reached: {missed}/{len(values)}", (place, 0), (0, 4), textcoords="offset points",
                            rotation=90, ha="center", va="bottom", fontsize=7)  # fmt: skip
            spots = place + np.linspace(-0.12, 0.12, len(reached)) if len(reached) > 1 else [place] * len(reached)
            if len(values) > 1 or column == "final_metric":
                ax.plot(spots, reached, "o", color="black", markersize=3, markerfacecolor="white", linestyle="none")
        ax.set_xticks(range(len(looks)), list(looks), rotation=30, ha="right")
        ax.set(title=title, xlim=(-0.6, len(looks) - 0.4))
        ax.grid(axis="x", visible=False)
    target, share = outcome["target"].iloc[0], outcome["target_fraction"].iloc[0]
    axes[0].axhline(target, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
    seeds = outcome["seed"].nunique()
    dashed = f"dashed: target, {share:.0%} of {outcome['setting'].iloc[0]}'s mean final score".replace("%", " %")
    marks = f"{seeds} seeds: bars and lines are means, marks single seeds" if seeds > 1 else "1 seed"
    caption(figure, about(rounds)[0], f"{dashed}\n{marks}", f"device clock: shapes of {clock_shapes(rounds)}")
    return figure


@drawn
def role_coverage(roles: pd.DataFrame, rounds: pd.DataFrame) -> Picture:
    """How many experts anybody has tuned so far, and how evenly the tuning is spread over experts.

    Args:
        roles: of :func:`~fluxlib.figures.role_tables.roles_table`.
        rounds: the ``rounds`` table of the same runs.
    """
    figure = Picture(figsize=(7.4, 2.8))
    left, right = axes_grid(figure, 1, 2)[0]
    num_experts = int(rounds["num_experts"].max())
    covered, loads = coverage(roles, num_experts), load(roles, num_experts)
    for name, (color, marker, line, _) in looks_of(roles["setting"]).items():
        part = covered[covered["setting"] == name].groupby("round")["covered_frac"].mean()
        left.plot(part.index, 100 * part, color=color, marker=marker, linestyle=line, label=name,
                  markevery=max(1, len(part) // 6))  # fmt: skip
        share = loads[loads["setting"] == name].groupby("rank")["share"].mean().cumsum()
        right.plot(100 * (share.index + 1) / num_experts, 100 * share, color=color, marker=marker, linestyle=line,
                   markevery=max(1, len(share) // 6), label=name)  # fmt: skip
    right.plot([0, 100], [0, 100], color="black", linewidth=0.8)
    left.set(xlabel="round", ylabel="experts tuned so far (%)", ylim=(0, 103))
    right.set(xlabel="experts, most tuned first (%)", ylabel="share of all tunings (%)", xlim=(0, 100), ylim=(0, 103))
    right.annotate("even", (62, 62), (4, -10), textcoords="offset points", fontsize=7)
    right.legend(fontsize=7, loc="lower right")
    seeds = rounds["seed"].nunique()
    caption(figure, about(rounds)[0], f"mean of {seeds} seeds" if seeds > 1 else "1 seed")
    return figure
