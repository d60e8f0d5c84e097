"""MMLU: questions with four choices, scored by which choice the model finds most likely as a continuation.

Public schema: ``question``, ``choice0`` … ``choice3``, ``answer`` (index), and the ``subject``.
The continuation form (no letters) is what small models can do; its scores are not comparable with 5-shot letters.
"""

from __future__ import annotations

from fluxlib.tasks.base import Example, Metric, Row

METRIC: Metric = "accuracy"
COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")


def to_example(row: Row) -> Example:
    """Prompt with the question, answer with the text of the right choice."""
    options = tuple(str(row[f"choice{i}"]) for i in range(4))
    answer = int(row["answer"])
    return Example(
        f"Question: {row['question']}\nAnswer:",
        options[answer],
        str(row.get("subject", "all")),
        options,
        answer,
    )
