"""Reading what others wrote, writing whole files, and the error that says what is wrong."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

HALVES = re.compile(r"[\ud800-\udfff]")
"""Surrogates: no text file can hold one alone."""


class ConfigError(ValueError):
    """A run, a notebook or a command was asked for something that cannot be done; the message says what can."""


def brief(value: object, most: int = 300) -> str:
    """``value`` as one line that can be printed anywhere, of at most ``most`` characters."""
    text = " ".join(str(value).encode(errors="backslashreplace").decode().split())
    return text if len(text) <= most else text[: most - 1] + "…"


def shown(value: object) -> str:
    """``value`` as code, in brief."""
    try:
        return brief(repr(value), 60)
    except ValueError:
        return "a number of thousands of digits"


@contextmanager
def reading(what: str, kind: type[Exception] = ConfigError) -> Iterator[None]:
    """Whatever goes wrong in the block is the fault of what is read there, which somebody else wrote.

    Raises:
        kind: in place of any exception; the message says ``what`` was read, and what was wrong with it.
    """
    try:
        yield
    except Exception as error:
        wrong = f"it lacks {error}" if isinstance(error, KeyError) else brief(error) or type(error).__name__
        raise kind(f"{what}: {wrong}") from error


def checked(name: str, value: object, kind: type[T], *bounds: float) -> T:
    """``value``, if its type is ``kind`` (a float may be whole) and it is within ``bounds``, smallest and largest.

    A text must be one that can be written: JSON can name half of a character.

    Raises:
        ValueError: naming what came and what is allowed.
    """
    types = (int, float) if kind is float else (kind,)
    fits = type(value) in types and not (bounds and not bounds[0] <= value <= bounds[1])  # type: ignore[operator]
    if not fits or (isinstance(value, str) and HALVES.search(value)):
        within = f" from {bounds[0]:g} to {bounds[1]:g}" if bounds else ""
        raise ValueError(f"{name} is {shown(value)}, allowed is {'text' if kind is str else kind.__name__}{within}")
    return kind(value)  # type: ignore[call-arg]


def check_writable(folder: Path) -> Path:
    """Create ``folder`` and a file in it, before hours of work depend on it; ConfigError: it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ConfigError(f"cannot write to the output folder {folder}: {error.strerror}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes the folder of ``path``; a disk that is full or gone in the block is an OSError that names ``path``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a file that takes the place of ``path`` after the block, when it is on disk: all of it or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
