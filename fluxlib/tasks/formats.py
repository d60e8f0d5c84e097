"""The four public data sets: schema, prompt, label and metric of each. Generated rows have the same schemas.

- Dolly (``databricks/databricks-dolly-15k``): instructions of eight categories, scored by ROUGE-L.
- GSM8K (``openai/gsm8k``): word problems; the answer is a rationale that ends in ``#### number``.
- MMLU (``cais/mmlu``): questions with four choices, scored by which one the model finds most likely as a continuation.
  That form (no letters) is what small models can do; its scores are not comparable with 5-shot letters.
- PIQA (``ybisk/piqa``): a goal and two solutions, scored in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fluxlib.tasks.base import Example, Metric, Row


@dataclass(frozen=True)
class Format:
    """How rows of a data set become examples.

    Attributes:
        metric: of its answers.
        columns: that a row must have.
        to_example: a row with these columns as an example.
        normalize: a row of a file in this schema; None where the row has no answer.
    """

    metric: Metric
    columns: tuple[str, ...]
    to_example: Callable[[Row], Example]
    normalize: Callable[[Row, Path], Row | None] = lambda row, file: row


def _dolly(row: Row) -> Example:
    context = f"\nContext: {row['context']}" if row["context"] else ""
    prompt = f"Instruction: {row['instruction']}{context}\nResponse:"
    return Example(prompt, str(row["response"]), str(row["category"]), may_be_cut=True)


def _gsm8k(row: Row) -> Example:
    return Example(f"Question: {row['question']}\nSolution:", row["answer"], label=str(row.get("skill", "all")))


def _mmlu(row: Row) -> Example:
    options = tuple(str(row[f"choice{i}"]) for i in range(4))
    answer = _index(row, "answer", options)
    prompt = f"Question: {row['question']}\nAnswer:"
    return Example(prompt, options[answer], str(row.get("subject", "all")), options, answer)


def _normalize_mmlu(row: Row, file: Path) -> Row:
    """A list of choices spread out, a letter as index, the subject from the file's name (``anatomy_test.csv``)."""
    known = dict(row)
    for index, choice in enumerate(known.pop("choices", ())):
        known[f"choice{index}"] = choice
    answer = known.get("answer")
    if isinstance(answer, str) and answer.strip() in ("A", "B", "C", "D"):
        known["answer"] = "ABCD".index(answer.strip())
    known.setdefault("subject", re.sub(r"_(dev|test|val|validation|train)$", "", file.stem))
    return known


def _piqa(row: Row) -> Example:
    options = (str(row["sol1"]), str(row["sol2"]))
    answer = _index(row, "label", options)
    return Example(f"Goal: {row['goal']}\nSolution:", options[answer], str(row.get("kind", "all")), options, answer)


def _normalize_piqa(row: Row, file: Path) -> Row | None:
    """The public test split does not tell the right solution (-1)."""
    return None if str(row.get("label")) == "-1" else row


def _index(row: Row, column: str, options: tuple[str, ...]) -> int:
    answer = int(row[column])
    if not 0 <= answer < len(options):
        raise ValueError(f"{column} is {answer}, allowed are 0 to {len(options) - 1}")
    return answer


FORMATS = {
    "dolly": Format("rouge_l", ("instruction", "context", "response", "category"), _dolly),
    "gsm8k": Format("exact_match", ("question", "answer"), _gsm8k),
    "mmlu": Format(
        "accuracy", ("question", "choice0", "choice1", "choice2", "choice3", "answer"), _mmlu, _normalize_mmlu
    ),
    "piqa": Format("accuracy", ("goal", "sol1", "sol2", "label"), _piqa, _normalize_piqa),
}
"""By data set."""
