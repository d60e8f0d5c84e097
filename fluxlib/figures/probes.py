"""Figures of forward-only utilities: how good they are, what they cost, and what share of a round that is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, caption, drawn, interval
from fluxlib.figures.roles import LOOKS, about, looks_of
from fluxlib.records import PHASES

MEASURES = {
    "cosine_distance": "cosine distance of utilities",
    "rank_correlation": "rank correlation of utilities",
    "bias": "bias of the squared norm",
    "spread": "relative spread of the squared norm",
}
PAPER_DISTANCE, TARGET_DISTANCE = 0.29, 0.20


@drawn
def role_utilities(measured: pd.DataFrame) -> Picture:
    """Estimated against true utilities of single experts, one panel for each way to probe, one probe each.

    Args:
        measured: the ``measurements`` table; its study ``utility`` is drawn, of the first seed.
    """
    rows = measured[(measured["study"] == "utility") & (measured["seed"] == measured["seed"].min())]
    wide = rows.pivot_table(index=["layer", "expert"], columns="setting", values="value", sort=False).reset_index()
    names = [name for name in pd.unique(rows["setting"]) if name != "true"]
    figure = Picture(figsize=(2.6 * len(names) + 0.6, 2.9))
    axes = axes_grid(figure, 1, len(names), sharex=True, sharey=True)[0]
    layers = sorted(wide["layer"].unique())
    values = wide[["true", *names]].to_numpy(dtype=float)
    low, high = values[values > 0].min() / 2, values.max() * 2
    for ax, name in zip(axes, names, strict=True):
        ax.plot([low, high], [low, high], color="black", linewidth=0.8, zorder=1)
        for layer, shade in zip(layers, style.colormap(len(layers)), strict=True):
            part = wide[wide["layer"] == layer]
            marker = LOOKS[int(layer) % len(LOOKS)][1]
            ax.scatter(part["true"], part[name].clip(lower=low), 22, color=shade, marker=marker, edgecolor="black",
                       linewidth=0.4, label=f"layer {int(layer)}", zorder=2)  # fmt: skip
        ax.set(title=name, xlabel="true utility", xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes[0].set_ylabel("estimated, one probe")
    axes[0].legend(fontsize=7, loc="upper left", handletextpad=0.2)
    caption(figure, *about(rows)[:1], f"seed {rows['seed'].iloc[0]}", f"{len(wide)} experts, one batch of 16 samples")
    return figure


@drawn
def role_probes(measured: pd.DataFrame) -> Picture:
    """Quality of probes over what they cost, in forward passes of the whole model per expert.

    Args:
        measured: the ``measurements`` table; its studies ``probe_*`` are drawn.
    """
    figure = Picture(figsize=(7.4, 5.0))
    axes = axes_grid(figure, 2, 2, sharex=True)
    rows = measured[measured["study"].str.startswith("probe_") & (measured["study"] != "probe_seconds")]
    passes = rows[rows["study"] == "probe_passes"].groupby(["setting", "x"])["value"].mean().to_dict()
    free = rows[rows["x"] == 0].groupby("study")["value"].mean()
    rows = rows[rows["x"] != 0]
    looks = looks_of(rows["setting"])
    for ax, (measure, title) in zip(axes.flat, MEASURES.items(), strict=True):
        for name, (color, marker, line, _) in looks.items():
            found = rows[(rows["study"] == f"probe_{measure}") & (rows["setting"] == name)].groupby("x")["value"]
            bands = np.array([interval(values.to_numpy()) for _, values in found])
            # Side by side where error bars would hide each other.
            aside = 1.06 ** list(looks).index(name) if measure == "bias" else 1.0
            cost = [aside * passes[name, x] for x in found.groups]
            ax.plot(cost, bands[:, 0], color=color, marker=marker, linestyle=line, label=name)
            if measure != "bias":  # it has bars of its own
                ax.fill_between(cost, bands[:, 1], bands[:, 2], color=color, alpha=0.15, linewidth=0)
        if f"probe_{measure}" in free:
            _reference(ax, free[f"probe_{measure}"], f"frequency alone, no pass: {free[f'probe_{measure}']:.2f}")
        ax.set(title=title, xscale="log")
    ticks = sorted({round(float(value), 2) for value in passes.values()})
    axes[0, 0].set_xticks(ticks[:: max(1, len(ticks) // 5)], minor=False)
    for ax in axes[1]:
        ax.set_xlabel("forward passes per expert")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    _reference(axes[0, 0], PAPER_DISTANCE, f"paper: {PAPER_DISTANCE:.2f}")
    _reference(axes[0, 0], TARGET_DISTANCE, f"to reach: {TARGET_DISTANCE:.2f}")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].axhline(0, color="black", linewidth=0.8)
    for place, (name, (color, *_)) in enumerate(looks.items()):
        error = rows[(rows["setting"] == name) & (rows["study"] == "probe_bias_error")].groupby("x")["value"].mean()
        middle = rows[(rows["setting"] == name) & (rows["study"] == "probe_bias")].groupby("x")["value"].mean()
        cost = [1.06**place * passes[name, x] for x in error.index]
        axes[1, 0].errorbar(cost, middle[error.index], 2 * error, color=color, capsize=2, linestyle="none")
    axes[1, 1].set_ylim(bottom=0)
    axes[1, 1].legend(loc="upper right", fontsize=7)
    counts = ", ".join(f"{x:g}" for x in sorted(rows["x"].dropna().unique()))
    caption(figure, *about(rows), f"marks: {counts} probes per expert; bars: 2 standard errors")
    return figure


def _reference(ax: Any, value: float, text: str) -> None:
    ax.axhline(value, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
    ax.annotate(text, (0.98, value), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", fontsize=7)  # fmt: skip


@drawn
def role_seconds(measured: pd.DataFrame, participants: pd.DataFrame, shares: pd.DataFrame) -> Picture:
    """Measured seconds of ways to learn one expert's utility, and what share of a round probing takes on both clocks.

    Args:
        measured: the ``measurements`` table; its study ``probe_seconds`` is drawn.
        participants: tables of the runs that ``shares`` (of :func:`~fluxlib.figures.role_tables.probe_shares`) is of.
    """
    figure = Picture(figsize=(7.4, 2.7))
    left, right = axes_grid(figure, 1, 2)[0]
    rows = measured[measured["study"] == "probe_seconds"]
    times = rows.groupby("setting", sort=False)["value"].median().sort_values()
    for place, (name, value) in enumerate(times.items()):
        left.barh(place, 1000 * value, color=LOOKS[0][0] if "per pass" in str(name) else "#999999", height=0.6)
        left.annotate(f"{1000 * value:.1f}", (1000 * value, place), (3, 0), textcoords="offset points", va="center",
                      fontsize=7)  # fmt: skip
    left.set_yticks(range(len(times)), times.index)
    left.set(xlabel="milliseconds per expert, measured here (median)", xlim=(0, 1150 * times.max()))
    left.grid(axis="y", visible=False)
    _stack_shares(right, shares)
    seeds = rows["seed"].nunique()
    caption(
        figure,
        *about(rows)[:1],
        f"{seeds} seeds" if seeds > 1 else "1 seed",
        f"right: {participants['setting'].iloc[0]}, round 2 on",
    )
    return figure


def _stack_shares(ax: Any, shares: pd.DataFrame) -> None:
    titles = {"device": "device clock", "wall": "measured here\n(no link)"}
    clocks = list(pd.unique(shares["clock"]))
    base = np.zeros(len(clocks))
    for phase in PHASES:
        width = shares[shares["phase"] == phase].set_index("clock")["share"].reindex(clocks).to_numpy(dtype=float)
        if width.max() > 0:
            ax.barh(range(len(clocks)), 100 * width, 0.55, left=base, label=phase, **style.phase(phase))
            if phase == "probe":
                for place, share in enumerate(width):
                    ax.annotate(f"probe {100 * share:.1f} %", (base[place] + 50 * share, place), (0, 20),
                                textcoords="offset points", ha="center", fontsize=7)  # fmt: skip
            base = base + 100 * width
    ax.set_yticks(range(len(clocks)), [titles[clock] for clock in clocks])
    ax.set(xlabel="share of a participant's round (%)", xlim=(0, 100), ylim=(-0.5, len(clocks) - 0.2))
    ax.grid(axis="y", visible=False)
    ax.legend(ncols=3, fontsize=6.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.0)
