"""Samples that a participant holds itself, as lines of JSON in a file that only it reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fluxlib.tasks.base import Example


class DataError(ValueError):
    """A participant's own samples cannot be read; the message names file and line, and quotes nothing."""


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
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DataError(f"the samples of this participant cannot be read: {error.strerror}") from None
    found = [_example(line, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise DataError("this participant's file of samples is empty")
    return found


def _example(line: str, number: int) -> Example:
    try:
        values = json.loads(line)
        values["options"] = tuple(values.get("options") or ())
        return Example(**values)
    except (ValueError, TypeError, AttributeError):
        raise DataError(
            f"line {number} of this participant's samples is no JSON object with prompt, response and label"
        ) from None
