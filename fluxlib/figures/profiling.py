"""Figures of section 4: which experts are used, the error of a cheap profile, and the price of an old one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, caption, drawn, footer, panels, study


@drawn
def activation(frequency: Any) -> Picture:
    """Share of tokens by layer and expert, as a map; ``frequency`` ``[layers, experts]``, rows sum to 1."""
    shares = pd.DataFrame(np.asarray(frequency, dtype=float))
    num_layers, num_experts = shares.shape
    figure, ax = panels(shares, (min(9.0, 2.2 + 0.22 * num_experts), 1.1 + 0.3 * num_layers))
    marks.heat(ax, shares, "share of tokens")
    ax.set(xlabel="expert", ylabel="MoE layer")
    busiest = ", ".join(f"{share * num_experts:.1f}" for share in shares.max(axis=1))
    caption(figure, f"even would be {1 / num_experts:.3f}", f"busiest expert of each layer: {busiest} times that")
    return figure


@drawn
def activation_by_label(frequencies: Mapping[str, Any], layer: int = 0) -> Picture:
    """Share of tokens by expert of MoE layer ``layer``, by label; ``frequencies``: label to ``[layers, experts]``."""
    shares = {label: np.asarray(frequency, dtype=float)[layer] for label, frequency in frequencies.items()}
    rows = pd.DataFrame(shares).rename_axis("expert").reset_index().melt("expert", var_name="label").assign(seed=0)
    figure, ax = panels(rows, (7.0, 2.4))
    looks = style.of_settings(list(shares))
    marks.bars(ax, rows, "expert", "value", looks, by="label")
    ax.set(xlabel="expert", ylabel="share of tokens")
    marks.legend(ax, looks, filled=True)
    caption(figure, f"MoE layer {layer}")
    return figure


@drawn
def activation_by_layer(table: pd.DataFrame) -> Picture:
    """Share of tokens of each layer's experts, sorted; how far the busiest and the rarest are from an even share."""
    rows = study(table, "activation")
    figure, (left, right) = panels(rows, (7.6, 2.7), 1, 2, width_ratios=[1.35, 1])
    rank = rows.groupby(["task", "seed", "layer"])["value"].rank(ascending=False, method="first").astype(int)
    num_experts = rank.max()
    ranked = rows.assign(rank=rank, layer=rows["layer"].astype(int), times=num_experts * rows["value"])
    marks.heat(left, ranked.pivot_table(index="layer", columns="rank", values="value"), "share of tokens")
    left.set(xlabel="experts of a layer, busiest first", ylabel="MoE layer")
    looks = style.of_settings({1: "busiest", (num_experts + 1) // 2: "median", num_experts: "rarest"})
    marks.lines(right, ranked, "layer", "times", "rank", looks)
    marks.reference(right, 1)
    right.set(xlabel="MoE layer", ylabel="times an even share", xticks=sorted(rows["layer"].unique()), ylim=(0, None))
    marks.legend(right, looks, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    footer(figure, rows, "experts at full precision")
    return figure


@drawn
def profile_error(table: pd.DataFrame) -> Picture:
    """Error of the frequency, rank correlation and overlap of the most used quarter, by bits, against 16 bit."""
    rows = study(table, "profile_error")
    figure, axes = panels(rows, (7.6, 2.5), 1, 3)
    looks = style.of_settings(sorted(rows["x"].astype(int).unique()), color="#D55E00", hatch="")
    labels = {"frequency error": "error of the frequency", "rank correlation": "rank correlation"}
    for ax, measure in zip(axes, (*labels, "top overlap"), strict=True):
        marks.bars(ax, rows[rows["setting"] == measure].astype({"x": int}), "x", "value", looks, fmt="{:.3f}")
        ax.set(xlabel="bits of the experts", ylabel=labels.get(measure, "top quarter in common"), ylim=(0, 1.12))
    marks.reference(axes[0], 0.1101, "paper, 4 bit: 0.110")
    axes[0].set_ylim(0, 0.125)
    footer(figure, rows, "same samples at 16 bit are the truth")
    return figure


@drawn
def sample_size(table: pd.DataFrame) -> Picture:
    """Error of the frequency by samples profiled, as measured and as the profile itself expects it."""
    rows = study(table, "sample_size")
    figure, ax = panels(rows, (4.6, 2.8))
    titles = {"16 bit": "16 bit, measured", "4 bit": "4 bit, measured", "estimated": "16 bit, from the sample alone"}
    looks = style.of_settings(titles)
    marks.lines(ax, rows, "x", "value", "setting", looks)
    _in_doublings(ax, sorted(rows["x"].unique()))
    ax.set(xlabel="samples profiled", ylabel="relative error of frequency", ylim=(0, None))
    marks.legend(ax, looks)
    footer(figure, rows)
    return figure


@drawn
def drift(table: pd.DataFrame) -> Picture:
    """How far activation moves from round 0, and what a 4-bit profile is worth fresh and one round old."""
    labels = {"drift": "distance from round 0", "profile_age": "error of the 4-bit profile"}
    labels["age_overlap"] = "top quarter in common"
    figure, axes = panels(study(table, *labels), (7.6, 2.9), 1, 3)
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        rows = study(table, name)
        looks = style.of_settings(rows["setting"].unique())
        marks.lines(ax, rows, "x", "value", "setting", looks)
        ax.set(xlabel="round", ylabel=label, ylim=(0, 1.05 if name == "age_overlap" else None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        if name != "profile_age":
            marks.legend(ax, looks, fontsize=7, loc="lower left" if name == "age_overlap" else "best")
    footer(figure, study(table, "profile_age"), "stale: made one round earlier")
    return figure


@drawn
def round_saving(table: pd.DataFrame) -> Picture:
    """Share of a round saved by profiling beside upload and server, by samples of a round and by link."""
    rows = study(table, "round_saving")
    figure, ax = panels(rows, (5.2, 3.0))
    looks = style.of_settings(rows["setting"].unique())
    marks.lines(ax, rows, "x", "value", "setting", looks)
    _in_doublings(ax, sorted(rows["x"].unique())[::2])
    marks.reference(ax, 0.282, "paper: 0.282")
    ax.set(xlabel="samples trained on and profiled in a round", ylabel="share of the round saved", ylim=(0, 0.32))
    marks.legend(figure, looks, loc="outside upper center", ncols=3)
    footer(figure, rows, "device clock: NVIDIA L20, shapes of the real model", seeds="counted, not drawn by chance")
    return figure


def _in_doublings(ax: Any, counts: list[float]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [f"{count:,.0f}" for count in counts])
    ax.minorticks_off()
