"""MMLU: questions with four choices, scored by which choice the model finds most likely as a continuation.

Schema: ``question``, ``choice0`` … ``choice3``, ``answer`` (index), and the ``subject``, which may be the file's name
(``anatomy_test.csv``); or that of ``cais/mmlu``, where ``choices`` is a list.
The continuation form (no letters) is what small models can do; its scores are not comparable with 5-shot letters.
"""

from __future__ import annotations

import re
from pathlib import Path

from fluxlib.tasks.base import Example, Metric, Row

METRIC: Metric = "accuracy"
COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")


def to_example(row: Row) -> Example:
    """Prompt with the question, answer with the text of the right choice."""
    options = tuple(str(row[f"choice{i}"]) for i in range(4))
    answer = int(row["answer"])
    if not 0 <= answer < len(options):
        raise ValueError(f"answer is {answer}, allowed are 0 to {len(options) - 1}")
    return Example(
        f"Question: {row['question']}\nAnswer:",
        options[answer],
        str(row.get("subject", "all")),
        options,
        answer,
    )


def normalize(row: Row, file: Path) -> Row:
    """``row`` of ``file`` in this module's schema: a list of choices spread out, a letter as index, the subject."""
    known = dict(row)
    for index, choice in enumerate(known.pop("choices", ())):
        known[f"choice{index}"] = choice
    answer = known.get("answer")
    if isinstance(answer, str) and answer.strip() in ("A", "B", "C", "D"):
        known["answer"] = "ABCD".index(answer.strip())
    known.setdefault("subject", re.sub(r"_(dev|test|val|validation|train)$", "", file.stem))
    return known
