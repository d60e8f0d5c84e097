"""Figures of the public models on the catalogue's devices (notebook 07), from the ``measurements`` table."""

from __future__ import annotations

import itertools

import pandas as pd

from fluxlib.devices import catalogue
from fluxlib.devices.memory import RESERVE_FRAC
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, caption, drawn, facets, panels, split, study, unique

GIB = 2**30
KINDS = {
    "weights, frozen": "#0072B2",
    "weights, tuned": "#56B4E9",
    "gradients": "#E69F00",
    "optimizer state": "#D55E00",
    "activations": "#999999",
}


@drawn
def memory(table: pd.DataFrame) -> Picture:
    """Memory of a training step by method and kind; lines are the devices' memories less the reserve."""
    rows = split(study(table, "real_memory"), "method", "kind")
    kind = rows["kind"].replace("tuned experts", "weights, tuned")
    rows = rows.assign(kind=kind.where(kind.isin(list(KINDS)), "weights, frozen"), gib=rows["value"] / GIB)
    figure, ax = panels(table, (5.6, 3.4))
    looks = style.colored(KINDS)
    marks.stacked(ax, rows, "method", "kind", "gib", looks, style.of_methods(rows["method"]), total="{:.0f}")
    for name in ("l20", "rtx-4090", "rtx-3060"):
        device, space = catalogue.DEVICES[name], (1 - RESERVE_FRAC) * catalogue.DEVICES[name].memory_bytes / GIB
        ax.axhline(space, color="black", linewidth=0.8, linestyle=":")
        above = "top" if name == "rtx-3060" else "center"  # where the memories of two devices lie close together
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": above}
        ax.annotate(device.title.removeprefix("NVIDIA "), (1.0, space), (3, 0), fontsize=7, **where)
    ax.set_ylabel("peak of a step, nothing offloaded (GiB)")
    marks.legend(figure, looks, filled=True, loc="outside upper center", ncols=3)
    told = f"{unique(rows, 'model')}: planned, not measured"
    caption(figure, told, f"dotted: a device's memory less {RESERVE_FRAC:.0%}")
    return figure


@drawn
def phases(table: pd.DataFrame, link: str) -> Picture:
    """Where a round's time goes: one panel per device, one bar per method, stacked by phase, at one link."""
    rows = split(study(table, "real_phase"), "method", "device", "link", "wire", "phase")
    rows = rows[(rows["link"] == link) & (rows["wire"] == "16 bit")]
    methods, looks = style.of_methods(rows["method"]), style.of_phases(rows["phase"])
    figure, places = facets(table, rows, ["device"], 2.1, 2.9)
    for ax, part in places:
        marks.stacked(ax, part, "method", "phase", "value", looks, methods, total="{:.0f}")
        ax.tick_params("x", rotation=45)
    places[0][0].set_ylabel("one participant's round (s)")
    marks.legend(figure, looks, filled=True, loc="outside right center")
    title = catalogue.LINKS[link].title
    caption(figure, f"{unique(rows, 'model')}, {title}: device clock, not measured", "profile overlaps with upload")
    return figure


@drawn
def links(table: pd.DataFrame) -> Picture:
    """Each baseline's round as a multiple of FLUX's, over the link; a column per device, a row per wire."""
    rows, place = split(study(table, "real_round"), "method", "device", "link", "wire"), ["device", "wire", "x"]
    flux = rows[rows["method"] == "flux"].set_index(place)["value"].rename("flux")
    rows = rows.join(flux, on=place)
    rows = rows.assign(ratio=rows["value"] / rows["flux"], mb_per_s=rows["x"] / 1e6)
    looks = style.of_methods(set(rows["method"]) - {"flux"})
    devices, wires = list(pd.unique(rows["device"])), list(pd.unique(rows["wire"]))
    size = 2.1 * len(devices) + 1.4, 2.0 * len(wires) + 0.5
    figure, axes = panels(table, size, len(wires), len(devices), sharey=True, squeeze=False)
    for ax, (wire, device) in zip(axes.flat, itertools.product(wires, devices), strict=True):
        own = rows[(rows["device"] == device) & (rows["wire"] == wire)]
        marks.lines(ax, own, "mb_per_s", "ratio", "method", looks)
        marks.reference(ax, 1)
        ax.set(xscale="log", title=f"{device}, {wire}", xlabel="upload (Mb/s)", ylabel="round, times FLUX's")
        ax.label_outer()
    marks.legend(figure, looks, loc="outside right center")
    told = f"{unique(rows, 'model')}: device clock, not measured", "above 1: FLUX's round is shorter"
    caption(figure, *told, "16 bit on the link (FMQ: its 4-bit codes), or 4 bit for all")
    return figure
