"""Federated runs over Flower: one server app, one client app, one strategy, whatever engine carries the messages.

This is the only part of the library that needs flwr.
"""

from fluxlib.federation.client.local_data import load_task
from fluxlib.federation.engines.grid import LocalGrid
from fluxlib.federation.results import Output, RunFailed, RunResult
from fluxlib.federation.run import run
from fluxlib.federation.store.checkpoint import CheckpointError
