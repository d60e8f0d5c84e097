"""The four public data sets: schema, prompt, label and metric of each. Generated rows have the same schemas.

- Dolly (``databricks/databricks-dolly-15k``): instructions of eight categories, scored by ROUGE-L.
- GSM8K (``openai/gsm8k``): word problems; the answer is a rationale that ends in ``#### number``.
- MMLU (``cais/mmlu``): questions with four choices, scored by which one the model finds most likely as a continuation.
  That form (no letters) is what small models can do; its scores are not comparable with 5-shot letters.
- PIQA (``ybisk/piqa``): a goal and two solutions, scored in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxlib.io import checked, shown
from fluxlib.tasks.base import Example, Metric, Row

TEXT = 0
"""Kind of a column that holds text."""


@dataclass(frozen=True)
class Format:
    """How rows of a data set become examples.

    Attributes:
        metric: of its answers.
        columns: that a row must have, and their kinds: :data:`TEXT`, or the number of choices that it is the index of.
        label: column of text that a row may have; it is what participants are partitioned by.
        to_example: a row with these columns as an example.
        normalize: a row of a file in this schema; None where the row has no answer.
    """

    metric: Metric
    columns: Mapping[str, int]
    label: str
    to_example: Callable[[Row], Example]
    normalize: Callable[[Row, Path], Row | None] = lambda row, file: row

    def read(self, row: Row, file: Path) -> Example | None:
        """A row of ``file`` as an example; None where it has no answer. ValueError names a column that is wrong."""
        known = self.normalize(row, file)
        if known is None:
            return None
        if None in known:  # as csv gives them
            raise ValueError("has more fields than columns")
        if missing := [column for column in self.columns if column not in known]:
            raise ValueError(f"lacks {', '.join(missing)}; it has {', '.join(map(str, row))}")
        kinds = {self.label: TEXT, **self.columns}
        return self.to_example({name: _value(name, known[name], kinds[name]) for name in kinds if name in known})


def _value(column: str, value: Any, num_choices: int) -> str | int:
    """What a column holds; the index of a choice may come as a number, as its digits or as a letter."""
    if num_choices == TEXT:
        return checked(column, value, str)
    known = {name: index for index in range(num_choices) for name in (index, str(index), "ABCD"[index])}
    value = value.strip() if isinstance(value, str) else value
    if type(value) not in (int, str) or value not in known:
        raise ValueError(f"{column} is {shown(value)}, allowed are 0 to {num_choices - 1}")
    return known[value]


def _dolly(row: Row) -> Example:
    context = f"\nContext: {row['context']}" if row["context"] else ""
    prompt = f"Instruction: {row['instruction']}{context}\nResponse:"
    return Example(prompt, row["response"], row["category"], may_be_cut=True)


def _gsm8k(row: Row) -> Example:
    return Example(f"Question: {row['question']}\nSolution:", row["answer"], row.get("skill", "all"))


def _mmlu(row: Row) -> Example:
    options, answer = tuple(row[f"choice{i}"] for i in range(4)), row["answer"]
    return Example(f"Question: {row['question']}\nAnswer:", options[answer], row.get("subject", "all"), options, answer)


def _normalize_mmlu(row: Row, file: Path) -> Row:
    """A list of choices spread out, the subject from the file's name (``anatomy_test.csv``)."""
    known = {"subject": re.sub(r"_(dev|test|val|validation|train)$", "", file.stem)} | row
    if "choices" in known and len(checked("choices", known["choices"], list)) != 4:
        raise ValueError(f"choices has {len(known['choices'])} entries, allowed are 4")
    return known | {f"choice{index}": choice for index, choice in enumerate(known.get("choices", ()))}


def _piqa(row: Row) -> Example:
    options, answer = (row["sol1"], row["sol2"]), row["label"]
    return Example(f"Goal: {row['goal']}\nSolution:", options[answer], row.get("kind", "all"), options, answer)


def _normalize_piqa(row: Row, file: Path) -> Row | None:
    """The public test split does not tell the right solution (-1)."""
    return None if str(row.get("label")) == "-1" else row


def _texts(*columns: str) -> dict[str, int]:
    return dict.fromkeys(columns, TEXT)


FORMATS = {
    "dolly": Format("rouge_l", _texts("instruction", "context", "response", "category"), "category", _dolly),
    "gsm8k": Format("exact_match", _texts("question", "answer"), "skill", _gsm8k),
    "mmlu": Format(
        "accuracy",
        _texts("question", "choice0", "choice1", "choice2", "choice3") | {"answer": 4},
        "subject",
        _mmlu,
        _normalize_mmlu,
    ),
    "piqa": Format("accuracy", _texts("goal", "sol1", "sol2") | {"label": 2}, "kind", _piqa, _normalize_piqa),
}
"""By data set."""
