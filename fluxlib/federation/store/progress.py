"""A run's rows as they come, in a file that another process follows; and its wish that the run should stop."""

from __future__ import annotations

import json
from pathlib import Path

from fluxlib.federation.results import Row
from fluxlib.io import writing


class Progress:
    """What a server and a follower say to one another through the folder ``out``.

    progress/<run_id>.jsonl    a row of ``rounds`` a line; at last ``{"over": why it failed, or nothing}``
    progress/<run_id>.stop     somebody asks it to stop after this round
    """

    def __init__(self, out: Path, run_id: str) -> None:
        self._rows, self._stop = (out / "progress" / f"{run_id}.{kind}" for kind in ("jsonl", "stop"))
        self._seen = 0

    def add(self, row: Row) -> bool:
        """Show ``row``, or the end; whether the run is to stop."""
        with writing(self._rows), self._rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return self.stopping

    def new(self) -> list[Row]:
        """What was added since the last question; a line that is still being written comes with the next."""
        lines = self._rows.read_text().splitlines(keepends=True)[self._seen :] if self._rows.is_file() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        self._seen += len(found)
        return found

    def ask_to_stop(self) -> None:
        """The run is to end after the round it is in."""
        with writing(self._stop):
            self._stop.touch()

    @property
    def stopping(self) -> bool:
        """Whether somebody asked it to."""
        return self._stop.exists()

    def clear(self) -> None:
        """Remove what is left of it."""
        for path in (self._rows, self._stop):
            path.unlink(missing_ok=True)
        if self._rows.parent.is_dir() and not any(self._rows.parent.iterdir()):
            self._rows.parent.rmdir()
