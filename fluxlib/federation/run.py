"""One federated run on the engine that its configuration names."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, RecordDict

from fluxlib.config import ConfigError, RunConfig
from fluxlib.federation.client import client_app, participant
from fluxlib.federation.engines.local_grid import LocalGrid
from fluxlib.federation.options import OnOutcome, OnRound, Options, RunResult
from fluxlib.federation.server import server_app


def run(
    config: RunConfig,
    on_round: OnRound | None = None,
    out: Path | str | None = None,
    on_outcome: OnOutcome | None = None,
    superlink: str | None = None,
) -> RunResult:
    """Run ``config`` and give its tables and the tuned model.

    Args:
        config: everything that decides the numbers.
        on_round: called with each row of ``rounds`` as it comes, round 0 (the base model) first; returning True
            stops the run after that round.
        out: folder for ``rounds/<run_id>.parquet``, ``participants/<run_id>.parquet`` (a ``.json`` beside each) and,
            while the run lasts, ``checkpoints/<run_id>/``. The same configuration and folder go on from a checkpoint.
        on_outcome: called with what happened in each round, participant by participant, before its row.
        superlink: engine ``deployment`` only: the connection's name in Flower's configuration; ``None``: a federation
            on this machine, for this one run.

    Raises:
        ConfigError: before any work, naming the parameter, what is allowed and what came.
        RunFailed: too few good replies in a round; what was complete before is written.
        CheckpointError: a checkpoint of this configuration that cannot be read.
    """
    if superlink is not None and config.engine != "deployment":
        raise ConfigError(f"superlink is {superlink!r}, which engine {config.engine!r} does not use")
    folder = Path(out) if out is not None else None
    return ENGINES[config.engine](config, Options(folder, on_round, on_outcome, superlink))


def run_local(config: RunConfig, chosen: Options) -> RunResult:
    """The in-process engine: the server app against a :class:`LocalGrid` of the client app."""
    results: list[RunResult] = []
    app = server_app.make_app(config, chosen, results.append)
    participant.forget_workspace()  # the base model on disk may be another by now
    nodes = LocalGrid(client_app.app, config.federation.participants, on_given_up=participant.forget_workspace)
    with nodes.identity() as grid:
        app(grid, Context(grid.run.run_id, 0, {}, RecordDict(), {}))
    return results[0]


def run_simulation(config: RunConfig, chosen: Options) -> RunResult:
    """Flower's simulation engine, see :mod:`fluxlib.federation.engines.simulation`."""
    from fluxlib.federation.engines import simulation

    return simulation.run_simulation(config, chosen)


def run_deployment(config: RunConfig, chosen: Options) -> RunResult:
    """A SuperLink and SuperNodes, see :mod:`fluxlib.federation.engines.deployment`."""
    from fluxlib.federation.engines.deployment import engine

    return engine.run_deployment(config, chosen)


ENGINES = {"local": run_local, "simulation": run_simulation, "deployment": run_deployment}
"""What runs the apps, by the name in ``RunConfig.engine``."""
