"""What moves while something runs: live progress in JupyterLab, plain lines everywhere else."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from fluxlib.config import RunConfig
from fluxlib.records import describe_round

HEADLESS = "FLUXLIB_HEADLESS"
"""Environment variable that says nobody watches; :func:`fluxlib.app.pipeline.execute` sets it for its kernels."""

REDRAW_S = 2.0
"""Shortest time between two pictures of a running run."""


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
        import pandas as pd
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
