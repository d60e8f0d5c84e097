"""Numbers per seed from a ``measurements`` table, as ``claims.yaml`` names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

JOINS = {
    "over": lambda one, other: one / other,
    "below": lambda one, other: 1 - one / other,
    "above": lambda one, other: one / other - 1,
    "minus": lambda one, other: one - other,
}
"""How a setting is held against another: a factor, how far below or above as a share of it, a difference."""


def values(table: pd.DataFrame, spec: Mapping[str, Any]) -> pd.Series:
    """One value per seed: the mean per task, then over tasks; empty where the table lacks what it needs.

    Two settings meet by seed and task, of the seeds and tasks that both have.

    Args:
        spec: ``study``, and if given ``setting``, ``x`` and ``layer``; ``reduce``, of a task's rows, in place of the
            mean; one of :data:`JOINS` with the other setting, or the other ``x`` where that is ``first`` or ``last``.
    """
    rows = table[table["study"] == spec["study"]]
    if spec.get("layer") == "last":
        rows = rows[rows["layer"] == rows["layer"].max()]
    ends = {"first": rows["x"].min(), "last": rows["x"].max()}
    join = next((name for name in JOINS if name in spec), None)

    def cells(setting: str | None, x: Any) -> pd.Series:
        kept = rows if setting is None else rows[rows["setting"] == setting]
        kept = kept if x is None else kept[kept["x"] == ends.get(x, x)]
        return kept.groupby(["seed", "task"])["value"].agg(spec.get("reduce", "mean"))

    one, setting = cells(spec.get("setting"), spec.get("x")), spec.get("setting")
    if join is None:
        return one.groupby("seed").mean()
    other = cells(setting, spec[join]) if spec[join] in ends else cells(spec[join], spec.get("x"))
    other = other[:0] if spec[join] in ends and ends["first"] == ends["last"] else other
    both = one.index.intersection(other.index)
    return JOINS[join](*(part.loc[both].groupby("seed").mean().astype(float) for part in (one, other)))


def by_layer(table: pd.DataFrame, study: str, reduce: str) -> pd.DataFrame:
    """One value per seed (row) and layer (column): reduced over experts per task, then the mean over tasks."""
    rows = table[table["study"] == study]
    per_task = rows.groupby(["seed", "layer", "task"])["value"].agg(reduce)
    return per_task.groupby(["seed", "layer"]).mean().unstack("layer")


def tasks_of(table: pd.DataFrame) -> tuple[str, ...]:
    """Tasks of a table, in its order."""
    return tuple(task for task in table["task"].unique() if task)
