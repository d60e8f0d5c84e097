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

from fluxlib.config import ConfigError, RunConfig
from fluxlib.federation.checks import check
from fluxlib.federation.client import client_app
from fluxlib.federation.results import Output, RunResult
from fluxlib.federation.server import server_app
from fluxlib.models.loading import torch_device


def run_simulation(config: RunConfig, output: Output) -> RunResult:
    """Run ``config`` on Flower's simulation engine.

    Raises:
        ConfigError: Ray is missing, or something that :func:`~fluxlib.federation.checks.check` refuses.
        RunFailed, CheckpointError: as on every engine.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "engine is 'simulation', which needs Ray: pip install -c constraints.txt 'fluxlib[simulation]'; "
            "engine 'local' needs nothing more and gives the same numbers"
        )
    check(config, output.out)  # before ten seconds of start-up
    from flwr.simulation import run_simulation as run_flower

    # What Ray sets aside for a participant at work limits how many work at once; without a GPU a worker sees none.
    num_gpus = float(torch_device(config.torch_device).type == "cuda")
    backend = {
        "init_args": {"log_to_driver": False, "logging_level": logging.ERROR},
        "client_resources": {"num_cpus": 1, "num_gpus": num_gpus},
    }
    results: list[RunResult] = []
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's and Ray's, about themselves
        run_flower(
            server_app=server_app.make_app(config, output, results.append),
            client_app=client_app.app,
            num_supernodes=config.federation.participants,
            backend_config=backend,
        )
    return results[0]
