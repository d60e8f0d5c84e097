"""A federated run while a page is looked at, and its progress."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from fluxlib import federation, records
from fluxlib.analysis import store
from fluxlib.app.pipeline import HEADLESS
from fluxlib.config import RunConfig
from fluxlib.io import ConfigError

log = logging.getLogger(__name__)

REDRAW_S = 2.0
"""Shortest time between two pictures of a running run."""

RUNNING, STOPPING, STOPPED, COMPLETE, FAILED = "running", "stopping", "stopped", "complete", "failed"


class BackgroundRun(threading.Thread):
    """One run of ``config`` into the folder ``out``, in a thread of its own.

    Every complete round is on disk before the next one begins; the same configuration and folder go on from there.

    Attributes:
        state: running, stopping (after the round in progress), stopped, complete or failed (``error`` says why).
        rows: rows of ``rounds`` so far, those of an earlier part of the run included.
    """

    def __init__(self, config: RunConfig, out: Path, on_change: Callable[[BackgroundRun], None] | None = None) -> None:
        super().__init__(name=config.run_id, daemon=True)
        self.config, self.out, self.on_change = config, Path(out), on_change
        self.state, self.error = RUNNING, ""
        self.rows: list[Any] = []

    @property
    def busy(self) -> bool:
        """Whether a round is being computed."""
        return self.state in (RUNNING, STOPPING)

    def stop(self) -> None:
        """Stop after the round in progress; what is complete stays."""
        if self.state == RUNNING:
            self.state = STOPPING
            self._tell()

    def run(self) -> None:
        """The run itself; ``start`` calls it."""
        try:
            result = federation.run(self.config, on_round=self._on_round, out=self.out)
            self.rows = result.rounds.to_dict("records")
            complete = self.rows[-1]["round"] == self.config.federation.rounds
            self.state = COMPLETE if complete else STOPPED
        except (ConfigError, federation.RunFailed, federation.CheckpointError, OSError) as error:
            self.state, self.error = FAILED, str(error)
        except BaseException as error:
            self.state, self.error = FAILED, f"{type(error).__name__}: {error}"
            raise
        finally:
            self._tell()

    def _on_round(self, row: Mapping[str, Any]) -> bool:
        if not self.rows and row["round"] > 0:  # it goes on from its checkpoint
            with suppress(records.TableError):
                before = store.read(self.out / store.CHECKPOINTS / f"{self.config.run_id}.safetensors")
                self.rows = before[before["round"] < row["round"]].to_dict("records")
        self.rows.append(dict(row))
        self._tell()
        return self.state == STOPPING

    def _tell(self) -> None:
        if self.on_change is None:
            return
        try:
            self.on_change(self)
        except Exception:  # whoever watches may be gone or wrong: no reason to lose rounds
            log.exception("the watcher of %s failed", self.config.run_id)


def going_on(out: Path) -> BackgroundRun | None:
    """A run into ``out`` that this process still computes: its page was closed, or its cell run again."""
    runs = (thread for thread in threading.enumerate() if isinstance(thread, BackgroundRun))
    return next((run for run in runs if run.busy and run.out == out), None)


class RunMonitor:
    """Give it to :func:`fluxlib.federation.run` as ``on_round``: a line per round, in a notebook the curve as it grows.

    Headlessly only the last curve is drawn. It is a PNG: a saved notebook keeps no widget's state.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.rows: list[dict[str, Any]] = []
        self._handle: Any = None
        self._drawn_at = -REDRAW_S

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Take one new row of ``rounds``."""
        self.rows.append(dict(row))
        print(records.describe_round(row), flush=True)
        last = row["round"] >= self.config.federation.rounds
        due = time.monotonic() - self._drawn_at >= REDRAW_S and not os.environ.get(HEADLESS)
        if in_notebook() and (last or due):
            self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        from fluxlib import figures

        picture = figures.race.convergence(pd.DataFrame(self.rows), clocks=("round", "device_s"))
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)
        self._drawn_at = time.monotonic()


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel."""
    from IPython.core.getipython import get_ipython

    return hasattr(get_ipython(), "kernel")
