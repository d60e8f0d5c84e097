"""What every figure shares: the picture and its files, rows of tables, small print."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, ParamSpec

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.style import context

from fluxlib.analysis.wording import clock_shapes
from fluxlib.figures import style
from fluxlib.io import replacing

P = ParamSpec("P")


class Picture(Figure):
    """A figure that shows itself in a notebook; it lives outside pyplot, so nothing global refers to it."""

    numbers: pd.DataFrame
    """What it shows: the rows that :func:`save` writes beside it."""

    @cached_property
    def png(self) -> bytes:
        """As it is when first asked for: a picture that is written and then shown is drawn once."""
        return _render(self, "png")

    def _repr_png_(self) -> bytes:
        return self.png


def drawn(function: Callable[P, Picture]) -> Callable[P, Picture]:
    """Call ``function`` within the project's style, leaving matplotlib's settings as they were."""

    @wraps(function)
    def draw(*args: P.args, **kwargs: P.kwargs) -> Picture:
        with context(style.SHEET):
            return function(*args, **kwargs)

    return draw


def panels(numbers: pd.DataFrame, size: tuple[float, float], rows: int = 1, columns: int = 1, **kwargs: Any) -> Any:
    """An empty picture of ``numbers``, ``size`` inches large, and its axes (of ``Figure.subplots``)."""
    figure = Picture(figsize=size)
    figure.numbers = numbers
    return figure, figure.subplots(rows, columns, **kwargs)


@drawn
def notice(text: str, numbers: pd.DataFrame) -> Picture:
    """A picture that says why there is none."""
    figure = Picture(figsize=(5.5, 0.8))
    figure.numbers = numbers
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=8)
    return figure


def save(figure: Picture, slug: str, folder: Path | str, numbers: pd.DataFrame | None = None) -> dict[str, Path]:
    """Write ``<folder>/<slug>.{pdf,png,csv}``: the figure twice, and the numbers it shows (or those given).

    The same figure gives the same bytes: no date is stored. Files appear whole or not at all. ValueError: ``slug`` has
    other characters, on which a link in a text would break.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", slug):
        raise ValueError(f"slug is {slug!r}, allowed are letters, digits, '_', '-' and '.'")
    csv = (figure.numbers if numbers is None else numbers).to_csv(index=False, lineterminator="\n").encode()
    contents = {"pdf": _render(figure, "pdf"), "png": figure.png, "csv": csv}
    paths = {kind: Path(folder) / f"{slug}.{kind}" for kind in contents}
    for kind, content in contents.items():
        with replacing(paths[kind]) as temporary:
            temporary.write_bytes(content)
    return paths


def _render(figure: Figure, kind: str) -> bytes:
    metadata = {"CreationDate": None} if kind == "pdf" else {}
    buffer = io.BytesIO()
    with context(style.SHEET):
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def study(table: pd.DataFrame, *names: str) -> pd.DataFrame:
    """The rows of some studies of the ``measurements`` table; ValueError: one of them has none."""
    present = table["study"].unique()
    if missing := [name for name in names if name not in present]:
        raise ValueError(f"measurements hold no study {missing[0]!r}; there are {', '.join(present)}")
    return table[table["study"].isin(names)]


def split(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    """``rows`` with the parts of ``setting``, which is written ``"a, b, c"``, as columns."""
    parts = rows["setting"].str.split(", ", n=len(names) - 1, expand=True)
    return rows.assign(**{name: parts[i] for i, name in enumerate(names)})


def facets(
    numbers: pd.DataFrame, rows: pd.DataFrame, by: Sequence[str], width: float, height: float, **kwargs: Any
) -> tuple[Picture, list[tuple[Any, pd.DataFrame]]]:
    """A picture of ``numbers`` with a panel ``width`` inches wide for each group of ``rows``, side by side; and room
    for a legend. Every panel comes with its rows, and is named by ``by``."""
    groups = list(rows.groupby(list(by), sort=False))
    size = max(4.4, width * len(groups) + 1.3), height
    figure, axes = panels(numbers, size, 1, len(groups), squeeze=False, **kwargs)
    for ax, (key, _) in zip(axes[0], groups, strict=True):
        ax.set_title("\n".join(Path(str(part)).name for part in key))
    return figure, [(ax, part) for ax, (_, part) in zip(axes[0], groups, strict=True)]


def caption(figure: Figure, *parts: str) -> None:
    """Write the small print below ``figure``; long lines are broken."""
    text = " · ".join(part for part in parts if part)
    width = int(17.5 * figure.get_figwidth())
    figure.supxlabel(textwrap.fill(text, width, break_on_hyphens=False), fontsize=7, color=style.GREY)


def footer(figure: Figure, rows: pd.DataFrame, *parts: str, seeds: str | None = None) -> None:
    """Small print of a table: model, tasks, whose shapes the device clock has, and what bands are, or ``seeds``."""
    names = [name for name in pd.unique(rows["task"]) if name]
    tasks = ", ".join(names) if len(names) < 3 else f"{len(names)} tasks"
    clock = f"device clock: shapes of {clock_shapes(rows)}" if "clock_model" in rows else ""
    caption(figure, unique(rows, "model"), tasks, *parts, clock, seeds_name(rows) if seeds is None else seeds)


def unique(rows: pd.DataFrame, column: str) -> str:
    """The values of ``column``, joined; a folder by its last name."""
    return ", ".join(Path(str(value)).name for value in pd.unique(rows[column]))


def seeds_name(rows: pd.DataFrame) -> str:
    """What bands and error bars are, where some curves may have more seeds than others."""
    counts = rows.groupby([name for name in ("model", "task", "method", "variant") if name in rows])["seed"].nunique()
    if counts.min() < counts.max():
        return f"{counts.min()} to {counts.max()} seeds: one, no band; two, min to max; three, 95 % t interval"
    shown = {1: "1 seed: no band", 2: "2 seeds: mean and min to max"}
    return shown.get(counts.max(), f"{counts.max()} seeds: mean and 95 % t interval")
