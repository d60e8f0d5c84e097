"""The server's state on disk after each round, so that a killed run goes on where it was.

A checkpoint is a folder of a few files and one manifest that names them. The manifest is replaced last and at once,
so at any moment the folder holds one whole checkpoint: the new one or the one before. Files that the manifest does
not name are left-overs of an interrupted write; the next write removes them.

* ``manifest.json``: round, configuration, clocks, digest of every version, names of the other files
* ``experts-<round>.safetensors``: experts that differ from the base, in the model's own type
* ``roles-<round>.safetensors``: the role state
* ``nodes-<round>.safetensors``: what participants keep, of those whose state changed in that round; local engine only
* ``rounds-<round>.parquet`` and the other tables so far

What a participant holds is not stored a second time: it gets the server's experts. Those that have changed since
its version are part of its next delta, so they are replaced before they are used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxlib import records
from fluxlib.config import RunConfig
from fluxlib.federation.client.local_copy import LocalCopy
from fluxlib.federation.client.node_state import record_from_json, record_to_json
from fluxlib.federation.engines.grid import LocalGrid
from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.sync import ExpertStore, ModelVersion
from fluxlib.federation.results import TABLES
from fluxlib.federation.server.strategy import FluxStrategy
from fluxlib.federation.store.tables import Tables, Totals
from fluxlib.methods.base import ExpertKey
from fluxlib.roles import RoleState

log = logging.getLogger(__name__)

FORMAT = 3
"""Raised when a manifest means something else; older checkpoints are then not resumed from."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read; the message names the folder, and what to do about it."""


class Checkpoints:
    """The checkpoints of one run in ``out``; one configuration resumes from its own only."""

    def __init__(self, out: Path, config: RunConfig) -> None:
        self.folder = out / "checkpoints" / config.run_id
        self._identity = {"format": FORMAT, "numbers": config.numbers, "engine": config.engine}
        self._nodes: dict[str, list[str]] = {}
        """File names and the nodes whose newest state they hold."""

    def save(self, number: int, strategy: FluxStrategy, tables: Tables) -> None:
        """Write the state after round ``number``; the checkpoint before stays whole until this one is.

        Raises:
            OSError: the disk is full or gone; the checkpoint before is still there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep(self._named(self._read_manifest()))
        store = strategy.store
        files = {table: f"{table}-{number}.parquet" for table in TABLES}
        files |= {kind: f"{kind}-{number}.safetensors" for kind in ("experts", "roles")}
        save_tensors(self.folder / files["experts"], store_tensors(store))
        roles = {name: torch.from_numpy(array.copy()) for name, array in strategy.role_state.to_arrays().items()}
        save_tensors(self.folder / files["roles"], roles)
        for table, frame in tables.frames().items():
            records.write(table, frame, self.folder / files[table], {"run_id": strategy.config.run_id})
        if isinstance(strategy.grid, LocalGrid):
            self._save_nodes(f"nodes-{number}.safetensors", strategy.grid)
        manifest = {
            **self._identity,
            "round": number,
            "config": strategy.config.model_dump(mode="json"),  # for people who look at unfinished runs
            "files": files,
            "nodes": self._nodes,
            "totals": asdict(tables.totals),
            "digests": store.digest_of_version,
            "changed_at": {f"{layer}.{expert}": v for (layer, expert), v in store.changed_at.items() if v},
            "profiled": sorted(strategy.profiled),
            "clip_norm": strategy.guard.bound,
        }
        temporary = self.folder / "manifest.tmp"
        temporary.write_text(json.dumps(manifest))
        replace_file(temporary, self.folder / "manifest.json")
        self._sweep(self._named(manifest))

    def resume(self, strategy: FluxStrategy, tables: Tables) -> int:
        """Put the saved state into ``strategy``, its grid and ``tables``; the rounds that are done already.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another base model.
        """
        try:
            manifest = self._read_manifest()
            if manifest is None:
                return 0
            self._restore(manifest, strategy, tables)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint in {self.folder} cannot be used: it is damaged, or of something else ({error}); "
                "remove the folder to start the run anew"
            ) from error
        log.info("%s goes on after round %d", strategy.config.run_id, manifest["round"])
        return int(manifest["round"])

    def remove(self) -> None:
        """Forget the checkpoint: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)
        parent = self.folder.parent
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()

    def _restore(self, manifest: dict[str, Any], strategy: FluxStrategy, tables: Tables) -> None:
        files = manifest["files"]
        changed_at = {_key(name): version for name, version in manifest["changed_at"].items()}
        strategy.store.set(load_experts(self.folder / files["experts"]), changed_at, manifest["digests"])
        roles = {name: tensor.numpy() for name, tensor in load_file(self.folder / files["roles"]).items()}
        strategy.role_state = RoleState.from_arrays(roles)
        strategy.profiled = set(manifest["profiled"])
        strategy.guard.bound = manifest["clip_norm"]
        self._nodes = {name: list(nodes) for name, nodes in manifest["nodes"].items()}
        if isinstance(strategy.grid, LocalGrid):
            for name, nodes in self._nodes.items():
                restore_nodes(load_file(self.folder / name), nodes, strategy.grid, strategy.store)
        frames = {table: records.read(table, self.folder / files[table]) for table in TABLES}
        tables.restore(frames, Totals(**manifest["totals"]))

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.folder / "manifest.json"
        if not path.is_file():
            return None
        manifest: dict[str, Any] = json.loads(path.read_text())
        if {name: manifest.get(name) for name in self._identity} != self._identity:
            log.warning("%s is of another configuration: it is not resumed from, and will be replaced", self.folder)
            return None
        return manifest

    def _save_nodes(self, name: str, grid: LocalGrid) -> None:
        changed = [str(node) for node in grid.take_changed()]
        save_tensors(self.folder / name, node_tensors(grid, changed))
        kept = {file: [node for node in nodes if node not in changed] for file, nodes in self._nodes.items()}
        self._nodes = {file: nodes for file, nodes in kept.items() if nodes} | {name: changed}

    def _named(self, manifest: Mapping[str, Any] | None) -> set[str]:
        """Files that belong to the checkpoint of ``manifest``."""
        if manifest is None:
            return set()
        files = set(manifest["files"].values())
        about = {Path(name).with_suffix(".json").name for name in files if name.endswith(".parquet")}
        return {"manifest.json", *files, *about, *manifest["nodes"]}

    def _sweep(self, keep: set[str]) -> None:
        for path in self.folder.iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)


