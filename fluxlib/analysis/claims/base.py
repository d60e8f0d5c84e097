"""What a claim is (the list is ``claims.yaml``), and the tables that tell on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fluxlib import records
from fluxlib.analysis import store
from fluxlib.analysis.runs import final_quality
from fluxlib.analysis.speedups import REFERENCE, against_all, longest
from fluxlib.analysis.wording import models_in_order, shown

SOURCES = {"both": "scores and bytes measured, seconds modelled"}
REPRODUCE = "run `make reproduce PROFILE=full`"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, or of ours beyond it; the fields are explained in ``claims.yaml``."""

    slug: str
    claim: str
    source: str
    ours: Mapping[str, Any]
    place: str = ""
    paper: str = ""
    size: float | None = None
    better: str = "larger"
    none: float | None = None
    reach: float | None = None
    unit: str = ""
    notebook: str = ""
    without: Mapping[str, Any] | None = None
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    clock: str = ""
    needs: str = ""
    beyond: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether seeds differ: not where all is modelled."""
        return self.source != "modelled"

    @property
    def missing(self) -> str:
        """What to do for tables that tell."""
        return self.needs or REPRODUCE + (f": notebook `{self.notebook}`" if self.notebook else "")

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


EVERY = tuple(Claim(**entry) for entry in yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text()))
CLAIMS = tuple(claim for claim in EVERY if not claim.beyond)
"""The paper's, in its order."""


@dataclass(frozen=True)
class Tables:
    """All that a profile left; None or empty where nothing is."""

    rounds: pd.DataFrame | None = None
    participants: pd.DataFrame | None = None
    measurements: dict[str, dict[str, pd.DataFrame]] = field(default_factory=dict)
    """By notebook, e.g. ``01_profiling``, and model."""
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By benchmark, e.g. ``experts``."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Runs that did not finish, by run id, and why: they are no evidence and in none of the tables."""

    @cached_property
    def times(self) -> pd.DataFrame:
        """:func:`fluxlib.analysis.speedups.against_all` of plain and improved runs, the longest of each."""
        assert self.rounds is not None
        return against_all(longest(self.rounds))

    @cached_property
    def quality(self) -> pd.DataFrame:
        """:func:`fluxlib.analysis.runs.final_quality` of the plain runs, and of longer ones."""
        assert self.rounds is not None
        return final_quality(self.rounds[self.rounds["variant"] == ""], longest(self.rounds, [""]), REFERENCE)

    def plain(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Model by model: its name, and the ``rounds`` of its unchanged runs."""
        if self.rounds is not None:
            rows = self.rounds[self.rounds["variant"] == ""]
            for name in models_in_order(rows["model"]):
                yield name, of_model(rows, name)


def of_model(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows of one model, given by its last name."""
    return table[[Path(model).name == name for model in table["model"]]]


def load(results: Path, benchmarks: Path | None = None) -> Tables:
    """Read what is there; what is not is left empty.

    Raises:
        TableError: a table that does not fit its schema, by name.
    """
    rounds, participants = (store.finished(Path(results), table) for table in ("rounds", "participants"))
    measurements: dict[str, dict[str, pd.DataFrame]] = {}
    for path in sorted((Path(results) / "measurements").glob("*.parquet")):
        stem, _, model = path.stem.partition("-")
        measurements.setdefault(stem, {})[model] = records.read("measurements", path)
    files = sorted(Path(benchmarks).glob("*.json")) if benchmarks else []
    return Tables(
        rounds,
        participants,
        {stem: {name: by_model[name] for name in models_in_order(by_model)} for stem, by_model in measurements.items()},
        {path.stem: json.loads(path.read_text()) for path in files},
        records.unfinished(results),
    )
