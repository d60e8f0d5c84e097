"""Where data comes from, and who holds what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fluxlib import seeding
from fluxlib.tasks import files, mini
from fluxlib.tasks.base import TEST_FRACTION, Example, Metric, Task, split
from fluxlib.tasks.formats import FORMATS

TASKS = (*mini.FAMILIES, *FORMATS)
"""Names that :func:`load` knows: generated tasks, and the public data sets."""


def load(name: str, seed: int = 0, size: int | None = None, path: str | Path | None = None) -> Task:
    """The task called ``name``, one of :data:`TASKS`, split into training and test samples.

    Args:
        seed: decides the generated rows, which samples of a public data set are taken, and the split.
        size: number of samples before the split; ``None`` for the task's own default, which is all of a public one.
        path: files of a public data set (see :mod:`fluxlib.tasks.files`); ``None`` for the hub.

    Raises:
        ValueError: an unknown name, wrong files, fewer samples than ``size``, a ``path`` for a generated task.
        OSError: no files, or a hub that cannot be reached.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name!r}, allowed are {', '.join(TASKS)}")
    form = FORMATS[name.removeprefix("mini-")]
    if name in FORMATS:
        train, test = split(_public(name, seed, size, path), seed)
        return Task(name, form.metric, train, test)
    if path is not None:
        raise ValueError(f"data.path is {str(path)!r}, but {name} is generated; it is for {', '.join(FORMATS)}")
    total = size or mini.DEFAULT_SIZE
    num_test = max(1, round(TEST_FRACTION * total))
    few = max(1, num_test // 4)
    sizes: dict[mini.Group, int] = {"train": total - num_test, "test": num_test, "recall": few, "untaught": few}
    groups = {
        group: tuple(form.to_example(row) for row in mini.rows(name, count, seed, group))
        for group, count in sizes.items()
    }
    return Task(name, form.metric, **groups)  # type: ignore[arg-type]


def _public(name: str, seed: int, size: int | None, path: str | Path | None) -> list[Example]:
    """Samples of a public data set, with labels; ``size`` of them drawn at random."""
    examples = files.read(name, files.fetch(name) if path is None else path)
    if len(examples) < 2:
        raise ValueError(f"{name} has {len(examples)} sample, at least 2 are needed for a training and a test split")
    if len({example.label for example in examples}) == 1:
        labels = files.cluster_labels(tuple(example.prompt for example in examples))
        examples = [replace(example, label=label) for example, label in zip(examples, labels, strict=True)]
    if size is None:
        return examples
    if size > len(examples):
        raise ValueError(f"task_size is {size}, allowed is at most the {len(examples)} samples of {name}")
    return [examples[i] for i in seeding.order(len(examples), seed, "subset")[:size]]
