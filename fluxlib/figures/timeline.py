"""Figure: what ran when in a few rounds, participant by participant."""

from __future__ import annotations

import pandas as pd

from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, caption, drawn, unique

SERVER_COLORS = {"aggregate": "#000000", "evaluate": "#BBBBBB"}
OTHER_COLOR = "#DDDDDD"
"""So that neighbours can be told apart without colours."""
BESIDE = ("quantize", "profile", "first_profile")
"""Phases drawn in the lower half of a participant's lane: they may lie beside others."""


@drawn
def timeline(table: pd.DataFrame, first_round: int = 2, last_round: int = 3, clock: str = "device") -> Picture:
    """Phases of the server and of each participant as bars over time.

    Args:
        table: the ``timeline`` table of one run.
        first_round: round with which the picture begins.
        last_round: round with which it ends.
        clock: ``device`` or ``wall``.

    Raises:
        ValueError: nothing was recorded for these rounds and this clock.
    """
    shown = table[(table["clock"] == clock) & table["round"].between(first_round, last_round)]
    if shown.empty:
        raise ValueError(
            f"no {clock!r} rows of rounds {first_round} to {last_round}; there are {sorted(set(table['round']))}"
        )
    people = sorted(set(shown["participant"]))
    figure = Picture(figsize=(7.5, 1.2 + 0.28 * len(people)))
    ax = axes_grid(figure, 1, 1)[0, 0]
    begin = shown["start_s"].min()
    for phase, bars in shown.groupby("phase", sort=False):
        color = (style.PHASE_COLORS | SERVER_COLORS).get(str(phase), OTHER_COLOR)
        lanes = [people.index(participant) for participant in bars["participant"]]
        low = 0.02 if phase in BESIDE else -0.4
        height = 0.38 if phase in BESIDE or phase == "upload" else 0.8
        ax.barh(
            [lane + low + height / 2 for lane in lanes], bars["end_s"] - bars["start_s"], height,
            left=bars["start_s"] - begin, color=color, edgecolor=color if phase in SERVER_COLORS else "white",
            linewidth=0.4, hatch=style.PHASE_HATCHES.get(str(phase)), label=str(phase),
        )  # fmt: skip
    for number, rows in shown.groupby("round"):
        end = rows["end_s"].max() - begin
        ax.axvline(end, color="0.4", linewidth=0.7, linestyle=":")
        ax.annotate(f"round {number}", (end, -0.7), ha="right", va="bottom", fontsize=7, annotation_clip=False)
    names = ["server" if participant < 0 else str(participant) for participant in people]
    ax.set(yticks=range(len(people)), yticklabels=names, ylabel="participant", xlabel=f"{style.CLOCKS[f'{clock}_s']}")
    ax.set_ylim(len(people) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    how = "profiles for the next round lie beside upload and server" if clock == "device" else "as measured here"
    caption(figure, unique(table, "run_id"), f"{clock} clock, from the start of round {first_round}", how)
    return figure
