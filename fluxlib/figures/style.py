"""How figures look: one colour and one marker per method, everywhere; nothing global is touched.

Colours are Okabe and Ito's, chosen so that they also differ in lightness; markers, dashes and hatches differ too, so a
figure can be read in black and white. Use :data:`RC` in ``matplotlib.rc_context``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fluxlib.analysis.wording import methods_in_order, title


@dataclass(frozen=True)
class Style:
    """How one method, or one setting, is drawn."""

    title: str
    color: str
    marker: str
    dashes: Any
    """Lengths of a line's dashes and gaps; empty: solid."""
    hatch: str


METHODS: dict[str, Style] = {
    "flux": Style("FLUX", "#D55E00", "o", "", ""),
    "fmd": Style("FMD", "#0072B2", "s", (4, 2), "//"),
    "fmq": Style("FMQ", "#56B4E9", "^", (4, 2, 1, 2), ".."),
    "fmes": Style("FMES", "#E69F00", "D", (1, 1.5), "xx"),
    "flux_plus": Style("FLUX+", "#7A3500", "P", "", "--"),
}

SETTINGS = (
    Style("", "#D55E00", "o", "", ""),
    Style("", "#0072B2", "s", (4, 2), "//"),
    Style("", "#009E73", "^", (4, 2, 1, 2), ".."),
    Style("", "#E69F00", "D", (1, 1.5), "xx"),
    Style("", "#CC79A7", "v", (6, 1.5), "\\\\"),
    Style("", "#56B4E9", "P", (3, 1.5, 1, 1.5, 1, 1.5), "++"),
    Style("", "#000000", "X", (1, 3), "oo"),
)
"""Looks of what is no method, in the order in which things are named; the last three also of methods of your own."""

PHASE_COLORS: dict[str, str] = {
    "download": "#0072B2",
    "merge": "#CC79A7",
    "quantize": "#F0E442",
    "profile": "#E69F00",
    "train": "#D55E00",
    "probe": "#009E73",
    "pcie": "#999999",
    "upload": "#56B4E9",
}

PHASE_HATCHES = dict(zip(PHASE_COLORS, ("", "//", "..", "xx", "\\\\", "++", "oo", ""), strict=True))
"""Several phases' colours have one lightness; download (dark) and upload (light) need none."""

DIVERGING = "PuOr"
"""Of factors around 1: orange below, purple above."""
SEQUENTIAL = "cividis"
"""Colour map for shares and counts: even in lightness, safe for colour-blind readers."""
GREY = "#444444"
"""Reference lines and small print."""

CLOCKS = {
    "device_s": "device clock (s)",
    "wall_s": "measured here (s)",
    "round": "round",
}

RC: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.hashsalt": "fluxlib",
}


def method(name: str) -> Style:
    """The style of ``name``; a method of your own gets one of three spare styles, always the same."""
    spare = SETTINGS[4 + sum(name.encode()) % 3]
    return METHODS.get(name) or replace(spare, title=title(name))


def of_methods(names: Iterable[str]) -> dict[str, Style]:
    """Styles by method, without repeats: the known methods first."""
    return {name: method(name) for name in methods_in_order(names)}


def of_settings(names: Iterable[Any] | Mapping[Any, str], **changed: str) -> dict[Any, Style]:
    """Styles by setting, in the order in which settings come; a mapping gives each its title; ``changed``: of all."""
    titles = names if isinstance(names, Mapping) else {name: name for name in names}
    looks = enumerate(titles.items())
    return {name: replace(SETTINGS[i % 7], **{"title": str(title)} | changed) for i, (name, title) in looks}


def colored(colors: Mapping[str, str]) -> dict[str, Style]:
    """Styles of things that have a colour each, by name; hatches tell them apart as well."""
    return {name: replace(look, color=colors[name]) for name, look in of_settings(list(colors)).items()}


def of_phases(names: Iterable[str]) -> dict[str, Style]:
    """Styles of a round's phases in their order; the server, which is none, is black and comes last."""
    known = {name: Style(name, color, "", "", PHASE_HATCHES[name]) for name, color in PHASE_COLORS.items()}
    known["server"] = Style("server", "#000000", "", "", "")
    present = set(names)
    return {name: look for name, look in known.items() if name in present}


def in_shades(names: Iterable[Any]) -> dict[Any, Style]:
    """Styles of steps of one quantity, such as layers: from dark to light, without the palest."""
    import matplotlib as mpl

    steps = list(names)
    shades = [mpl.colors.to_hex(mpl.colormaps[SEQUENTIAL]((i + 0.5) / (len(steps) + 1))) for i in range(len(steps))]
    return {
        name: replace(SETTINGS[i % 7], title=f"{name:g}" if isinstance(name, float) else str(name), color=shade)
        for i, (name, shade) in enumerate(zip(steps, shades, strict=True))
    }
