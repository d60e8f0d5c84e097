"""Figures and tables of single runs side by side, whatever method, variant or folder they are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, caption, clock_shapes, drawn
from fluxlib.figures.plans import draw_roles
from fluxlib.figures.times import CLOCKS, time_to_target

LINES = ("--", "-.", ":")
MARKERS = "vPX*<>hd"
SPARE = ("#009E73", "#CC79A7", "#000000", "#8C6D1F", "#5D3A9B", "#7F7F7F")
"""Looks of runs whose method is drawn already."""


def compare_runs(runs: Mapping[str, pd.DataFrame], target: float) -> pd.DataFrame:
    """Last score and time to ``target`` of each run, one row per run, on every clock.

    Args:
        runs: label to ``rounds`` table of one run.
        target: score to be reached; time to it is NaN where it never is.
    """
    rows = []
    for label, run in runs.items():
        scored = run.dropna(subset=["metric"])
        metrics = scored["metric"].tolist()
        rows.append(
            {"run": label, "rounds": int(run["round"].max()), "metric_name": run["metric_name"].iloc[0]}
            | {"best_metric": float(scored["metric"].max()), "final_metric": float(metrics[-1]) if metrics else np.nan}
            | {"target": target}
            | {f"{clock}_to_target": time_to_target(scored[clock].tolist(), metrics, target) for clock in CLOCKS}
        )
    return pd.DataFrame(rows)


@drawn
def curves(
    runs: Mapping[str, pd.DataFrame],
    clocks: tuple[str, ...] = ("device_s", "wall_s"),
    target: float | None = None,
    roles: Any = None,
    first_round: int = 1,
) -> Picture:
    """Score over time, one line per run, one panel per clock; below them roles over rounds where there are some.

    Args:
        runs: label to ``rounds`` table of one run.
        clocks: columns of ``rounds`` to draw over.
        target: drawn as a line.
        roles: ``[rounds, layers, experts]``, how many participants tuned each expert.
        first_round: of ``roles``.
    """
    with_roles = roles is not None and len(roles) > 0
    figure = Picture(figsize=(4.2 * len(clocks), 3.0 + 2.1 * with_roles))
    parts = np.asarray(figure.subfigures(2, 1, height_ratios=(2.9, 2.1))) if with_roles else (figure, None)
    upper, lower = parts
    axes = np.asarray(upper.subplots(1, len(clocks), squeeze=False))[0]
    looks = _looks(runs)
    for ax, clock in zip(axes, clocks, strict=True):
        for label, run in runs.items():
            _line(ax, run, clock, label, looks[label])
        if target is not None:
            ax.axhline(target, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
            ax.annotate(f"target {target:.3f}", (0.01, target), xycoords=ax.get_yaxis_transform(), ha="left",
                        va="bottom", fontsize=7)  # fmt: skip
        ax.set(xlabel=style.CLOCKS[clock], ylabel=style.METRICS.get(_metric(runs), "score"))
    if runs:
        upper.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=7)
    if with_roles and lower is not None:
        draw_roles(lower, axes_grid(lower, 1, 1)[0, 0], np.asarray(roles, dtype=float), first_round)
    shapes = "; ".join(dict.fromkeys(clock_shapes(run) for run in runs.values() if len(run)))
    caption(figure, f"device clock: shapes of {shapes}" if shapes else "", "one line is one run: no band")
    return figure


def _metric(runs: Mapping[str, pd.DataFrame]) -> str:
    return next((str(run["metric_name"].iloc[0]) for run in runs.values() if len(run)), "")


def _looks(runs: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, Any]]:
    """A method's own look for its first run, spare ones for its others."""
    spare = iter([(color, MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]) for i, color in enumerate(SPARE * 4)])
    found: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for label, run in runs.items():
        method = str(run["method"].iloc[0]) if len(run) else ""
        own = style.method(method)
        color, marker, line = next(spare) if method in seen else (own.color, own.marker, own.line)
        found[label] = {"color": color, "marker": marker, "linestyle": line}
        seen.add(method)
    return found


def _line(ax: Any, run: pd.DataFrame, clock: str, label: str, look: dict[str, Any]) -> None:
    scored = run.dropna(subset=["metric"])
    ax.plot(scored[clock], scored["metric"], label=label, markevery=max(1, len(scored) // 8), **look)
