"""Who is ahead on other devices and links (notebook 06): tables and a heat map from recounted ``rounds``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.colors import LogNorm

from fluxlib.analysis.statistics import geometric
from fluxlib.devices import catalogue
from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, caption, drawn, notice, unique
from fluxlib.figures.times import FINAL_ROUNDS, times_to_target

PLACE = ["model", "task", "fleet", "link"]
REACHED, AT_LEAST, AT_MOST, NEITHER = "", "at least", "at most", "neither"
"""What a speed-up is where somebody missed the target: the baseline, FLUX, or both."""
FULL = 1 + 1e-6
"""What offloads fills the memory to the last byte, and bytes are rounded."""


def comparable(rounds: pd.DataFrame, method: str = "flux", reference: str = "fmd") -> pd.DataFrame:
    """The models and tasks of ``rounds`` for which both methods have runs: without them there is nothing to compare."""
    groups = rounds.groupby(["model", "task"])["method"]
    return rounds[groups.transform(lambda names: {method, reference} <= set(names)).astype(bool)]


def speedups(
    recounted: pd.DataFrame, target_fraction: float = 0.95, method: str = "flux", reference: str = "fmd"
) -> pd.DataFrame:
    """How much sooner ``method`` is at the target than each other method, in device seconds.

    Args:
        recounted: of :func:`fluxlib.analysis.studies.sensitivity.recounts`.
        target_fraction: share of the reference's final score, see :func:`fluxlib.figures.times.times_to_target`.

    Returns:
        One row per model, task, fleet, link, ``baseline`` and seed that both have: ``speedup`` is the baseline's time
        over that of ``method``. A run that never reached the target took at least as long as it was
        followed, so ``bound`` says whether the speed-up is at least or at most that; ``neither``: nothing is known.
        ``fits`` and ``baseline_fits``: whether the predicted memory of a step is there on every device.
    """
    rows: list[dict[str, Any]] = []
    kept = comparable(recounted, method, reference)
    for place, part in kept.groupby(["fleet", "link"], sort=False) if len(kept) else ():
        times = times_to_target(part, target_fraction, reference, FINAL_ROUNDS)
        keys = ["model", "task", "method", "seed"]
        ends = part.groupby(keys).agg(end_s=("device_s", "max"), memory_share=("memory_share", "max"))
        times = times.merge(ends.reset_index(), on=keys)
        times["at_least_s"] = times["device_s"].fillna(times["end_s"])
        for (model, task), runs in times.groupby(["model", "task"], sort=False):
            own, others = runs[runs["method"] == method], runs[runs["method"] != method]
            for name, other in others.groupby("method", sort=False):
                fixed = dict(zip(PLACE, (model, task, *place), strict=True)) | {"baseline": name}
                pairs = own.merge(other, on="seed", suffixes=("", "_of_baseline"))
                rows += [fixed | _one(pair) for pair in pairs.to_dict("records")]
    return pd.DataFrame(rows, columns=None if rows else [*PLACE, "baseline", "seed", "speedup", "bound"])


def _one(run: Mapping[Any, Any]) -> dict[str, Any]:
    """One seed against the other method's run with it."""
    missed, other_missed = math.isnan(run["device_s"]), math.isnan(run["device_s_of_baseline"])
    bounds = {(False, False): REACHED, (False, True): AT_LEAST, (True, False): AT_MOST, (True, True): NEITHER}
    bound, base_s = bounds[missed, other_missed], run["at_least_s_of_baseline"]
    return {
        "seed": run["seed"],
        "speedup": math.nan if bound == NEITHER else base_s / run["at_least_s"],
        "bound": bound,
        "seconds_at_least": run["at_least_s"],
        "baseline_seconds_at_least": base_s,
        "target": run["target"],
        "target_fraction": run["target_fraction"],
        "clock_model": run["clock_model"],
        "fits": run["memory_share"] <= FULL,
        "baseline_fits": run["memory_share_of_baseline"] <= FULL,
    }


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """One row per cell of the heat map: geometric mean and interval over seeds, and what it is worth (``bound``)."""
    rows = []
    for key, part in table.groupby([*PLACE, "baseline"], sort=False):
        mean, low, high = geometric(part["speedup"])
        found = set(part["bound"]) - {REACHED}
        # A mean of lower bounds and values is a lower bound; of lower and upper bounds it is nothing.
        bound = found.pop() if len(found) == 1 else (NEITHER if found else REACHED)
        rows.append(
            dict(zip([*PLACE, "baseline"], key, strict=True))
            | {"speedup": math.nan if bound == NEITHER else mean, "low": low, "high": high, "bound": bound}
            | {"num_seeds": part["seed"].nunique()}
            | {name: bool(part[name].all()) for name in ("fits", "baseline_fits")}
        )
    return pd.DataFrame(rows)


