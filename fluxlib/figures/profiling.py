"""Figures of section 4: activation, the error of a cheap profile, and the price of an old one."""

from __future__ import annotations

import pandas as pd

from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, drawn
from fluxlib.figures.measured import bars, curve, footer, legend_below, lines, paper_line, study


@drawn
def activation_by_layer(table: pd.DataFrame) -> Picture:
    """Share of tokens of each layer's experts, sorted; how far the busiest and the rarest are from an even share."""
    rows = study(table, "activation")
    rows = rows.assign(rank=rows.groupby(["task", "seed", "layer"])["value"].rank(ascending=False, method="first"))
    shares = rows.pivot_table(index="layer", columns="rank", values="value").to_numpy(dtype=float)
    num_layers, num_experts = shares.shape
    figure = Picture(figsize=(7.6, 2.7))
    left, right = axes_grid(figure, 1, 2, width_ratios=[1.35, 1])[0]
    image = left.imshow(
        shares, cmap=style.SEQUENTIAL, vmin=0, aspect="auto", extent=(0.5, num_experts + 0.5, num_layers - 0.5, -0.5)
    )
    left.set(xlabel="experts of a layer, busiest first", ylabel="MoE layer", yticks=range(num_layers))
    left.grid(visible=False)
    figure.colorbar(image, ax=left, label="share of tokens")
    for name, rank, marker, line in (
        ("busiest", 1, "o", "-"),
        ("median", (num_experts + 1) // 2, "s", "--"),
        ("rarest", num_experts, "^", ":"),
    ):
        curve(right, rows[rows["rank"] == rank], "layer", num_experts, marker=marker, linestyle=line, label=name)
    right.axhline(1, color="#444444", linewidth=0.8)
    right.set(xlabel="MoE layer", ylabel="times an even share", xticks=range(num_layers), ylim=(0, None))
    right.legend()
    footer(figure, rows, "experts at full precision")
    return figure


@drawn
def profile_error(table: pd.DataFrame) -> Picture:
    """Error of the frequency, rank correlation and overlap of the most used quarter, by bits, against 16 bit."""
    rows = study(table, "profile_error")
    figure = Picture(figsize=(7.6, 2.5))
    axes = axes_grid(figure, 1, 3)[0]
    labels = {
        "frequency error": "error of the frequency",
        "rank correlation": "rank correlation",
        "top overlap": "top quarter in common",
    }
    widths = sorted(rows["x"].unique())
    for ax, (measure, label) in zip(axes, labels.items(), strict=True):
        own = rows[rows["setting"] == measure].assign(setting=lambda frame: frame["x"].map("{:.0f}".format))
        bars(ax, own, [f"{width:.0f}" for width in widths], alike=True)
        ax.set(xlabel="bits of the experts", ylabel=label)
    paper_line(axes[0], 0.1101, "paper, 4 bit: 0.110")
    axes[0].set_ylim(0, 0.125)
    for ax in axes[1:]:
        ax.set_ylim(0, 1.12)
    footer(figure, rows, "same samples at 16 bit are the truth")
    return figure


@drawn
def sample_size(table: pd.DataFrame) -> Picture:
    """Error of the frequency by samples profiled, as measured and as the profile itself expects it."""
    rows = study(table, "sample_size")
    figure = Picture(figsize=(4.6, 2.8))
    ax = axes_grid(figure, 1, 1)[0, 0]
    lines(
        ax,
        rows,
        ["16 bit", "4 bit", "estimated"],
        labels=["16 bit, measured", "4 bit, measured", "16 bit, from the sample alone"],
    )
    counts = sorted(rows["x"].unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [f"{count:.0f}" for count in counts])
    ax.minorticks_off()
    ax.set(xlabel="samples profiled", ylabel="relative error of frequency", ylim=(0, None))
    ax.legend()
    footer(figure, rows)
    return figure


@drawn
def drift(table: pd.DataFrame) -> Picture:
    """How far activation moves from round 0, and what a 4-bit profile is worth fresh and one round old."""
    moved, age, overlap = (study(table, name) for name in ("drift", "profile_age", "age_overlap"))
    figure = Picture(figsize=(7.6, 2.7))
    axes = axes_grid(figure, 1, 3)[0]
    lines(axes[0], moved, ["a quarter tuned", "all tuned"])
    axes[0].set(ylabel="distance from round 0", ylim=(0, None))
    axes[0].legend(fontsize=7)
    settings = [f"{name}, {tuned}" for tuned in ("a quarter tuned", "all tuned") for name in ("fresh", "stale")]
    lines(axes[1], age, settings)
    axes[1].set(ylabel="error of the 4-bit profile", ylim=(0, None))
    lines(axes[2], overlap, settings)
    axes[2].set(ylabel="top quarter in common", ylim=(0, 1.05))
    axes[2].legend(fontsize=7, loc="lower left")
    for ax in axes:
        ax.set_xlabel("round")
        ax.xaxis.get_major_locator().set_params(integer=True)
    footer(figure, age, "stale: made one round earlier")
    return figure


@drawn
def round_saving(table: pd.DataFrame) -> Picture:
    """Share of a round saved by profiling beside upload and server, by samples of a round and by link."""
    rows = study(table, "round_saving")
    figure = Picture(figsize=(5.2, 3.0))
    ax = axes_grid(figure, 1, 1)[0, 0]
    lines(ax, rows, list(rows["setting"].unique()))
    ax.set_xscale("log", base=2)
    counts = sorted(rows["x"].unique())[::2]
    ax.set_xticks(counts, [f"{count:,.0f}" for count in counts])
    ax.minorticks_off()
    paper_line(ax, 0.282, "paper: 0.282")
    ax.set(xlabel="samples trained on and profiled in a round", ylabel="share of the round saved", ylim=(0, 0.32))
    legend_below(figure, ax, 3)
    footer(figure, rows, "device clock: NVIDIA L20, shapes of the real model", chance=False)
    return figure
