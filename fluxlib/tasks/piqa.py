"""PIQA: a goal and two solutions; the model is to find the right one more likely.

Public schema (``ybisk/piqa``): ``goal``, ``sol1``, ``sol2``, ``label`` (0 or 1). Generated rows also name their
``kind``.
"""

from __future__ import annotations

from pathlib import Path

from fluxlib.tasks.base import Example, Metric, Row

METRIC: Metric = "accuracy"
COLUMNS = ("goal", "sol1", "sol2", "label")


def to_example(row: Row) -> Example:
    """Prompt with the goal, answer with the right solution."""
    options = (str(row["sol1"]), str(row["sol2"]))
    answer = int(row["label"])
    if answer not in (0, 1):
        raise ValueError(f"label is {answer}, allowed are 0 and 1")
    return Example(f"Goal: {row['goal']}\nSolution:", options[answer], str(row.get("kind", "all")), options, answer)


def normalize(row: Row, file: Path) -> Row | None:
    """``row``, or None where the right solution is not told (-1 in the public test split)."""
    return None if str(row.get("label")) == "-1" else row