@drawn
def draw(table: pd.DataFrame) -> Picture:
    """Heat map of :func:`speedups`: a row of panels per baseline, a column per task; fleets down, links across.

    Only what is known to be a speed-up is coloured; hatched: FLUX is later. A bound is written with its sign, a dash
    where both missed; brackets: FLUX's step would not fit in the memory of every device of that fleet.
    """
    if table.empty:
        return notice("No FLUX and FMD runs of this model that can be counted anew: older ones kept no works.")
    cells = over_seeds(table)
    baselines, tasks = style.order(cells["baseline"]), list(pd.unique(cells["task"]))
    fleets, links = list(pd.unique(cells["fleet"])), list(pd.unique(cells["link"]))
    width, height = 2.2 + 1.6 * len(tasks), 0.8 + (0.4 + 0.2 * len(fleets)) * len(baselines)
    figure = Picture(figsize=(max(5.4, width), height))
    axes = axes_grid(figure, len(baselines), len(tasks), sharex=True, sharey=True)
    shown = cells.loc[cells["bound"].isin([REACHED, AT_LEAST]), "speedup"].dropna()
    low, high = min([0.5, *shown]), max([2.0, *shown])
    norm = LogNorm(low, high)
    for (row, baseline), (column, task) in itertools.product(enumerate(baselines), enumerate(tasks)):
        ax = axes[row, column]
        here = cells[(cells["baseline"] == baseline) & (cells["task"] == task)].set_index(["fleet", "link"])
        _panel(ax, here, fleets, links, norm)
        ax.set_title(f"{task}\n" * (row == 0) + f"over {style.method(baseline).title}")
        ax.set_xticks(range(len(links)), [catalogue.LINKS[name].title for name in links], fontsize=7)
        ax.set_yticks(range(len(fleets)), [name.replace("paper", "paper (L20)") for name in fleets], fontsize=7)
    bar = figure.colorbar(mpl.cm.ScalarMappable(norm, style.SEQUENTIAL), ax=axes, fraction=0.03, pad=0.02)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    bar.set_label("FLUX sooner by this factor")
    share = f"{table['target_fraction'].iloc[0]:.0%}".replace("%", " %")
    seeds = int(cells["num_seeds"].min())
    caption(
        figure,
        f"{unique(table, 'model')}: time to {share} of FMD's final score",
        f"geometric mean of {seeds} seed(s)\ndevice clock, shapes of {unique(table, 'clock_model')}",
        "hatched: FLUX is later",
        "( ): FLUX's step exceeds the memory\n\u2265: the baseline never got there",
        "\u2264: FLUX did not in every seed",
        "\u2013: neither",
    )
    return figure


def _panel(ax: Any, cells: pd.DataFrame, fleets: list[str], links: list[str], norm: Any) -> None:
    for (y, fleet), (x, link) in itertools.product(enumerate(fleets), enumerate(links)):
        cell: Any = cells.loc[(fleet, link)] if (fleet, link) in cells.index else None
        known = cell is not None and cell["bound"] in (REACHED, AT_LEAST)
        color = mpl.colormaps[style.SEQUENTIAL](norm(cell["speedup"])) if cell is not None and known else (1.0,) * 4
        later = cell is not None and cell["speedup"] < 1 and cell["bound"] in (REACHED, AT_MOST)
        square = mpl.patches.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="#bbbbbb", linewidth=0.5)
        square.set_hatch("////" if later else "")
        ax.add_patch(square)
        dark = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] < 0.5
        box = {"facecolor": color, "edgecolor": "none", "pad": 0.6} if later else None
        text = _text(cell) if cell is not None else ""
        ax.text(x, y, text, ha="center", va="center", fontsize=7, color="w" if dark else "k", bbox=box)
    ax.set_xlim(-0.5, len(links) - 0.5)
    ax.set_ylim(len(fleets) - 0.5, -0.5)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)


def _text(cell: pd.Series) -> str:
    """A cell's number with its sign, in brackets where the memory would not do."""
    value, sign = cell["speedup"], {REACHED: "", AT_LEAST: "\u2265", AT_MOST: "\u2264"}.get(cell["bound"])
    if sign is None or math.isnan(value):
        return "\u2013"
    text = sign + (f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}")
    return text if cell["fits"] else f"({text})"
