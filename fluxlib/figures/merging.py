"""Figures of section 5: what merging costs, and what makes it cost less."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, drawn, interval
from fluxlib.figures.measured import (
    COLORS,
    HATCHES,
    MARKERS,
    bars,
    curve,
    footer,
    legend_below,
    lines,
    per_seed,
    shades,
    study,
)
from fluxlib.records import PHASES

KINDS = {
    "single": "one slot",
    "uniform": "uniform",
    "adaptive": "adaptive\n(eq. 1)",
    "joint + squared gate": "joint",
}
OPTIONS = {
    "weights: mean": "mean of experts",
    "weights: frequency": "frequency",
    "weights: attention x frequency": "attention x frequency (eq. 2)",
    "weights: squared gate": "squared gate",
    "aligned": "eq. 2, neurons aligned",
    "joint + squared gate": "joint, squared gate",
    "joint + squared gate + aligned": "joint, squared gate, aligned",
}  # fmt: skip


@drawn
def discarding(table: pd.DataFrame) -> Picture:
    """Error, and distance from the full model's predictions, when what is not tuned is dropped or merged."""
    error, apart = study(table, "error"), study(table, "divergence")
    names = {
        "discarded": "dropped",
        "single": "one slot\nper layer",
        "adaptive": "merged\n(paper)",
        "joint + squared gate": "merged\n(joint)",
    }
    figure = Picture(figsize=(7.6, 2.7))
    left, right = axes_grid(figure, 1, 2)[0]
    bars(left, _renamed(error, names), list(names.values()))
    left.set(ylabel="error of the last hidden state")
    bars(right, _renamed(apart, names), list(names.values()))
    right.set(ylabel="divergence (nats/token)")
    footer(figure, error, "before any training")
    return figure


@drawn
def error_growth(table: pd.DataFrame) -> Picture:
    """How the error of one merged layer travels, and how errors of all layers accumulate."""
    rows, total = study(table, "growth"), study(table, "accumulated")
    figure = Picture(figsize=(7.6, 2.7))
    left, right = axes_grid(figure, 1, 2, sharey=True)[0]
    merged = sorted(rows["x"].unique())
    for index, (layer, shade) in enumerate(zip(merged, shades(len(merged)), strict=True)):
        own = rows[rows["x"] == layer]
        label = f"layer {layer:.0f}"
        curve(left, own, "layer", band="range", color=shade, marker=MARKERS[index % len(MARKERS)], label=label)
    left.set(xlabel="after MoE layer", ylabel="error of the hidden state", xticks=merged, yscale="log", ylim=(3e-4, 2))
    left.legend(title="merged alone", fontsize=7, title_fontsize=7)
    lines(right, total, ["discarded", "merged"], "layer", ["all layers: dropped", "all layers: merged"], "range")
    right.set(xlabel="after MoE layer", xticks=merged)
    right.legend(fontsize=7)
    footer(figure, rows, "uniform budgets, errors under 3e-4 not drawn", band="range")
    return figure


@drawn
def attention_frequency(table: pd.DataFrame) -> Picture:
    """Attention received by an expert's tokens over its frequency, one panel per layer; first task and seed."""
    both = pd.concat([study(table, "activation"), study(table, "attention")])
    first = both[(both["task"] == both["task"].iloc[0]) & (both["seed"] == both["seed"].iloc[0])]
    wide = first.pivot_table(index=["layer", "expert"], columns="study", values="value").reset_index()
    wide = wide[wide["activation"] > 0]
    layers = sorted(wide["layer"].unique())
    figure = Picture(figsize=(max(5.0, 1.9 * len(layers)), 2.5))
    axes = axes_grid(figure, 1, len(layers), sharey=True)[0]
    for ax, layer in zip(axes, layers, strict=True):
        own = wide[wide["layer"] == layer]
        rare = (own["activation"] < own["activation"].median()) & (own["attention"] > own["attention"].median())
        for chosen, color, marker in ((~rare, "#0072B2", "o"), (rare, "#D55E00", "^")):
            ax.scatter(own["activation"][chosen], own["attention"][chosen], c=color, marker=marker, s=18)
        correlation = own["activation"].rank().corr(own["attention"].rank())
        ax.set_title(f"layer {layer:.0f}: rank corr. {correlation:+.2f}", fontsize=8)
        ax.set(xlabel="frequency")
    axes[0].set(ylabel="attention received")
    footer(figure, first, "first task and seed; triangles: rarer than the median, attended to more")
    return figure


@drawn
def layer_budgets(table: pd.DataFrame) -> Picture:
    """Slots of each layer by rule, and the error each rule leaves."""
    slots, error = study(table, "budgets"), study(table, "error")
    kinds = ["single", "uniform", "adaptive", "joint"]
    figure = Picture(figsize=(7.6, 2.9))
    left, right = axes_grid(figure, 1, 2)[0]
    layers = sorted(slots["layer"].unique())
    for index, kind in enumerate(kinds):
        heights = [per_seed(slots[(slots["setting"] == kind) & (slots["layer"] == layer)]).mean() for layer in layers]
        x = np.arange(len(layers)) + (index - 1.5) * 0.2
        left.bar(
            x,
            heights,
            0.2,
            color=COLORS[index],
            hatch=HATCHES[index],
            edgecolor="white",
            label=KINDS.get(kind, kind).replace("\n", " "),
        )
    left.set(xlabel="MoE layer", ylabel="merged slots, mean", xticks=range(len(layers)))
    left.grid(axis="x", visible=False)
    left.legend(fontsize=7)
    bars(right, _renamed(error, KINDS), list(KINDS.values()))
    right.set(ylabel="error of the last hidden state")
    footer(figure, error, "'joint' on the right with squared gate weights")
    return figure


