"""How figures look: one colour and one marker per method, everywhere; nothing global is touched.

Colours are Okabe and Ito's, chosen so that they also differ in lightness; markers and line styles differ too, so a
figure can be read in black and white. Use :data:`RC` in ``matplotlib.rc_context``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MethodStyle:
    """How one method is drawn."""

    title: str
    color: str
    marker: str
    line: str
    hatch: str


METHODS: dict[str, MethodStyle] = {
    "flux": MethodStyle("FLUX", "#D55E00", "o", "-", ""),
    "fmd": MethodStyle("FMD", "#0072B2", "s", "--", "//"),
    "fmq": MethodStyle("FMQ", "#56B4E9", "^", "-.", ".."),
    "fmes": MethodStyle("FMES", "#E69F00", "D", ":", "xx"),
    "flux+": MethodStyle("FLUX+", "#7A3500", "P", "-", "--"),
    "fmd+": MethodStyle("FMD+", "#00375A", "v", "--", "++"),
    "fmes+": MethodStyle("FMES+", "#7D5600", "X", ":", "oo"),
}
"""A ``+`` marks a method with the options that go beyond the paper (variant ``improved``)."""

_SPARE = (
    MethodStyle("", "#009E73", "v", "-", "\\\\"),
    MethodStyle("", "#CC79A7", "P", "--", "++"),
    MethodStyle("", "#000000", "X", "-.", "oo"),
)

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

SEQUENTIAL = "cividis"
"""Colour map for shares and counts: even in lightness, safe for colour-blind readers."""

CLOCKS = {
    "device_s": "device clock (s)",
    "wall_s": "measured here (s)",
    "round": "round",
}

METRICS = {"rouge_l": "ROUGE-L", "exact_match": "exact match", "accuracy": "accuracy"}
"""Titles of the metrics."""

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
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.hashsalt": "fluxlib",
}


def phase(name: str) -> dict[str, Any]:
    """Colour, hatch and edge of a phase's bar, for matplotlib."""
    return {"color": PHASE_COLORS[name], "hatch": PHASE_HATCHES[name], "edgecolor": "white", "linewidth": 0.4}


def method(name: str) -> MethodStyle:
    """The style of ``name``; a method of your own gets one of three spare styles, always the same."""
    if name in METHODS:
        return METHODS[name]
    spare = _SPARE[sum(name.encode()) % len(_SPARE)]
    return MethodStyle(name, spare.color, spare.marker, spare.line, spare.hatch)


def order(names: Any) -> list[str]:
    """``names`` without repeats, the known methods first, in the order of :data:`METHODS`."""
    known = list(METHODS)
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def colormap(num_colors: int) -> list[Any]:
    """``num_colors`` colours spread over :data:`SEQUENTIAL`, for things that are no methods."""
    import matplotlib as mpl

    shades = mpl.colormaps[SEQUENTIAL]
    return [shades((i + 0.5) / max(num_colors, 1)) for i in range(num_colors)]
