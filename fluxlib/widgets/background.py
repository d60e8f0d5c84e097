"""A federated run in a thread: whoever started it can watch it, stop it, and go on with it later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fluxlib import federation, records
from fluxlib.config import ConfigError, RunConfig
from fluxlib.federation.outcome import RoundOutcome

IDLE, RUNNING, STOPPING, STOPPED, COMPLETE, FAILED = "idle", "running", "stopping", "stopped", "complete", "failed"


class BackgroundRun:
    """One run of ``config`` into the folder ``out``.

    Every complete round is on disk before the next one begins. The same configuration and folder go on from there,
    whether the run was stopped, its kernel was closed, or the machine was switched off.

    Attributes:
        state: idle, running, stopping (after the round in progress), stopped, complete or failed.
        rows: rows of ``rounds`` so far, those of an earlier part of the run included.
        tuned: per round seen here, ``[L, E]`` how many participants tuned each expert.
        error: why it failed; empty otherwise.
    """

    def __init__(self, config: RunConfig, out: Path, on_change: Callable[[BackgroundRun], None] | None = None) -> None:
        self.config, self.out, self.on_change = config, Path(out), on_change
        self.state, self.error = IDLE, ""
        self.rows: list[dict[str, Any]] = []
        self.tuned: list[np.ndarray] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a round is being computed."""
        return self.state in (RUNNING, STOPPING)

    @property
    def first_round(self) -> int:
        """Number of the round that ``tuned`` begins with."""
        return int(self.rows[-1]["round"]) - len(self.tuned) + 1 if self.rows else 1

    def table(self) -> pd.DataFrame:
        """The rows so far."""
        return pd.DataFrame(self.rows)

    def start(self) -> None:
        """Begin, or go on; nothing happens while it runs."""
        if self.busy:
            return
        self._stop.clear()
        self.state, self.error, self.rows, self.tuned = RUNNING, "", [], []
        self._thread = threading.Thread(target=self._work, name=self.config.run_id, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop after the round in progress; what is complete stays."""
        if self.state == RUNNING:
            self._stop.set()
            self._change(STOPPING)

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the thread is done.

        Raises:
            TimeoutError: it is not, after ``timeout_s``.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"{self.config.run_id} still runs after {timeout_s} s")

    def _work(self) -> None:
        try:
            result = federation.run(self.config, on_round=self._on_round, out=self.out, on_outcome=self._on_outcome)
        except (ConfigError, federation.RunFailed, federation.CheckpointError, OSError) as error:
            self.error = str(error)
            self._change(FAILED)
            return
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}"
            self._change(FAILED)
            raise
        self.rows = _rows(result.rounds)
        complete = int(self.rows[-1]["round"]) == self.config.rounds
        self._change(COMPLETE if complete else STOPPED)

    def _on_round(self, row: Mapping[str, Any]) -> bool:
        if not self.rows and row["round"] > 0:
            self.rows = self._earlier(int(row["round"]))
        self.rows.append(dict(row))
        self._change(self.state)
        return self._stop.is_set()

    def _on_outcome(self, outcome: RoundOutcome) -> None:
        if outcome.accepted:
            self.tuned.append(sum(part.roles.exploit.numpy().astype(int) for part in outcome.accepted))  # type: ignore[arg-type]

    def _earlier(self, before: int) -> list[dict[str, Any]]:
        """Rows of a run that goes on, from its checkpoint."""
        folder = self.out / "checkpoints" / self.config.run_id
        for file in sorted(folder.glob("rounds-*.parquet"), key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                found = records.read("rounds", file)
            except records.TableError:
                continue
            return _rows(found[found["round"] < before])
        return []

    def _change(self, state: str) -> None:
        self.state = state
        if self.on_change is not None:
            self.on_change(self)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict(orient="records")]
