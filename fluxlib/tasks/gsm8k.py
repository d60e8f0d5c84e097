"""GSM8K: word problems; the answer is a rationale that ends in ``#### number``.

Public schema (``openai/gsm8k``): ``question``, ``answer``. Generated rows also name their ``skill``.
"""

from __future__ import annotations

from fluxlib.tasks.base import Example, Metric, Row

METRIC: Metric = "exact_match"
COLUMNS = ("question", "answer")


def to_example(row: Row) -> Example:
    """Prompt with the question, answer with the rationale; scored by the final number."""
    prompt = f"Question: {row['question']}\nSolution:"
    return Example(prompt, row["answer"], label=str(row.get("skill", "all")))
