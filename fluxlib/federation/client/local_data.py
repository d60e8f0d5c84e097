"""The samples that a participant trains and profiles on: its part of the run's task, or a file that only it reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from fluxlib import seeding, tasks
from fluxlib.config import DataConfig, RunConfig
from fluxlib.io import checked
from fluxlib.methods.base import Batch, LocalData
from fluxlib.tasks.base import Example
from fluxlib.tasks.batches import sample_batches
from fluxlib.tasks.partition import partition


class DataError(ValueError):
    """A participant's own samples cannot be read; the message names file and line, and quotes nothing."""


def local_data(config: RunConfig, tokenizer: Any, participant: int, round_number: int, samples: str = "") -> LocalData:
    """This round's batches of ``participant``; they depend on its samples, seed, round and participant alone.

    ``samples`` is a file that this node's operator gave it; empty: its part of the run's task.
    """
    if samples:
        examples = read_examples(Path(samples))
    else:
        task, parts = load_task(config)
        examples = [task.train[index] for index in parts[participant]]
    training = config.training

    def draw(name: str, count: int) -> list[Batch]:
        chance = seeding.generator(config.seed, name, round_number, participant)
        batches = sample_batches(examples, tokenizer, training.batch_size, training.max_tokens, chance)
        return list(islice(batches, count))

    return LocalData(train=draw("batches", training.local_steps), profile=draw("profile", config.profiling.batches))


def load_task(config: RunConfig) -> tuple[tasks.Task, list[list[int]]]:
    """The run's task and the training samples of each participant, by index; read once per process."""
    return _load_task(config.task, config.seed, config.data, config.federation.participants)


@lru_cache(maxsize=4)
def _load_task(name: str, seed: int, data: DataConfig, num_participants: int) -> tuple[tasks.Task, list[list[int]]]:
    task = tasks.load(name, seed=seed, size=data.task_size, path=data.path)
    chance = seeding.generator(seed, "partition")
    return task, partition(task.train, num_participants, chance, data.partition, data.alpha, data.equal_sizes)


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write ``examples`` to ``path``, one JSON object a line."""
    path.write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples))


def read_examples(path: Path) -> list[Example]:
    """Inverse of :func:`write_examples`; a line needs ``prompt``, ``response`` and ``label``.

    Raises:
        DataError: no such file, no samples in it, or a line that is none. What a line holds is not in the message:
            that would send it to the server.
    """
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", "it is no text")
        raise DataError(f"the samples of this participant cannot be read: {reason}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_example(**json.loads(line)))
            except Exception:  # whatever it is, its text stays here
                what = "is no JSON object with prompt, response and label"
                raise DataError(f"line {number} of this participant's samples {what}") from None
    if not found:
        raise DataError("this participant's file of samples is empty")
    return found


def _example(options: object = None, answer: object = None, may_be_cut: object = False, **texts: object) -> Example:
    choices = tuple(checked("options", option, str) for option in checked("options", options or [], list))
    return Example(
        **{name: checked(name, text, str) for name, text in texts.items()},
        options=choices,
        answer=checked("answer", answer, int, 0, len(choices) - 1) if choices else None,
        may_be_cut=checked("may_be_cut", may_be_cut, bool),
    )
