"""Where data comes from, and who holds what.

:func:`load` gives a :class:`~fluxlib.tasks.base.Task` for a name; :mod:`~fluxlib.tasks.partition` deals its training
samples to participants, :mod:`~fluxlib.tasks.batches` turns them into tensors and :mod:`~fluxlib.tasks.evaluate`
scores a model on the test split.
"""

from __future__ import annotations

from fluxlib.tasks import dolly, gsm8k, mini, mmlu, piqa
from fluxlib.tasks.base import Example, Metric, Task, split

__all__ = ["Example", "FORMATS", "Metric", "TASKS", "Task", "load", "split"]

FORMATS = {"dolly": dolly, "gsm8k": gsm8k, "mmlu": mmlu, "piqa": piqa}
"""Prompt format and metric by data set."""

TASKS = tuple(mini.FAMILIES)
"""Names that :func:`load` knows."""


def load(name: str, seed: int = 0, size: int | None = None) -> Task:
    """The task called ``name``, split into training and test samples.

    Args:
        name: one of :data:`TASKS`.
        seed: decides the generated rows and the split.
        size: number of samples before the split; ``None`` for the task's own default.

    Raises:
        ValueError: an unknown name, with the names that are allowed.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name!r}, allowed are {', '.join(TASKS)}")
    data_set = FORMATS[name.removeprefix("mini-")]
    examples = [data_set.to_example(row) for row in mini.rows(name, size or mini.DEFAULT_SIZE, seed)]
    train, test = split(examples, seed)
    return Task(name, data_set.METRIC, train, test)
