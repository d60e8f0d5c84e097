"""One federated run on the engine that its configuration names."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from flwr.serverapp import ServerApp

from fluxlib.config import RunConfig
from fluxlib.federation.checks import check
from fluxlib.federation.client import client_app, local_copy
from fluxlib.federation.engines.grid import LocalGrid
from fluxlib.federation.results import Output, Row, RunResult
from fluxlib.federation.server.rounds import serve
from fluxlib.federation.store.checkpoint import Checkpoint
from fluxlib.io import ConfigError
from fluxlib.models.loading import torch_device


def run(
    config: RunConfig,
    on_round: Callable[[Row], bool | None] | None = None,
    out: Path | str | None = None,
    superlink: str | None = None,
) -> RunResult:
    """Run ``config`` and give its tables and the tuned model.

    Args:
        on_round: called with each row of ``rounds`` as it comes, round 0 (the base model) first; returning True
            stops the run after that round.
        out: folder for ``rounds/<run_id>.parquet``, ``participants/<run_id>.parquet`` (a ``.json`` beside each) and,
            while the run lasts, a checkpoint, from which the same configuration and folder go on.
        superlink: engine ``deployment`` only: the connection's name in Flower's configuration; ``None``: a federation
            on this machine, for this one run.

    Raises:
        ConfigError: before any work, naming the parameter, what is allowed and what came.
        RunFailed: too few good replies in a round; what was complete before is written.
        CheckpointError: a checkpoint of this configuration that cannot be read.
    """
    output = Output(Path(out) if out is not None else None, on_round)
    if config.engine == "deployment":
        from fluxlib.federation.engines.deployment.engine import run_deployment

        return run_deployment(config, output, superlink)
    if superlink is not None:
        raise ConfigError(f"superlink is {superlink!r}, which engine {config.engine!r} does not use")
    if config.engine == "simulation":
        return run_simulation(config, output)
    local_copy.workspace.cache_clear()  # the base model on disk may be another by now
    return serve(LocalGrid(client_app.app, config.federation.participants), config, output)


def run_simulation(config: RunConfig, output: Output) -> RunResult:
    """Flower's simulation engine: participants spread over the cores or GPUs of a machine or a Ray cluster.

    Ray is large, takes ten seconds and more to start, and only this engine needs it. A worker is given one core, and
    runs on one thread as everywhere else, so numbers are those of the other engines.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "engine is 'simulation', which needs Ray: pip install -c constraints.txt 'fluxlib[simulation]'; "
            "engine 'local' needs nothing more and gives the same numbers"
        )
    check(config, output.out)  # before ten seconds of start-up
    if output.out and (kept := Checkpoint(output.out, config).path).is_file():
        raise ConfigError(
            f"{kept} is of a run that was interrupted. What participants keep on engine 'simulation' is gone with its "
            "processes, so it cannot go on as it was: remove the file to start anew"
        )
    from flwr.simulation import run_simulation as run_flower

    # What Ray sets aside for a participant at work limits how many work at once; without a GPU a worker sees none.
    num_gpus = float(torch_device(config.torch_device).type == "cuda")
    results: list[RunResult] = []
    server = ServerApp()
    server.main()(lambda grid, context: results.append(serve(grid, config, output)))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's and Ray's, about themselves
        run_flower(
            server_app=server,
            client_app=client_app.app,
            num_supernodes=config.federation.participants,
            backend_config={
                "init_args": {"log_to_driver": False, "logging_level": logging.ERROR},
                "client_resources": {"num_cpus": 1, "num_gpus": num_gpus},
            },
        )
    return results[0]
