"""The Flower app of the server; what it does is in :mod:`fluxlib.federation.server.rounds`.

``app`` takes everything from Flower's run configuration: the settings of :class:`~fluxlib.config.RunConfig` by their
full names, ``settings`` (any of them as one JSON or YAML mapping), and ``out``, the folder of the tables.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fluxlib.config import REPO_ROOT, RunConfig, flatten, make_config
from fluxlib.federation.results import Output, Row
from fluxlib.federation.server.rounds import serve
from fluxlib.federation.store import lock
from fluxlib.federation.store.progress import Progress
from fluxlib.io import ConfigError
from fluxlib.records import describe_round

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what Flower's run configuration says, with nobody in this process to take the result."""
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()
    serve_alone(grid, *from_run_config(context.run_config))


def serve_alone(grid: Grid, config: RunConfig, out: Path | None) -> None:
    """Run with all results in ``out``, where whoever follows the run sees rows as they come."""
    if out is None:
        serve(grid, config, Output())
        return
    progress = Progress(out, config.run_id)

    def on_round(row: Row) -> bool:
        print(describe_round(row), flush=True)
        return progress.add(row)

    try:
        serve(grid, config, Output(out, on_round, keep_experts=True))
    except lock.RunInUse:
        raise  # whoever follows the run that is there must not take this for its end
    except Exception as error:
        progress.add({"over": str(error) or type(error).__name__})
        raise
    progress.add({"over": ""})


def _end_after(parent: int, patience_s: float = 3.0) -> None:
    """End this process when the one that started it is gone: Flower's own end may wait for a lock that nobody lets go.

    Nothing complete is lost: a checkpoint is replaced whole or not at all.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(patience_s)
    os._exit(1)


def from_run_config(values: dict[str, Any]) -> tuple[RunConfig, Path | None]:
    """A run's configuration and output folder from Flower's flat one, in which ``federation.rounds`` is one name.

    An empty text means that the value is not set, since Flower's configuration has no null. ``settings`` win over
    single names, which may be there only as defaults. A relative ``out`` is relative to the checkout.
    """
    named = {name: value for name, value in values.items() if value != ""}
    out = named.pop("out", None)
    more = yaml.safe_load(str(named.pop("settings", "")) or "{}")
    if not isinstance(more, dict):
        raise ConfigError(f"settings is {more!r}, allowed is a mapping such as '{{data.alpha: 0.1, clock.link: lte}}'")
    return make_config(flatten(named) | flatten(more)), REPO_ROOT / out if out else None
