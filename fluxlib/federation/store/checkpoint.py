"""The server's state on disk after each round, so that a killed run goes on where it was.

A checkpoint is one safetensors file, replaced at once. Its tensors are the experts that differ from the base, the role
state and, on the local engine, what each participant keeps; the rest is a JSON text beside them.

What a participant holds is not stored a second time: it gets the server's experts. Those that have changed since its
version come with its next delta; where they need not (``wire.max_staleness``), older ones are stored once for all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fluxlib.config import RunConfig
from fluxlib.federation.client.local_copy import LocalCopy
from fluxlib.federation.client.node_state import from_tensors, to_tensors
from fluxlib.federation.engines.grid import LocalGrid
from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.sync import ExpertStore, ModelVersion
from fluxlib.federation.server.strategy import ROLES, FluxStrategy
from fluxlib.federation.store.tables import Tables
from fluxlib.federation.store.tensor_file import read_tensors, write_tensors
from fluxlib.io import checked, reading
from fluxlib.roles import RoleState

log = logging.getLogger(__name__)

FORMAT = 5
"""Raised when a checkpoint means something else; older ones are then not resumed from."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read; the message names the file, and what to do about it."""


class Checkpoint:
    """The checkpoint of one run in ``out``; one configuration resumes from its own only."""

    def __init__(self, out: Path, config: RunConfig) -> None:
        self.path = out / "checkpoints" / f"{config.run_id}.safetensors"
        self._identity = {"format": FORMAT, "numbers": config.numbers, "engine": config.engine}

    def save(self, number: int, strategy: FluxStrategy, tables: Tables) -> None:
        """Write the state after round ``number``; on any error the checkpoint before is still there."""
        store, state = strategy.store, strategy.role_state
        about = {
            **self._identity,
            "round": number,
            "roles_round": state.round,
            "config": strategy.config.model_dump(mode="json"),  # for people who look at unfinished runs
            "totals": {"wall_s": tables.wall_s, "device_s": tables.device_s},
            "rows": tables.rows,
            "digests": store.digest_of_version,
            "history": [[*key, [[at, digest.hex()] for at, digest in store.history[key]]] for key in store.changed()],
            "profiled": sorted(strategy.profiled),
        }
        tensors = {f"experts/{name}": tensor for name, tensor in changed_tensors(store).items()}
        tensors |= {f"roles/{name}": getattr(state, name) for name in ROLES}
        write_tensors(self.path, tensors | _node_tensors(strategy), json.dumps(about))

    def resume(self, strategy: FluxStrategy, tables: Tables) -> int:
        """Put the saved state into ``strategy``, its grid and ``tables``; the rounds that are done already."""
        if not self.path.is_file():
            return 0
        with reading(
            f"the checkpoint {self.path} is damaged or of something else, remove it to start the run anew",
            CheckpointError,
        ):
            tensors, text = read_tensors(self.path)
            about = checked("about", json.loads(text), dict)
            if {name: about.get(name) for name in self._identity} != self._identity:
                log.warning("%s is of another configuration: it is not resumed from, and will be replaced", self.path)
                return 0
            done = checked("round", about["round"], int)
            self._restore(about, _by_kind(tensors), strategy, tables)
        log.info("%s goes on after round %d", strategy.config.run_id, done)
        return done

    def remove(self) -> None:
        """Forget the checkpoint: the run is complete."""
        self.path.unlink(missing_ok=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    def _restore(
        self, about: dict[str, Any], saved: dict[str, dict[str, Tensor]], strategy: FluxStrategy, tables: Tables
    ) -> None:
        history = {
            (layer, expert): [(checked("version", at, int), bytes.fromhex(digest)) for at, digest in found]
            for layer, expert, found in about["history"]
        }
        strategy.store.set(wires.by_expert(saved.get("experts", {})), history, about["digests"])
        for name in ROLES:
            found, known = saved["roles"][name], getattr(strategy.role_state, name)
            if (found.dtype, found.shape) != (known.dtype, known.shape):
                raise ValueError(f"{name} is {found.dtype} {[*found.shape]}, allowed is {known.dtype} {[*known.shape]}")
        number = checked("roles_round", about["roles_round"], int)
        measured, first, measured_round = (saved["roles"][name] for name in ROLES)
        strategy.role_state = RoleState(measured, first, measured_round, number)
        strategy.profiled = {checked("profiled", one, int) for one in about["profiled"]}
        tables.wall_s, tables.device_s = (
            checked(name, about["totals"][name], float) for name in ("wall_s", "device_s")
        )
        tables.rows = checked("rows", about["rows"], dict)
        tables.frames()  # rows that fit no table would be noticed at the end
        copies = {name: Array(tensor.numpy()) for name, tensor in saved.get("copies", {}).items()}
        for node, tensors in _by_kind(saved.get("nodes", {})).items():
            state, store = from_tensors(tensors), strategy.store
            if "held" in state:
                version = ModelVersion.read(state["held"])
                # Experts that changed after the version they are held in come with the next delta, or are copies.
                arrays = store.record([key for key in store.changed() if store.last(key)[0] <= version.of(key)])
                arrays |= {name: copies[copy] for name, copy in _names_of_copies(store, version) if copy in copies}
                LocalCopy(version, wires.make_record(arrays)).save(state)
            assert isinstance(strategy.grid, LocalGrid)
            strategy.grid.context(int(node)).state = state


def changed_tensors(store: ExpertStore) -> dict[str, Tensor]:
    """The experts that are no longer the base's, or their B's, by their names on the wire, in their own type."""
    return {wires.key_name(key, name): tensor for key in store.changed() for name, tensor in store.learned(key).items()}


def _names_of_copies(store: ExpertStore, held: ModelVersion) -> Iterator[tuple[str, str]]:
    """Names of the arrays of all experts that have changed since, and of their copies: with the version of a change."""
    for key in store.changed():
        at = store.last(key, held.of(key))[0]
        if 0 < at < store.last(key)[0]:
            for name in map(partial(wires.key_name, key), store.shapes[key]):
                yield name, f"{name}@{at}"


def _node_tensors(strategy: FluxStrategy) -> dict[str, Tensor]:
    """What participants in this process keep, as ``nodes/<node>/...``, without the experts that they hold.

    Of those, the ones that the server no longer has are added once for all, as ``copies/...``.
    """
    tensors: dict[str, Tensor] = {}
    for node in strategy.grid.get_node_ids() if isinstance(strategy.grid, LocalGrid) else ():
        state = strategy.grid.context(node).state
        kept = {name: record if name != "experts" else ArrayRecord() for name, record in state.items()}
        tensors |= {f"nodes/{node}/{name}": tensor for name, tensor in to_tensors(kept).items()}
        if strategy.max_staleness and "held" in state:
            held: Any = state["experts"]
            for name, copy in _names_of_copies(strategy.store, ModelVersion.read(state["held"])):
                if f"copies/{copy}" not in tensors:
                    tensors[f"copies/{copy}"] = torch.from_numpy(held[name].numpy())
    return tensors


def _by_kind(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors grouped by the first part of their names."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        grouped.setdefault(kind, {})[rest] = tensor
    return grouped
