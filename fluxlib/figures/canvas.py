"""What every figure shares: the canvas, the files it becomes, and intervals over seeds."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fluxlib.analysis.statistics import interval as interval
from fluxlib.figures import style

P = ParamSpec("P")


class Picture(Figure):
    """A figure that shows itself in a notebook; it lives outside pyplot, so nothing global refers to it."""

    def _repr_png_(self) -> bytes:
        return _render(self, "png")


def drawn(function: Callable[P, Picture]) -> Callable[P, Picture]:
    """Call ``function`` within the project's style, leaving matplotlib's settings as they were."""

    @wraps(function)
    def draw(*args: P.args, **kwargs: P.kwargs) -> Picture:
        with mpl.rc_context(style.RC):
            return function(*args, **kwargs)

    return draw


def save(figure: Figure, slug: str, folder: Path | str, data: pd.DataFrame) -> dict[str, Path]:
    """Write ``<folder>/<slug>.{pdf,png,csv}``: the figure twice, and the numbers it shows.

    The same figure gives the same bytes: no date is stored. Files appear whole or not at all.

    Raises:
        ValueError: ``slug`` is not lower-case letters, digits, ``_``, ``-`` and ``.``.
    """
    check_slug(slug)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "pdf": _render(figure, "pdf"),
        "png": _render(figure, "png"),
        "csv": data.to_csv(index=False, lineterminator="\n").encode(),
    }
    paths = {}
    for kind, content in contents.items():
        paths[kind] = folder / f"{slug}.{kind}"
        temporary = folder / f".{slug}.{kind}.{os.getpid()}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, paths[kind])
    return paths


def check_slug(slug: str) -> None:
    """Refuse a name that a link in a text would break on.

    Raises:
        ValueError: see :func:`save`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", slug):
        raise ValueError(f"slug is {slug!r}, allowed are letters, digits, '_', '-' and '.'")


def _render(figure: Figure, kind: str) -> bytes:
    metadata = {"CreationDate": None} if kind == "pdf" else {}
    buffer = io.BytesIO()
    with mpl.rc_context(style.RC):
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def interval_name(num_seeds: int) -> str:
    """What a band or an error bar shows, for the caption."""
    if num_seeds == 1:
        return "1 seed: no band"
    return f"{num_seeds} seeds: mean and " + ("min to max" if num_seeds == 2 else "95 % t interval")


def caption(figure: Figure, *parts: str) -> None:
    """Write the small print below ``figure``: clock, model, seeds."""
    figure.supxlabel(" · ".join(part for part in parts if part), fontsize=7, color="#444444")


@drawn
def notice(text: str) -> Picture:
    """A picture that says why there is none."""
    figure = Picture(figsize=(5.5, 0.8))
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=8)
    return figure


def unique(frame: pd.DataFrame, column: str) -> str:
    """The values of ``column``, joined: what a caption says of it."""
    return ", ".join(str(value) for value in pd.unique(frame[column]))


def clock_shapes(frame: pd.DataFrame) -> str:
    """Whose shapes and which link the device clock of ``frame`` uses, for captions and sentences."""
    own = frame["clock_model"] == "self"
    names = frame["clock_model"].where(~own, frame["model"].map(lambda name: Path(name).name))
    return f"{', '.join(pd.unique(names))} over {unique(frame, 'link')}"


def seeds_name(frame: pd.DataFrame) -> str:
    """:func:`interval_names` of a table of runs, counted by model, task and method."""
    return interval_names(frame.groupby(["model", "task", "method"])["seed"].nunique())


def interval_names(counts: pd.Series) -> str:
    """:func:`interval_name` where some curves may have more seeds than others."""
    if counts.min() == counts.max():
        return interval_name(int(counts.max()))
    return f"{counts.min()} to {counts.max()} seeds: one, no band; two, min to max; three, 95 % t interval"


def axes_grid(figure: Figure, rows: int, columns: int, **kwargs: Any) -> np.ndarray:
    """``[rows, columns]`` axes, an array even when there is one."""
    return np.asarray(figure.subplots(rows, columns, squeeze=False, **kwargs))