# Experts as a file.


def store_tensors(store: ExpertStore) -> dict[str, Tensor]:
    """The experts that are no longer the base's, by their names on the wire, in the model's own type."""
    return {
        wires.key_name(key, name): tensor.contiguous()
        for key in store.changed()
        for name, tensor in store.tensors(key).items()
    }


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` as safetensors, and see them on disk before going on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu() for name, tensor in tensors.items()}, path)
    _sync(path)


def load_experts(path: Path) -> dict[ExpertKey, dict[str, Tensor]]:
    """Inverse of :func:`store_tensors` and :func:`save_tensors`."""
    experts: dict[ExpertKey, dict[str, Tensor]] = {}
    for name, tensor in load_file(path).items():
        key, part = wires.parse_name(name)
        experts.setdefault(key, {})[part] = tensor
    return experts


def replace_file(temporary: Path, path: Path) -> None:
    """Put a file in place of another at once, when it is on disk."""
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _key(name: str) -> ExpertKey:
    layer, expert = name.split(".")
    return int(layer), int(expert)


# Participants' states of the in-process grid as tensors: arrays as they are, all else as the bytes of a JSON text.

_RECORDS = "records"


def node_tensors(grid: LocalGrid, nodes: Iterable[str]) -> dict[str, Tensor]:
    """The states of ``nodes``, named ``"<node>/<record>/<key>"``, without the experts that they hold."""
    tensors: dict[str, Tensor] = {}
    for node in nodes:
        plain: dict[str, Any] = {}
        for name, record in grid.context(int(node)).state.items():
            if isinstance(record, ArrayRecord) and name != "experts":
                tensors |= {f"{node}/{name}/{key}": torch.from_numpy(a.numpy()) for key, a in record.items()}
            elif name != "experts":
                plain[name] = record_to_json(record)
        text = np.frombuffer(json.dumps(plain).encode(), np.uint8)
        tensors[f"{node}/{_RECORDS}"] = torch.from_numpy(text.copy())
    return tensors


def restore_nodes(tensors: Mapping[str, Tensor], nodes: Iterable[str], grid: LocalGrid, store: ExpertStore) -> None:
    """Inverse of :func:`node_tensors` for ``nodes``; their experts come from ``store``."""
    states: dict[str, RecordDict] = {node: RecordDict() for node in nodes}
    for name, tensor in tensors.items():
        node, record, *key = name.split("/", 2)
        if node not in states:
            continue
        if record == _RECORDS:
            plain = json.loads(tensor.numpy().tobytes())
            states[node].update({name: record_from_json(value) for name, value in plain.items()})
        else:
            states[node].setdefault(record, ArrayRecord())[key[0]] = Array(tensor.numpy())
    for node, state in states.items():
        if "held" in state:
            version = ModelVersion.read(state["held"])
            LocalCopy(version, _held_experts(version, store)).save(state)
        grid.context(int(node)).state = state


def _held_experts(held: ModelVersion, store: ExpertStore) -> ArrayRecord:
    """Experts that had changed by the held version and not since; the others come with the next delta."""
    keys = [key for key in store.changed() if store.changed_at[key] <= held.number]
    arrays = {key: store.arrays(key, key in held.approximate) for key in keys}
    return wires.make_record({wires.key_name(key, name): a for key in keys for name, a in arrays[key].items()})
