"""Numbers in words: shares, factors and intervals as the claims table shows them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fluxlib.analysis.studies import REAL_SHAPES

UNITS = {"%": "{:.3g} %", "x": "{:.3g}×", "": "{:.3g}"}


def in_order(models: Iterable[str]) -> list[str]:
    """Models without repeats by their last names: the project's own first, in its order."""
    known = list(REAL_SHAPES)
    names = {Path(model).name for model in models}
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def shown(value: float, unit: str = "") -> str:
    """``value`` with three digits in a claim's unit; shares become percent."""
    number = 100 * value if unit == "%" else value
    return UNITS[unit].format(number).replace("-", "−")


def shown_interval(value: float, low: float, high: float, unit: str = "") -> str:
    """``value (low to high)``; the interval is left out where there is none."""
    if not (low < high):
        return shown(value, unit)
    scale = 100 if unit == "%" else 1
    ends = " to ".join(f"{scale * end:.3g}".replace("-", "−") for end in (low, high))
    return f"{shown(value, unit)} ({ends})"


def sentence(parts: Iterable[str]) -> str:
    """What there is to say, one thing after another."""
    return "; ".join(part for part in parts if part)
