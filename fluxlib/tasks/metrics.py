"""Scores of single answers, each between 0 and 1, and the mean and interval of several seeds; no model is needed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np

CONFIDENCE = 0.95

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


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean, low and high of ``values`` over seeds; NaN are left out.

    From three values on a 95 % t interval, for two their minimum and maximum, for one the value itself: the last two
    are a range, no interval, and no verdict rests on them (:data:`fluxlib.analysis.studies.verdicts.MIN_SEEDS`). (A bootstrap
    over three seeds covers 74 %, not 95.)
    """
    found = np.asarray([value for value in values if value == value], dtype=float)
    if not len(found):
        return math.nan, math.nan, math.nan
    mean = float(found.mean())
    if len(found) < 3:
        return mean, float(found.min()), float(found.max())
    from scipy import stats

    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    return mean, mean - half, mean + half


def geometric(ratios: Iterable[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios over seeds and its interval: :func:`interval` of the logarithms.

    One ratio of 0 makes it 0; NaN are left out.
    """
    found = np.asarray(list(ratios), dtype=float)
    if (found == 0).any():
        return 0.0, 0.0, float(np.nanmax(found))
    mean, low, high = interval(np.log(found[found > 0]))
    return float(np.exp(mean)), float(np.exp(low)), float(np.exp(high))
