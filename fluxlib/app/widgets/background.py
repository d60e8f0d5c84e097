"""What goes on while a page is looked at: a federated run, its progress, what was pressed and turned meanwhile."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

from fluxlib import federation, records
from fluxlib.analysis import store
from fluxlib.config import RunConfig
from fluxlib.io import ConfigError
from fluxlib.records import describe_round

log = logging.getLogger(__name__)

HEADLESS = "FLUXLIB_HEADLESS"
"""Environment variable that says nobody watches; :func:`fluxlib.app.pipeline.execute` sets it for its kernels."""

REDRAW_S = 2.0
"""Shortest time between two pictures of a running run."""

IDLE, RUNNING, STOPPING, STOPPED, COMPLETE, FAILED = "idle", "running", "stopping", "stopped", "complete", "failed"


class BackgroundRun:
    """One run of ``config`` into the folder ``out``.

    Every complete round is on disk before the next one begins. The same configuration and folder go on from there,
    whether the run was stopped, its kernel was closed, or the machine was switched off.

    Attributes:
        state: idle, running, stopping (after the round in progress), stopped, complete or failed.
        rows: rows of ``rounds`` so far, those of an earlier part of the run included.
        error: why it failed; empty otherwise.
    """

    def __init__(self, config: RunConfig, out: Path, on_change: Callable[[BackgroundRun], None] | None = None) -> None:
        self.config, self.out, self.on_change = config, Path(out), on_change
        self.state, self.error = IDLE, ""
        self.rows: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a round is being computed."""
        return self.state in (RUNNING, STOPPING)

    def table(self) -> pd.DataFrame:
        """The rows so far."""
        return pd.DataFrame(self.rows)

    def start(self) -> None:
        """Begin, or go on; nothing happens while it runs."""
        if self.busy:
            return
        self._stop.clear()
        self.state, self.error, self.rows = RUNNING, "", []
        self._thread = _Worker(self)
        self._thread.start()

    def stop(self) -> None:
        """Stop after the round in progress; what is complete stays."""
        if self.state == RUNNING:
            self._stop.set()
            self._change(STOPPING)

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the thread is done; TimeoutError: it is not, after ``timeout_s``."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"{self.config.run_id} still runs after {timeout_s} s")

    def _work(self) -> None:
        try:
            result = federation.run(self.config, on_round=self._on_round, out=self.out)
        except (ConfigError, federation.RunFailed, federation.CheckpointError, OSError) as error:
            self.error = str(error)
            self._change(FAILED)
            return
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}"
            self._change(FAILED)
            raise
        self.rows = _rows(result.rounds)
        complete = int(self.rows[-1]["round"]) == self.config.federation.rounds
        self._change(COMPLETE if complete else STOPPED)

    def _on_round(self, row: Mapping[str, Any]) -> bool:
        if not self.rows and row["round"] > 0:
            self.rows = _rows(self._earlier(int(row["round"])))
        self.rows.append(dict(row))
        self._change(self.state)
        return self._stop.is_set()

    def _earlier(self, before: int) -> pd.DataFrame:
        """``rounds`` of a run that goes on, before round ``before``, from its checkpoint."""
        file = self.out / store.CHECKPOINTS / f"{self.config.run_id}.safetensors"
        try:
            found = store.read(file)
        except records.TableError:
            return pd.DataFrame({"round": []})
        return found[found["round"] < before]

    def _change(self, state: str) -> None:
        self.state = state
        if self.on_change is None:
            return
        try:
            self.on_change(self)
        except Exception:  # whoever watches may be gone or wrong: no reason to lose rounds
            log.exception("the watcher of %s failed", self.config.run_id)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict(orient="records")]


class InTurn:
    """Does what it is given in a thread of its own: one thing after the other, in the order in which they came.

    JupyterLab and its kernel handle the messages of a page's widgets in several threads. A handler that computed would
    hold up the messages of its own thread and be overtaken by those of another.
    """

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self._on_error = on_error
        self._thread = ThreadPoolExecutor(1, "dashboard")

    def __call__(self, action: Callable[..., object], *arguments: Any) -> None:
        """Remember ``action`` and do it when what came before is done."""
        self._thread.submit(self._do, action, *arguments)

    def wait(self) -> None:
        """Until everything that came before is done."""
        self._thread.submit(lambda: None).result()

    def _do(self, action: Callable[..., object], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:
            log.exception("a press or a turn failed")
            self._on_error(error)


class _Worker(threading.Thread):
    """The thread of a run; it knows its run, so that one whose page was closed can be found again."""

    def __init__(self, run: BackgroundRun) -> None:
        super().__init__(target=run._work, name=run.config.run_id, daemon=True)
        self.run_of = run


def going_on(out: Path) -> BackgroundRun | None:
    """A run into ``out`` that this process still computes: its page was closed, or its cell run again."""
    workers = [thread for thread in threading.enumerate() if isinstance(thread, _Worker)]
    return next((worker.run_of for worker in workers if worker.run_of.busy and worker.run_of.out == Path(out)), None)


class RunMonitor:
    """Give it to :func:`fluxlib.federation.run` as ``on_round``: a line per round, and the curve as it grows.

    In a notebook that somebody watches the curve is drawn in place as rounds come; headlessly only the last one is, so
    the executed notebook has it too. Outside a notebook there are lines only. The picture is a PNG: nothing of it
    depends on a widget's state, which no saved notebook keeps.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.rows: list[dict[str, Any]] = []
        self._handle: Any = None
        self._drawn_at = -REDRAW_S

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Take one new row of ``rounds``."""
        self.rows.append(dict(row))
        print(describe_round(row), flush=True)
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
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")
