"""A run's rows as they come, in a file that another process follows; and its wish that the run should stop.

progress/<run_id>.jsonl    one row of ``rounds`` a line
progress/<run_id>.over     the server is done; empty, or why it failed
progress/<run_id>.stop     somebody asks it to stop after this round
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def writer(out: Path, run_id: str) -> Callable[[Row], bool]:
    """What the server calls with each row; True when it is to stop."""
    path = _path(out, run_id, "jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(row: Row) -> bool:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return _path(out, run_id, "stop").exists()

    return write


def follow(out: Path, run_id: str) -> Iterator[Row | None]:
    """Rows written since the last question, then ``None``; it can always be asked again."""
    path, seen = _path(out, run_id, "jsonl"), 0
    while True:
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        for line in lines[seen:]:
            if not line.endswith("\n"):
                break  # still being written
            seen += 1
            yield json.loads(line)
        yield None


def ask_to_stop(out: Path, run_id: str) -> None:
    """The run is to end after the round it is in."""
    _path(out, run_id, "stop").touch()


def say_over(out: Path, run_id: str, failure: str = "") -> None:
    """The server is done; ``failure`` says why where it failed."""
    path, temporary = _path(out, run_id, "over"), _path(out, run_id, "tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(failure)
    temporary.replace(path)


def over(out: Path, run_id: str) -> str | None:
    """Why the server failed, empty where it did not; ``None`` while it is at work, or if it was killed."""
    path = _path(out, run_id, "over")
    return path.read_text() if path.exists() else None


def clear(out: Path, run_id: str) -> None:
    """Remove what is left of it."""
    for kind in ("jsonl", "over", "stop"):
        _path(out, run_id, kind).unlink(missing_ok=True)
    folder = out / "progress"
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _path(out: Path, run_id: str, kind: str) -> Path:
    return out / "progress" / f"{run_id}.{kind}"
