"""PIQA: a goal and two solutions; the model is to find the right one more likely.

Public schema (``ybisk/piqa``): ``goal``, ``sol1``, ``sol2``, ``label`` (0 or 1). Generated rows also name their
``kind``.
"""

from __future__ import annotations

from fluxlib.tasks.base import Example, Metric, Row

METRIC: Metric = "accuracy"
COLUMNS = ("goal", "sol1", "sol2", "label")


def to_example(row: Row) -> Example:
    """Prompt with the goal, answer with the right solution."""
    options = (str(row["sol1"]), str(row["sol2"]))
    answer = int(row["label"])
    return Example(f"Goal: {row['goal']}\nSolution:", options[answer], str(row.get("kind", "all")), options, answer)
