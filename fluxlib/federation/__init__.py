"""Federated runs over Flower: one server app, one client app, one strategy, whatever engine carries the messages.

- ``run``: one run on the engine its configuration names; ``results``: what comes out; ``checks``: what is refused
- ``server``: the course of a run: who is there (``join``), a round (``strategy``), what a reply must satisfy
  (``validation``), the mean per expert (``aggregation``)
- ``client``: what one participant does with a message
- ``protocol``: what travels, in which form, and which version of which expert who holds
- ``store``: tables, checkpoints and the lock of a run
- ``engines``: in this process (``grid``), Flower's simulation, a deployment

This is the only part of the library that needs flwr.
"""

from fluxlib.federation.client.local_data import load_task
from fluxlib.federation.engines.grid import LocalGrid
from fluxlib.federation.results import Output, RunFailed, RunResult
from fluxlib.federation.run import run
from fluxlib.federation.store.checkpoint import CheckpointError
