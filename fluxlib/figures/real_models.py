"""Figures of the public models on the catalogue's devices (notebook 07), from the ``measurements`` table."""

from __future__ import annotations

import pandas as pd

from fluxlib.devices import catalogue
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, caption, drawn, panels, split, study, unique

GIB = 2**30
KINDS = {
    "weights, frozen": "#0072B2",
    "weights, tuned": "#56B4E9",
    "gradients": "#E69F00",
    "optimizer state": "#D55E00",
    "activations": "#999999",
}
RESERVE = 0.1
"""Share of a device's memory that is left free."""


@drawn
def memory(table: pd.DataFrame) -> Picture:
    """Memory of a training step by method and kind; lines are the devices' memories less the reserve."""
    rows = split(study(table, "real_memory"), "method", "kind")
    kind = rows["kind"].replace("tuned experts", "weights, tuned")
    rows["kind"] = kind.where(kind.isin(list(KINDS)), "weights, frozen")
    rows["gib"] = rows["value"] / GIB
    figure, ax = panels(_real(table), (5.6, 3.4))
    looks = {name: style.Style(name, KINDS[name], "", "", style.SETTINGS[i].hatch) for i, name in enumerate(KINDS)}
    marks.stacked(ax, rows, "method", "kind", "gib", looks, style.of_methods(rows["method"]), total="{:.0f}")
    for name in ("l20", "rtx-4090", "rtx-3060"):
        device, space = catalogue.DEVICES[name], (1 - RESERVE) * catalogue.DEVICES[name].memory_bytes / GIB
        ax.axhline(space, color="black", linewidth=0.8, linestyle=":")
        above = "top" if name == "rtx-3060" else "center"  # where the memories of two devices lie close together
        ax.annotate(device.title.removeprefix("NVIDIA "), (1.0, space), (3, 0), va=above, fontsize=7,
                    xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
    ax.set_ylabel("peak of a step, nothing offloaded (GiB)")
    marks.legend(figure, looks.values(), filled=True, loc="outside upper center", ncols=3)
    caption(figure, f"{unique(rows, 'model')}: planned, not measured", f"dotted: a device's memory less {RESERVE:.0%}")
    return figure


@drawn
def phases(table: pd.DataFrame, link: str) -> Picture:
    """Where a round's time goes: one panel per device, one bar per method, stacked by phase, at one link."""
    rows = split(study(table, "real_phase"), "method", "device", "link", "wire", "phase")
    rows = rows[(rows["link"] == link) & (rows["wire"] == "16 bit")]
    methods, devices = style.of_methods(rows["method"]), list(pd.unique(rows["device"]))
    looks = style.of_phases(rows["phase"])
    figure, axes = panels(_real(table), (2.1 * len(devices) + 1.4, 2.9), 1, len(devices), squeeze=False)
    for ax, device in zip(axes[0], devices, strict=True):
        marks.stacked(ax, rows[rows["device"] == device], "method", "phase", "value", looks, methods, total="{:.0f}")
        ax.tick_params("x", rotation=45)
        ax.set_title(device)
    axes[0, 0].set_ylabel("one participant's round (s)")
    marks.legend(figure, looks.values(), filled=True, loc="outside right center")
    title = catalogue.LINKS[link].title
    caption(figure, f"{unique(rows, 'model')}, {title}: device clock, not measured", "profile overlaps with upload")
    return figure


@drawn
def links(table: pd.DataFrame) -> Picture:
    """Each baseline's round as a multiple of FLUX's, over the link; a column per device, a row per wire."""
    rows = split(study(table, "real_round"), "method", "device", "link", "wire")
    place = ["device", "wire", "x"]
    flux = rows[rows["method"] == "flux"].set_index(place)["value"].rename("flux")
    rows = rows.join(flux, on=place)
    rows = rows.assign(ratio=rows["value"] / rows["flux"], mb_per_s=rows["x"] / 1e6)
    looks = style.of_methods(set(rows["method"]) - {"flux"})
    devices, wires = list(pd.unique(rows["device"])), list(pd.unique(rows["wire"]))
    size = 2.1 * len(devices) + 1.4, 2.0 * len(wires) + 0.5
    figure, axes = panels(_real(table), size, len(wires), len(devices), sharey=True, squeeze=False)
    for row, wire in zip(axes, wires, strict=True):
        for ax, device in zip(row, devices, strict=True):
            marks.lines(
                ax, rows[(rows["device"] == device) & (rows["wire"] == wire)], "mb_per_s", "ratio", "method", looks
            )
            ax.axhline(1.0, color="black", linewidth=0.8)
            ax.set(xscale="log", title=f"{device}, {wire}", xlabel="upload (Mb/s)", ylabel="round, times FLUX's")
            ax.label_outer()
    marks.legend(figure, looks.values(), loc="outside right center")
    caption(
        figure,
        f"{unique(rows, 'model')}: device clock, not measured",
        "above 1: FLUX's round is shorter",
        "16 bit on the link (FMQ: its 4-bit codes), or 4 bit for all",
    )
    return figure


def _real(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["study"].str.startswith("real")]