@drawn
def clustering_time(table: pd.DataFrame) -> Picture:
    """Milliseconds of clustering layer by layer and at once, and how many times faster the latter is."""
    rows = study(table, "clustering_seconds")
    medians = rows.groupby(["setting", "seed"], sort=False)["value"].median()
    shapes = list(dict.fromkeys(setting.split(",")[0] for setting in medians.index.get_level_values(0)))
    figure = Picture(figsize=(6.0, 2.9))
    ax = axes_grid(figure, 1, 1)[0, 0]
    for index, (method, label) in enumerate((("per layer", "scikit-learn, layer by layer"), ("fused", "fused"))):
        found = np.array([interval(1e3 * medians[f"{shape}, {method}"].to_numpy()) for shape in shapes])
        x = np.arange(len(shapes)) + (index - 0.5) * 0.36
        error = np.abs(found[:, 1:].T - found[:, 0]) if rows["seed"].nunique() > 1 else None
        ax.bar(
            x,
            found[:, 0],
            0.36,
            yerr=error,
            color=COLORS[index],
            hatch=HATCHES[index],
            edgecolor="white",
            capsize=2,
            label=label,
        )
        for place, height, top in zip(x, found[:, 0], found[:, 2], strict=True):
            ax.annotate(f"{height:.3g} ms", (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    for place, shape in enumerate(shapes):
        ratio = (medians[f"{shape}, per layer"] / medians[f"{shape}, fused"]).mean()
        ax.text(place, 0.86, f"{ratio:.0f} times", transform=ax.get_xaxis_transform(), ha="center", fontsize=9)
    ax.set_xticks(range(len(shapes)), shapes)
    ax.set_yscale("log")
    ax.set_ylim(top=ax.get_ylim()[1] * 8)
    ax.set_ylabel("processor time (ms)")
    ax.grid(axis="x", visible=False)
    legend_below(figure, ax, 2)
    footer(figure, rows.assign(model="random experts"), "medians, in turns", "paper: 40 times")
    return figure


@drawn
def merge_options(table: pd.DataFrame) -> Picture:
    """Error of merge weights and of what goes beyond the paper, as a share of the paper's own in the same case."""
    rows = study(table, "error")
    keys = ["task", "seed"]
    base = rows[rows["setting"] == "weights: attention x frequency"].set_index(keys)["value"]
    relative = rows.assign(
        value=rows["value"].to_numpy() / base.loc[list(zip(*(rows[k] for k in keys), strict=True))].to_numpy()
    )
    figure = Picture(figsize=(6.2, 3.2))
    ax = axes_grid(figure, 1, 1)[0, 0]
    bars(ax, _renamed(relative, OPTIONS), list(OPTIONS.values()), "{:.2f}", horizontal=True)
    ax.axvline(1, color="#444444", linestyle=(0, (4, 3)), linewidth=0.9)
    ax.set(xlabel="error of the last hidden state, over that of eq. 1 and 2")
    footer(figure, rows)
    return figure


LABEL = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.85, "linewidth": 0}
"""Behind a text on a hatched or dark bar."""


@drawn
def own_share(table: pd.DataFrame) -> Picture:
    """Where a round's time goes: on the device clock by link and samples, and measured here without transfer."""
    rows = study(table, "phase_device_s")
    rows = rows.assign(link=rows["setting"].str.split(": ").str[0], phase=rows["setting"].str.split(": ").str[1])
    bars_of = {
        f"{link}, {samples:.0f} samples": own for (link, samples), own in rows.groupby(["link", "x"], sort=False)
    }
    measured = study(table, "phase_wall_s").assign(phase=lambda frame: frame["setting"])
    bars_of["measured here, 64 samples"] = measured
    figure = Picture(figsize=(7.6, 3.0))
    ax = axes_grid(figure, 1, 1)[0, 0]
    used = [phase for phase in PHASES if any((own["phase"] == phase).any() for own in bars_of.values())]
    for place, own in enumerate(bars_of.values()):
        _stack(ax, place, own.groupby("phase")["value"].median(), used)
    for phase in used:
        ax.barh(0, 0, label=phase, **style.phase(phase))
    ax.set_yticks(range(len(bars_of)), list(bars_of))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="share of the round, everything in the way", xlim=(0, 1.32))
    ax.set_xticks(np.linspace(0, 1, 6))
    legend_below(figure, ax, 8)
    footer(figure, measured, "device clock: NVIDIA L20, real shapes")
    return figure


def _stack(ax: Any, place: int, seconds: pd.Series, phases: list[str]) -> None:
    left, total = 0.0, float(seconds.sum())
    for phase in phases:
        width = float(seconds.get(phase, 0.0)) / total
        ax.barh(place, width, 0.7, left=left, **style.phase(phase))
        if width > 0.12:
            share = f"{phase} {100 * width:.0f} %"
            ax.text(left + width / 2, place, share, ha="center", va="center", fontsize=6.5, bbox=LABEL)
        left += width
    own = sum(float(seconds.get(phase, 0.0)) for phase in ("merge", "quantize", "profile", "probe")) / total
    ax.text(1.01, place, f"FLUX's own {100 * own:.1f} %", va="center", fontsize=7)


def _renamed(rows: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    """Only the named settings, under their titles."""
    return rows[rows["setting"].isin(list(names))].assign(setting=lambda frame: frame["setting"].map(names))
