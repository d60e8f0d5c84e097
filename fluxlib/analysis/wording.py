"""Numbers, methods, models and clocks in words, as tables, sentences and captions show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from fluxlib.methods import METHODS

REAL_SHAPES = {"mini-llama-moe": "llama-moe-3.5b", "mini-deepseek-moe": "deepseek-moe-16b"}
"""Whose sizes the device clock counts for a mini model; another model counts its own."""
UNITS = {"%": (100, " %"), "x": (1, "×"), "": (1, "")}
"""A claim's units: what a number is multiplied by, and what is written behind it; shares become percent."""
METRICS = {"rouge_l": "ROUGE-L", "exact_match": "exact match", "accuracy": "accuracy"}


def title(method: str) -> str:
    """A method's title without what it says of itself in brackets."""
    return METHODS[method].title.partition(" (")[0] if method in METHODS else method


def methods_in_order(names: Iterable[str]) -> list[str]:
    """``names`` without repeats: the registered methods first, in their order, then others."""
    known = list(METHODS)
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def models_in_order(models: Iterable[str]) -> list[str]:
    """Models without repeats by their last names: the project's own first, in its order."""
    known = list(REAL_SHAPES)
    names = {Path(model).name for model in models}
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def in_order(values: pd.Series) -> pd.Series:
    """A key of ``sort_values`` that puts models in :func:`models_in_order`, and leaves other columns as they are."""
    if values.name != "model":
        return values
    return values.map(lambda model: models_in_order(values).index(Path(model).name))


def percent(value: float) -> str:
    """``95 %``."""
    return f"{100 * value:.0f} %"


def shown(value: float, unit: str = "") -> str:
    """``value`` with three digits in one of :data:`UNITS`."""
    scale, sign = UNITS[unit]
    return f"{scale * value:.3g}{sign}".replace("-", "−")


def shown_interval(value: float, low: float, high: float, unit: str = "") -> str:
    """``value (low to high)``; the interval is left out where there is none."""
    if not (low < high):
        return shown(value, unit)
    ends = (shown(UNITS[unit][0] * end) for end in (low, high))
    return f"{shown(value, unit)} ({' to '.join(ends)})"


def clock_shapes(rounds: pd.DataFrame) -> str:
    """Whose shapes and which link the device clock of ``rounds`` uses."""
    own = rounds["clock_model"] == "self"
    names = rounds["clock_model"].where(~own, rounds["model"].map(lambda name: Path(name).name))
    return f"{', '.join(names.unique())} over {', '.join(rounds['link'].unique())}"


def sentence(parts: Iterable[str]) -> str:
    """What there is to say, one thing after another."""
    return "; ".join(part for part in parts if part)


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; ``|`` in a cell is escaped."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" + ("\n|" + "---|" * len(header)) * (row is lines[0]) for row in lines)
