"""What a claim is, what the tables say on it, and the rule that turns a number into a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fluxlib import records
from fluxlib.analysis.claims import stored
from fluxlib.analysis.claims.races import REFERENCE, races, timed
from fluxlib.analysis.statistics import geometric, interval
from fluxlib.analysis.studies import verdicts
from fluxlib.analysis.wording import models_in_order as in_order
from fluxlib.analysis.wording import sentence, shown, shown_interval
from fluxlib.figures.canvas import clock_shapes
from fluxlib.figures.quality import final_quality

MODELLED = "modelled"
"""Source of numbers that no seed changes."""
AGREES, DIRECTION, DIFFERS = verdicts.AGREES, verdicts.DIRECTION, verdicts.DIFFERS
MISSING = "not attempted"
VERDICTS = (AGREES, DIRECTION, MISSING, DIFFERS)
"""From the best to the worst: what was found to differ outweighs what was not attempted."""


@dataclass(frozen=True)
class Tables:
    """All that a profile left: tables, and the parameters of its runs; None or empty where nothing is."""

    rounds: pd.DataFrame | None = None
    participants: pd.DataFrame | None = None
    measurements: dict[str, dict[str, pd.DataFrame]] = field(default_factory=dict)
    """By notebook, e.g. ``01_profiling``, and model."""
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By run id."""
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By benchmark, e.g. ``experts``."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Runs whose tables are there but are not read, by run id, and why (:func:`fluxlib.analysis.claims.stored.left_out`)."""

    @cached_property
    def plain_races(self) -> pd.DataFrame:
        """:func:`fluxlib.analysis.claims.races.races` of the unchanged runs, all with the same number of rounds."""
        return races(None if self.rounds is None else self.rounds[self.rounds["variant"] == ""])

    @cached_property
    def timed_races(self) -> pd.DataFrame:
        """The same with longer runs where there are such (:func:`fluxlib.analysis.claims.races.timed`)."""
        return races(None if self.rounds is None else timed(self.rounds))

    @cached_property
    def quality(self) -> pd.DataFrame:
        """:func:`fluxlib.figures.quality.final_quality` of the plain runs, and of longer ones."""
        assert self.rounds is not None
        return final_quality(self.rounds[self.rounds["variant"] == ""], timed(self.rounds, [""]), REFERENCE)

    def plain(self, timed: bool = False) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
        """Model by model: its name, the ``rounds`` of its unchanged runs, and their races (``timed`` or plain)."""
        if self.rounds is not None:
            rows = self.rounds[self.rounds["variant"] == ""]
            raced = self.timed_races if timed else self.plain_races
            raced = raced[raced["variant"] == ""]  # what goes beyond the paper is no evidence for its claims
            for name in in_order(rows["model"]):
                yield name, of_model(rows, name), of_model(raced, name)


