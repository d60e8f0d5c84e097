"""The Flower app of the server; what it does is in :mod:`fluxlib.federation.rounds`.

``app`` takes everything from Flower's run configuration: the names of :class:`~fluxlib.config.RunConfig`, and ``out``,
the folder of the tables. A caller in the same process makes an app of its own with :func:`make_app` and gets the
result back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fluxlib.config import RunConfig, make_config
from fluxlib.federation.options import Options, RunResult
from fluxlib.federation.rounds import serve


def make_app(
    config: RunConfig | None = None,
    options: Options | None = None,
    on_result: Callable[[RunResult], None] | None = None,
) -> ServerApp:
    """A server app; ``config`` and ``options`` left out come from Flower's run configuration."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        given, folder = (config, None) if config else from_run_config(context.run_config)
        result = serve(grid, given, options or Options(out=folder))
        if on_result:
            on_result(result)

    return app


def from_run_config(values: dict[str, Any]) -> tuple[RunConfig, Path | None]:
    """A run's configuration and output folder from Flower's flat one; hyphens stand for underscores.

    An empty text means that the value is not set, since Flower's configuration has no null.
    """
    named = {name.replace("-", "_"): value for name, value in values.items() if value != ""}
    out = named.pop("out", None)
    return make_config(named), Path(out) if out else None


app = make_app()
