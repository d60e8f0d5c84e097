"""Scores of single answers, each between 0 and 1; no model is needed."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure of a text against its reference (Google's ``rouge-score``).

    >>> rouge_l("a red fox", "a red wolf")
    0.6666666666666666
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


def final_number(text: str) -> str | None:
    """The number after the last ``####``, without thousands separators; ``None`` where there is none.

    >>> final_number("3 * 6 = 18 #### 1,018.0")
    '1018'
    """
    marked = text.rpartition("####")
    found = _NUMBER.search(marked[2]) if marked[1] else None
    if found is None:
        return None
    number = found.group().replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def exact_match(prediction: str, reference: str) -> float:
    """1 where both texts end in the same number after ``####``, else 0."""
    number = final_number(prediction)
    return float(number is not None and number == final_number(reference))