def of_model(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows of one model, given by its last name."""
    return table[[Path(model).name == name for model in table["model"]]]


def clock_of(rounds: pd.DataFrame) -> str:
    """Which clock the seconds of ``rounds`` are from."""
    return f"device clock, {clock_shapes(rounds)}"


@dataclass(frozen=True)
class Reading:
    """What the tables say on one claim for one model (or whatever ``label`` names)."""

    label: str
    verdict: str
    ours: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    seeds: int = 1
    fewest: int | None = None
    """Seeds of the task that has the fewest, where tasks differ."""
    tasks: tuple[str, ...] = ()
    clock: str = ""
    reached: bool | None = None
    """Whether the number that this project set out to reach was reached; None: none is set, or not all was judged."""
    reason: str = ""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, in the order of the paper.

    Attributes:
        place: where in the paper; a question mark where the number of the figure is inferred.
        paper: the paper's value, in words; ``size`` the same as a number to compare with, None if there is none.
        better: ``larger`` or ``smaller`` than ``size``.
        null: what would be no effect (:func:`fluxlib.analysis.studies.verdicts.judge`); None: 1 or 0, or ``size`` where smaller
            is better. ``size`` itself where the sign cannot come out otherwise.
        reach: the number this project set out to reach (None: none set), shown in ``unit``.
        source: what is measured in ours, and what is modelled.
        needs: the command that makes the tables.
    """

    slug: str
    text: str
    place: str
    paper: str
    source: str
    needs: str
    read: Callable[[Claim, Tables], list[Reading]]
    size: float | None = None
    better: str = "larger"
    reach: float | None = None
    unit: str = ""
    null: float | None = None

    @property
    def bar(self) -> str:
        """The number to reach, in words."""
        if self.reach is None:
            return ""
        return f"{'≤' if self.better == 'smaller' else '≥'} {shown(self.reach, self.unit)}"

    def reached(self, value: float) -> bool | None:
        """Whether ``value`` reaches :attr:`reach`; NaN does not. None: nothing is set."""
        if self.reach is None:
            return None
        return bool(value <= self.reach if self.better == "smaller" else value >= self.reach)


def load(results: Path, benchmarks: Path | None = None) -> Tables:
    """Read what is there; what is not is left empty. Runs that are no evidence are named in ``left_out``, not read.

    Raises:
        TableError: a table that does not fit its schema, by name.
    """
    results = Path(results)
    left_out = stored.left_out(results)
    found: dict[str, pd.DataFrame | None] = {}
    for table in ("rounds", "participants"):
        there = any((results / table).glob("*.parquet"))
        rows = records.read_all(table, results) if there else None
        kept = None if rows is None else rows[~rows["run_id"].isin(list(left_out))].reset_index(drop=True)
        found[table] = kept if kept is not None and len(kept) else None
    measurements: dict[str, dict[str, pd.DataFrame]] = {}
    for path in sorted((results / "measurements").glob("*.parquet")):
        stem, _, model = path.stem.partition("-")
        measurements.setdefault(stem, {})[model] = records.read("measurements", path)
    files = sorted(Path(benchmarks).glob("*.json")) if benchmarks else []
    return Tables(
        found["rounds"],
        found["participants"],
        {stem: {model: by_model[model] for model in in_order(by_model)} for stem, by_model in measurements.items()},
        {run: known for run, known in stored.parameters(results).items() if run not in left_out},
        {path.stem: json.loads(path.read_text()) for path in files},
        left_out,
    )


def read_size(
    claim: Claim,
    label: str,
    values: np.ndarray,
    tasks: Iterable[str] = (),
    why: str = "",
    clock: str = "",
    null: np.ndarray | None = None,
) -> Reading:
    """A number per seed held against the paper's by the one rule of :mod:`fluxlib.analysis.studies.verdicts`.

    Factors (unit ``x``) are averaged geometrically. An interval that includes no effect is told.

    Args:
        null: no effect of each seed; None: the claim's.
        why: told as it is, whatever the verdict.
    """
    assert claim.size is not None
    values, seeded = np.asarray(values, dtype=float), claim.source != MODELLED
    ratio, no_effect = claim.unit == "x", claim.null if null is None else null
    value, low, high = geometric(values) if ratio else interval(values)
    verdict = verdicts.judge(values, claim.size, claim.better, no_effect, ratio, seeded)
    parts = [few(len(values)) if seeded else "", _short(claim, values, value, no_effect, verdict), why]
    return Reading(
        label, verdict, shown_interval(value, low, high, claim.unit), value, low, high, len(values), None, tuple(tasks),
        clock, claim.reached(value), sentence(parts),
    )  # fmt: skip


def few(seeds: int) -> str:
    """What is said of too few seeds; nothing where there are enough, or none."""
    least = verdicts.MIN_SEEDS
    return f"{seeds} seed{'s' * (seeds > 1)} of {least} needed, so in direction at most" if 0 < seeds < least else ""


def _short(claim: Claim, values: np.ndarray, value: float, null: Any, verdict: str) -> str:
    """By how much a number misses the paper's, and whether it may be nothing."""
    size = float(claim.size or 0.0)
    if claim.better == "smaller":
        if value > size:
            return f"{value / size:.2g} times the paper's"
        some = verdict == DIRECTION and len(values) >= verdicts.MIN_SEEDS
        return "not clear of no effect in every seed and the interval" if some else ""
    turn = (1.0 if size >= 1 else 0.0) if null is None else float(null)
    if null is not None and turn == size:
        return f"{shown(value / size, '%')} of the paper's" if value < size else ""
    low = (geometric(values) if claim.unit == "x" else interval(values))[1]
    against = int((values <= turn).sum())
    parts = [f"{shown(value / size, '%')} of the paper's"] if turn < value < size else []
    if against:
        told = f"the other way in {against} of {len(values)} seeds" if len(values) > 1 else "the other way"
        return "; ".join([told, *parts])
    if low <= turn:
        parts = [f"in every seed, but the interval includes {shown(turn, claim.unit)}", *parts]
    return "; ".join(parts)
