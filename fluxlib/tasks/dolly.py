"""Dolly: instructions of eight categories with free-text responses, scored by ROUGE-L.

Public schema (``databricks/databricks-dolly-15k``): ``instruction``, ``context`` (may be empty), ``response``,
``category``.
"""

from __future__ import annotations

from fluxlib.tasks.base import Example, Metric, Row

METRIC: Metric = "rouge_l"
COLUMNS = ("instruction", "context", "response", "category")


def to_example(row: Row) -> Example:
    """Prompt with the instruction and its context, answer with the response."""
    context = f"\nContext: {row['context']}" if row["context"] else ""
    prompt = f"Instruction: {row['instruction']}{context}\nResponse:"
    return Example(prompt, str(row["response"]), str(row["category"]), may_be_cut=True)
