"""Federated runs over Flower: one server app, one client app, one strategy, whatever engine carries the messages.

From the outside in:

- :func:`run` and :class:`RunResult`: one run on the engine its configuration names,
- ``server_app``, ``client_app``: the Flower apps; ``rounds`` and ``participant`` are what they do,
- ``strategy``: a round on the server; ``aggregation``, ``replies``, ``outcome``: the mean per expert, what a reply
  must satisfy, what happened,
- ``sync``, ``held``, ``roster``, ``joining``: versions of experts, who holds which, who is there,
- ``messages``, ``wire``, ``state``: what travels and how, and what a participant keeps,
- ``local_grid``: the in-process engine; ``checkpoint``, ``nodes``: going on after a crash; ``tables``: the rows.

This is the only part of the library that needs flwr.
"""

from fluxlib.federation.client.participant import load_task
from fluxlib.federation.engines.local_grid import LocalGrid
from fluxlib.federation.options import Options, RunResult
from fluxlib.federation.run import run
from fluxlib.federation.server.outcome import RunFailed
from fluxlib.federation.store.checkpoint import CheckpointError

__all__ = ["CheckpointError", "LocalGrid", "Options", "RunFailed", "RunResult", "load_task", "run"]
