"""Flower's simulation engine: the same apps, participants spread over the cores or GPUs of a machine or a Ray cluster.

Ray is not part of the default installation: it is large, takes ten seconds and more to start, and only this engine
needs it (``pip install 'fluxlib[simulation]'``). A worker is given one core, and runs on one thread as everywhere else,
so numbers are those of the other engines.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from typing import Any

from fluxlib.config import ConfigError, RunConfig
from fluxlib.federation.client import client_app
from fluxlib.federation.options import Options, RunResult, check
from fluxlib.federation.server import server_app
from fluxlib.models.hardware import torch_device

CLIENT_RESOURCES = {"num_cpus": 1, "num_gpus": 0.0}
"""What Ray sets aside for one participant at work; it limits how many work at once, not what one of them takes.
Without a share of a GPU a worker does not see any: it gets a whole one where the run computes on GPUs."""


def run_simulation(config: RunConfig, options: Options) -> RunResult:
    """Run ``config`` on Flower's simulation engine.

    Raises:
        ConfigError: Ray is missing, or something that :func:`~fluxlib.federation.options.check` refuses.
        RunFailed, CheckpointError: as on every engine.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "engine is 'simulation', which needs Ray: pip install -c constraints.txt 'fluxlib[simulation]'; "
            "engine 'local' needs nothing more and gives the same numbers"
        )
    check(config, options.out)  # before ten seconds of start-up
    from flwr.simulation import run_simulation as run_flower

    results: list[RunResult] = []
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's and Ray's, about themselves
        run_flower(
            server_app=server_app.make_app(config, options, results.append),
            client_app=client_app.app,
            num_supernodes=config.federation.participants,
            backend_config=_backend(config),
        )
    return results[0]


def _backend(config: RunConfig) -> dict[str, Any]:
    num_gpus = float(torch_device(config.torch_device).type == "cuda")
    return {
        "init_args": {"log_to_driver": False, "logging_level": logging.ERROR},
        "client_resources": CLIENT_RESOURCES | {"num_gpus": num_gpus},
    }
