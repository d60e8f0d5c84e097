"""What a task is: examples with a label to partition by, a prompt format and a metric.

Generated and real data meet here: both are rows in the public schema of their data set, and one function per
data set turns a row into an :class:`Example`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fluxlib import seeding

Row = dict[str, Any]
Metric = Literal["rouge_l", "exact_match", "accuracy"]
TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Example:
    """One sample: the model reads ``prompt`` and is to answer ``response``.

    ``label`` is what participants are partitioned by. A multiple-choice sample lists its ``options``;
    ``options[answer]`` is the response. A free text ``may_be_cut`` at its end where it is too long for the model.
    """

    prompt: str
    response: str
    label: str
    options: tuple[str, ...] = ()
    answer: int | None = None
    may_be_cut: bool = False


@dataclass(frozen=True)
class Task:
    """A data set ready to be federated; ``train`` and ``test`` are split before any partitioning.

    Generated tasks have two more groups of test samples: ``recall`` asks for taught facts as training rows do,
    ``untaught`` for facts that no training row tells.
    """

    name: str
    metric: Metric
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    recall: tuple[Example, ...] = ()
    untaught: tuple[Example, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Sorted label names found in the training split."""
        return tuple(sorted({example.label for example in self.train}))


def split(examples: Sequence[Example], seed: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Shuffle and cut into 80 % training and 20 % test samples (section 7 of the paper's set-up)."""
    order = seeding.order(len(examples), seed, "split")
    num_test = max(1, round(TEST_FRACTION * len(examples)))
    test = tuple(examples[i] for i in order[:num_test])
    return tuple(examples[i] for i in order[num_test:]), test
