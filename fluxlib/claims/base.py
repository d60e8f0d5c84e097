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
from fluxlib.claims.numbers import geometric, in_order, shown, shown_interval
from fluxlib.claims.races import races, timed
from fluxlib.figures.canvas import clock_shapes, interval
from fluxlib.studies import verdicts

AGREES, DIRECTION, DIFFERS, MISSING = VERDICTS = ("agrees", "agrees in direction", "does not", "not attempted")
"""From the best to no evidence."""


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

    @cached_property
    def plain_races(self) -> pd.DataFrame:
        """:func:`fluxlib.claims.races.races` of the unchanged runs, all with the same number of rounds."""
        return races(None if self.rounds is None else self.rounds[self.rounds["variant"] == ""])

    @cached_property
    def timed_races(self) -> pd.DataFrame:
        """The same with the runs that were continued for as long as FMD's (:func:`fluxlib.claims.races.timed`)."""
        return races(None if self.rounds is None else timed(self.rounds))

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
    tasks: tuple[str, ...] = ()
    clock: str = ""
    reached: bool | None = None
    """Whether the number that this project set out to reach was reached; None: there is none."""
    reason: str = ""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, in the order of the paper.

    Attributes:
        place: where in the paper; a question mark where the number of the figure is inferred.
        paper: the paper's value, in words; ``size`` the same as a number to compare with, None if there is none.
        better: ``larger`` or ``smaller`` than ``size``.
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

    @property
    def bar(self) -> str:
        """The number to reach, in words."""
        if self.reach is None:
            return ""
        return f"{'≤' if self.better == 'smaller' else '≥'} {shown(self.reach, self.unit)}"

    def reached(self, value: float) -> bool | None:
        """Whether ``value`` reaches :attr:`reach`."""
        if self.reach is None:
            return None
        return bool(value <= self.reach if self.better == "smaller" else value >= self.reach)


def load(results: Path, benchmarks: Path | None = None) -> Tables:
    """Read what is there; what is not is left empty.

    Raises:
        TableError: a table that does not fit its schema, by name.
    """
    results = Path(results)
    found: dict[str, pd.DataFrame | None] = {}
    for table in ("rounds", "participants"):
        there = any((results / table).glob("*.parquet"))
        found[table] = records.read_all(table, results) if there else None
    measurements: dict[str, dict[str, pd.DataFrame]] = {}
    for path in sorted((results / "measurements").glob("*.parquet")):
        stem, _, model = path.stem.partition("-")
        measurements.setdefault(stem, {})[model] = records.read("measurements", path)
    about = {path.stem: json.loads(path.read_text()) for path in sorted((results / "rounds").glob("*.json"))}
    files = sorted(Path(benchmarks).glob("*.json")) if benchmarks else []
    return Tables(
        found["rounds"],
        found["participants"],
        {stem: {model: by_model[model] for model in in_order(by_model)} for stem, by_model in measurements.items()},
        {run: content.get("parameters", {}) for run, content in about.items()},
        {path.stem: json.loads(path.read_text()) for path in files},
    )


def read_size(
    claim: Claim, label: str, values: np.ndarray, tasks: Iterable[str] = (), why: str = "", clock: str = ""
) -> Reading:
    """A number per seed held against the paper's; factors (unit ``x``) are averaged geometrically.

    The rule is that of the study notebooks (:func:`fluxlib.studies.verdicts.judge`): ``agrees``: the mean over seeds
    reaches the paper's size, and every seed points its way. ``agrees in direction``: every seed points the paper's way,
    the mean falls short of its size. ``does not``: anything else; where smaller is better there is a size only. An
    interval that includes no difference at all does not change the verdict; it is told.
    """
    assert claim.size is not None
    values = np.asarray(values, dtype=float)
    value, low, high = geometric(values) if claim.unit == "x" else interval(values)
    verdict = verdicts.judge(values, claim.size, claim.better, value)
    turn = 1.0 if claim.size >= 1 else 0.0
    unsure = verdict != DIFFERS and claim.better == "larger" and low <= turn < high
    parts = [f"in every seed, but the interval includes {shown(turn, claim.unit)}"] if unsure else []
    parts += [_short(claim, values, value), why] if verdict != AGREES else []
    return Reading(
        label, verdict, shown_interval(value, low, high, claim.unit), value, low, high, len(values), tuple(tasks),
        clock, claim.reached(value), "; ".join(part for part in parts if part),
    )  # fmt: skip


def _short(claim: Claim, values: np.ndarray, value: float) -> str:
    """By how much a number misses the paper's."""
    size = float(claim.size or 0.0)
    if claim.better == "smaller":
        return f"{value / size:.2g} times the paper's"
    against = int((values <= (1.0 if size >= 1 else 0.0)).sum())
    if against:
        return f"the other way in {against} of {len(values)} seeds" if len(values) > 1 else "the other way"
    return f"{shown(value / size, '%')} of the paper's"
