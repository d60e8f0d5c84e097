"""The tables that tell on the claims, and numbers per seed from them, as ``claims.yaml`` names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from fluxlib import records
from fluxlib.analysis import store
from fluxlib.analysis.speedups import against_all
from fluxlib.analysis.wording import models_in_order

JOINS = {
    "over": lambda one, other: one / other,
    "below": lambda one, other: 1 - one / other,
    "above": lambda one, other: one / other - 1,
    "minus": lambda one, other: one - other,
}
"""How a setting is held against another: a factor, how far below or above as a share of it, a difference."""


@dataclass(frozen=True)
class Tables:
    """All that a profile left; None or empty where nothing is."""

    rounds: pd.DataFrame | None = None
    participants: pd.DataFrame | None = None
    measurements: dict[str, dict[str, pd.DataFrame]] = field(default_factory=dict)
    """By notebook, e.g. ``01_profiling``, and model."""
    folder: Path | None = None
    """Where they lie."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Runs that did not finish, by run id, and why: they are no evidence and in none of the tables."""

    @cached_property
    def times(self) -> pd.DataFrame:
        """:func:`fluxlib.analysis.speedups.against_all` of all runs."""
        assert self.rounds is not None
        return against_all(self.rounds)

    def runs(self, variant: str = "") -> Iterator[tuple[str, pd.DataFrame]]:
        """Model by model: its name, and the ``rounds`` of its runs of one variant, or its plain ones."""
        if self.rounds is not None:
            rows = self.rounds[self.rounds["variant"] == variant]
            for name in models_in_order(rows["model"]):
                yield name, of_model(rows, name)


def of_model(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows of one model, given by its last name."""
    return table[[Path(model).name == name for model in table["model"]]]


def load(results: Path) -> Tables:
    """Read what is there of one profile's results, such as ``data/results/full``; what is not is left empty."""
    rounds, participants = (store.finished(Path(results), table) for table in ("rounds", "participants"))
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for path in (Path(results) / "measurements").glob("*.parquet"):
        stem, _, model = path.stem.partition("-")
        found.setdefault(stem, {})[model] = records.read("measurements", path)
    ordered = {stem: {name: found[stem][name] for name in models_in_order(found[stem])} for stem in sorted(found)}
    return Tables(rounds, participants, ordered, Path(results), records.unfinished(results))


def values(table: pd.DataFrame, spec: Mapping[str, Any]) -> pd.Series:
    """One value per seed: the mean per task, then over tasks; empty where the table lacks what it needs.

    ``spec``: ``study``, and if given ``setting``, ``x`` and ``layer``; ``reduce``, of a task's rows, in place of the
    mean; one of :data:`JOINS` with the other setting, or the other ``x`` where that is ``first`` or ``last``. The two
    meet by seed and task, of those that both have.
    """
    rows = table[table["study"] == spec["study"]]
    if spec.get("layer") == "last":
        rows = rows[rows["layer"] == rows["layer"].max()]
    ends = {"first": rows["x"].min(), "last": rows["x"].max()}
    join, setting = next((name for name in JOINS if name in spec), None), spec.get("setting")

    def cells(setting: str | None, x: Any) -> pd.Series:
        kept = rows if setting is None else rows[rows["setting"] == setting]
        kept = kept if x is None else kept[kept["x"] == ends.get(x, x)]
        return kept.groupby(["seed", "task"])["value"].agg(spec.get("reduce", "mean"))

    one = cells(setting, spec.get("x"))
    if join is None:
        return one.groupby("seed").mean()
    other = cells(setting, spec[join]) if spec[join] in ends else cells(spec[join], spec.get("x"))
    other = other[:0] if spec[join] in ends and ends["first"] == ends["last"] else other
    both = one.index.intersection(other.index)
    return JOINS[join](*(part.loc[both].groupby("seed").mean().astype(float) for part in (one, other)))


def tasks_of(table: pd.DataFrame) -> tuple[str, ...]:
    """Tasks of a table, in its order."""
    return tuple(task for task in table["task"].unique() if task)
