"""Figures of one thing: a model's activation, a partition, where the time of a run goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, caption, drawn, unique
from fluxlib.records import PHASES


@drawn
def activation(frequency: Any) -> Picture:
    """Share of tokens by layer and expert, as a map.

    Args:
        frequency: ``[layers, experts]``, rows sum to 1; a tensor or an array.
    """
    shares = np.asarray(frequency, dtype=float)
    num_layers, num_experts = shares.shape
    figure = Picture(figsize=(min(9.0, 2.2 + 0.22 * num_experts), 1.1 + 0.3 * num_layers))
    ax = axes_grid(figure, 1, 1)[0, 0]
    image = ax.imshow(shares, cmap=style.SEQUENTIAL, vmin=0, aspect="auto")
    ax.set(xlabel="expert", ylabel="MoE layer", yticks=range(num_layers))
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax, label="share of tokens")
    spread = shares.max(1) / (1 / num_experts)
    caption(figure, f"even would be {1 / num_experts:.3f}", f"busiest expert of each layer: {_list(spread)} times that")
    return figure


def _list(values: np.ndarray) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


@drawn
def activation_by_label(frequencies: Mapping[str, Any], layer: int = 0) -> Picture:
    """Share of tokens by expert of one layer, for samples of each label side by side.

    Args:
        frequencies: label to ``[layers, experts]``.
        layer: 0-based index of the MoE layer.
    """
    figure = Picture(figsize=(7.0, 2.4))
    ax = axes_grid(figure, 1, 1)[0, 0]
    looks = list(style.METHODS.values())
    width = 0.8 / len(frequencies)
    for index, (label, frequency) in enumerate(frequencies.items()):
        shares = np.asarray(frequency, dtype=float)[layer]
        x = np.arange(len(shares)) + (index - (len(frequencies) - 1) / 2) * width
        look = looks[index % len(looks)]
        ax.bar(x, shares, width, label=label, color=look.color, hatch=look.hatch, edgecolor="white")
    ax.set(xlabel="expert", ylabel="share of tokens")
    ax.grid(axis="x", visible=False)
    ax.legend()
    caption(figure, f"MoE layer {layer}")
    return figure


@drawn
def partition(histogram: pd.DataFrame | Sequence[Mapping[str, int]]) -> Picture:
    """Samples of each participant by label, as stacked bars.

    Args:
        histogram: one row per participant, one column per label; or one mapping label to count each.
    """
    counts = pd.DataFrame(histogram).fillna(0)
    counts = counts[sorted(counts.columns)]
    figure = Picture(figsize=(7.0, 2.6))
    ax = axes_grid(figure, 1, 1)[0, 0]
    shades = style.colormap(len(counts.columns))
    bottom = np.zeros(len(counts))
    for label, shade in zip(counts.columns, shades, strict=True):
        ax.bar(range(len(counts)), counts[label], bottom=bottom, color=shade, label=label, edgecolor="white")
        bottom += counts[label].to_numpy()
    ax.set(xlabel="participant", ylabel="samples", xticks=range(len(counts)))
    ax.grid(axis="x", visible=False)
    if len(counts.columns) <= 16:
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    return figure


@drawn
def phases(participants: pd.DataFrame) -> Picture:
    """Where each round's time goes on the device clock, for its slowest participant.

    Args:
        participants: the ``participants`` table of one run; refused replies are left out.
    """
    seconds = participants.loc[participants["rejected"] == ""].copy()
    columns = [f"{phase}_device_s" for phase in PHASES]
    seconds["total_s"] = seconds[columns].sum(axis=1)
    slowest = seconds.loc[seconds.groupby("round")["total_s"].idxmax()]
    figure = Picture(figsize=(7.0, 2.6))
    ax = axes_grid(figure, 1, 1)[0, 0]
    bottom = np.zeros(len(slowest))
    for phase, column in zip(PHASES, columns, strict=True):
        height = slowest[column].fillna(0).to_numpy()
        if height.any():
            ax.bar(slowest["round"], height, bottom=bottom, label=phase, **style.phase(phase))
            bottom += height
    ax.set(xlabel="round", ylabel=style.CLOCKS["device_s"])
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(axis="x", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption(figure, unique(participants, "run_id"), "profiles for the next round run beside upload and server")
    return figure
