"""Figures of the public models on the catalogue's devices (notebook 07), from the ``measurements`` table."""

from __future__ import annotations

from typing import Any

import pandas as pd

from fluxlib.devices import catalogue
from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, caption, drawn, unique
from fluxlib.figures.measured import HATCHES, study

PHASES = ("download", "merge", "quantize", "profile", "probe", "train", "pcie", "upload", "server")
KINDS = ("weights, frozen", "weights, tuned", "gradients", "optimizer state", "activations")
KIND_COLORS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#999999")
GIB = 2**30


def split(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    """``rows`` with the parts of ``setting``, which is written ``"a, b, c"``, as columns."""
    parts = rows["setting"].str.split(", ", n=len(names) - 1, expand=True)
    return rows.assign(**{name: parts[i] for i, name in enumerate(names)})


@drawn
def memory(table: pd.DataFrame) -> Picture:
    """Memory of a training step by method and kind; lines are the devices' memories less the reserve."""
    rows = split(study(table, "real_memory"), "method", "kind")
    figure = Picture(figsize=(5.6, 3.2))
    ax = axes_grid(figure, 1, 1)[0, 0]
    order = style.order(rows["method"])
    bottom = dict.fromkeys(order, 0.0)
    sums = rows.assign(kind=rows["kind"].map(_kind)).groupby(["method", "kind"])["value"].sum() / GIB
    for kind, color, hatch in zip(KINDS, KIND_COLORS, HATCHES, strict=False):
        heights = [float(sums.get((method, kind), 0.0)) for method in order]
        ax.bar(order, heights, 0.6, bottom=list(bottom.values()), color=color, hatch=hatch, label=kind, edgecolor="w")
        bottom = {method: bottom[method] + height for method, height in zip(order, heights, strict=True)}
    for method, top in bottom.items():
        ax.annotate(f"{top:.0f}", (method, top), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    for name in ("l20", "rtx-4090", "rtx-3060"):
        device = catalogue.DEVICES[name]
        ax.axhline(0.9 * device.memory_bytes / GIB, color="black", linewidth=0.8, linestyle=":")
        ax.annotate(
            f"{device.title.removeprefix('NVIDIA ')}", (1.0, 0.9 * device.memory_bytes / GIB), (3, 0),
            va="top" if name == "rtx-3060" else "center",
            xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=7,
        )  # fmt: skip
    ax.set_xticks(range(len(order)), [style.method(method).title for method in order])
    ax.set_ylabel("peak of a step, nothing offloaded (GiB)")
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.12)
    figure.legend(loc="outside upper center", ncols=3)
    caption(figure, f"{unique(rows, 'model')}: planned, not measured", "dotted: a device's memory less 10 %")
    return figure


def _kind(name: str) -> str:
    named = {
        "tuned experts": "weights, tuned", "gradients": "gradients", "optimizer state": "optimizer state",
        "activations": "activations",
    }  # fmt: skip
    return named.get(name, "weights, frozen")


@drawn
def phases(table: pd.DataFrame, link: str) -> Picture:
    """Where a round's time goes: one panel per device, one bar per method, stacked by phase, at one link."""
    rows = split(study(table, "real_phase"), "method", "device", "link", "wire", "phase")
    rows = rows[(rows["link"] == link) & (rows["wire"] == "16 bit")]
    devices = list(pd.unique(rows["device"]))
    figure = Picture(figsize=(2.1 * len(devices) + 1.4, 2.9))
    axes = axes_grid(figure, 1, len(devices))
    for ax, device in zip(axes[0], devices, strict=True):
        here = rows[rows["device"] == device].set_index(["method", "phase"])["value"]
        for place, method in enumerate(style.order(rows["method"])):
            _stack(ax, place, {phase: float(here[method, phase]) for phase in PHASES})
        titles = [style.method(method).title for method in style.order(rows["method"])]
        ax.set_xticks(range(len(titles)), titles, rotation=45)
        ax.set_title(device)
        ax.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("one participant's round (s)")
    handles = [
        axes[0, 0].bar(0, 0, color=_color(phase), hatch=HATCHES[i % len(HATCHES)], edgecolor="w", label=phase)
        for i, phase in enumerate(PHASES)
    ]
    figure.legend(handles=handles, loc="outside right center")
    title = catalogue.LINKS[link].title
    caption(figure, f"{unique(rows, 'model')}, {title}: device clock, not measured", "profile overlaps with upload")
    return figure


def _stack(ax: Any, place: int, seconds: dict[str, float]) -> None:
    bottom = 0.0
    for index, (phase, height) in enumerate(seconds.items()):
        hatch = HATCHES[index % len(HATCHES)]
        ax.bar(place, height, 0.7, bottom=bottom, color=_color(phase), hatch=hatch, edgecolor="w", linewidth=0.3)
        bottom += height
    ax.annotate(f"{bottom:.0f}", (place, bottom), (0, 2), textcoords="offset points", ha="center", fontsize=7)


def _color(phase: str) -> str:
    return style.PHASE_COLORS.get(phase, "#000000")


@drawn
def links(table: pd.DataFrame) -> Picture:
    """Each baseline's round as a multiple of FLUX's, over the link; a column per device, a row per wire."""
    rows = split(study(table, "real_round"), "method", "device", "link", "wire")
    devices, wires = list(pd.unique(rows["device"])), list(pd.unique(rows["wire"]))
    figure = Picture(figsize=(2.1 * len(devices) + 1.4, 2.0 * len(wires) + 0.5))
    axes = axes_grid(figure, len(wires), len(devices), sharey=True)
    for line, wire in enumerate(wires):
        for ax, device in zip(axes[line], devices, strict=True):
            here = rows[(rows["device"] == device) & (rows["wire"] == wire)]
            wide = here.pivot(index="x", columns="method", values="value").sort_index()
            for method in style.order(rows["method"]):
                if method != "flux":
                    look, ratio = style.method(method), wide[method] / wide["flux"]
                    ax.plot(
                        ratio.index / 1e6, ratio, color=look.color, marker=look.marker, ls=look.line, label=look.title
                    )
            ax.axhline(1.0, color="black", linewidth=0.8)
            ax.set_xscale("log")
            ax.set_title(f"{device}, {wire}")
        axes[line, 0].set_ylabel("round, times FLUX's")
    for ax in axes[-1]:
        ax.set_xlabel("upload (Mb/s)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    caption(
        figure, f"{unique(rows, 'model')}: device clock, not measured", "above 1: FLUX's round is shorter",
        "16 bit on the link (FMQ: its 4-bit codes), or 4 bit for all",
    )  # fmt: skip
    return figure
