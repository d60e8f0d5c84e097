"""How figures look: one colour and one marker per method, everywhere; nothing global is touched.

Colours are Okabe and Ito's, chosen so that they also differ in lightness; markers, dashes and hatches differ too, so a
figure can be read in black and white. Sizes and lines are those of :data:`SHEET`, a style sheet of matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

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

PHASES: dict[str, Style] = {
    "download": Style("download", "#0072B2", "", "", ""),
    "merge": Style("merge", "#CC79A7", "", "", "//"),
    "quantize": Style("quantize", "#F0E442", "", "", ".."),
    "profile": Style("profile", "#E69F00", "", "", "xx"),
    "train": Style("train", "#D55E00", "", "", "\\\\"),
    "probe": Style("probe", "#009E73", "", "", "++"),
    "pcie": Style("pcie", "#999999", "", "", "oo"),
    "upload": Style("upload", "#56B4E9", "", "", ""),
    "server": Style("server", "#000000", "", "", ""),
}
"""A round's phases, and the server's, which is none; several colours have one lightness, so hatches differ."""

SHEET = Path(__file__).with_name("style.mplstyle")
DIVERGING = "PuOr"
"""Of factors around 1: orange below, purple above."""
SEQUENTIAL = "cividis"
"""Colour map for shares and counts: even in lightness, safe for colour-blind readers."""
GREY = "#444444"
"""Reference lines and small print."""

CLOCKS = {"device_s": "device clock (s)", "wall_s": "measured here (s)", "round": "round"}


def method(name: str) -> Style:
    """The style of ``name``; a method of your own gets one of three spare styles, always the same."""
    spare = SETTINGS[4 + sum(name.encode()) % 3]
    return METHODS.get(name) or replace(spare, title=title(name))


def of_methods(names: Iterable[str]) -> dict[str, Style]:
    """Styles by method, without repeats: the known methods first."""
    return {name: method(name) for name in methods_in_order(names)}


def of_settings(names: Iterable[Any] | Mapping[Any, str], **changed: str) -> dict[Any, Style]:
    """Styles by setting, in the order in which settings come; a mapping gives each its title; ``changed``: of all."""
    named = names if isinstance(names, Mapping) else {name: name for name in names}
    titles = {name: f"{title:g}" if isinstance(title, float) else str(title) for name, title in named.items()}
    return {name: replace(SETTINGS[i % 7], title=titles[name], **changed) for i, name in enumerate(titles)}


def colored(colors: Mapping[Any, str]) -> dict[Any, Style]:
    """Styles of things that have a colour each, by name; hatches tell them apart as well."""
    return {name: replace(look, color=colors[name]) for name, look in of_settings(list(colors)).items()}


def of_phases(names: Iterable[str]) -> dict[str, Style]:
    """Styles of a round's phases in their order, the server last."""
    present = set(names)
    return {name: look for name, look in PHASES.items() if name in present}


def in_shades(names: Iterable[Any]) -> dict[Any, Style]:
    """Styles of steps of one quantity, such as layers: from dark to light, without the palest."""
    steps = list(names)
    shades = colormaps[SEQUENTIAL]((np.arange(len(steps)) + 0.5) / (len(steps) + 1))
    return colored(dict(zip(steps, map(to_hex, shades), strict=True)))
