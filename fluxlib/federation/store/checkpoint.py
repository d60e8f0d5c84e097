"""The server's state on disk after each round, so that a killed run goes on where it was.

A checkpoint is a folder of a few files and one manifest that names them. The manifest is replaced last and at once,
so at any moment the folder holds one whole checkpoint: the new one or the one before. Files that the manifest does
not name are left-overs of an interrupted write; the next write removes them.

* ``manifest.json``: round, configuration, clocks, digest of every version, names of the other files
* ``experts-<round>.safetensors``: experts that differ from the base, in the model's own type
* ``roles-<round>.safetensors``: the role state
* ``nodes-<round>.safetensors``: what participants keep, of those whose state changed in that round; local engine only
* ``rounds-<round>.parquet``, ``participants-<round>.parquet``: the tables so far

What a participant holds is not stored a second time: it gets the server's experts. Those that have changed since
its version are part of its next delta, so they are replaced before they are used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxlib import records
from fluxlib.config import RunConfig
from fluxlib.federation.engines.local_grid import LocalGrid
from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.server.strategy import FluxStrategy
from fluxlib.federation.store import nodes as node_states
from fluxlib.federation.store.tables import Totals
from fluxlib.roles import RoleState

log = logging.getLogger(__name__)

FORMAT = 2
"""Raised when a manifest means something else; older checkpoints are then not resumed from."""

TABLES = ("rounds", "participants", "timeline")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read; the message names the folder, and what to do about it."""


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: after ``round``, with the tables and clocks of that moment."""

    round: int
    totals: Totals
    rounds: pd.DataFrame
    participants: pd.DataFrame
    timeline: pd.DataFrame


class Checkpoints:
    """The checkpoints of one run in ``out``; one configuration resumes from its own only."""

    def __init__(self, out: Path, config: RunConfig) -> None:
        self.folder = out / "checkpoints" / config.run_id
        numbers = config.model_dump(mode="json", exclude={"round_timeout_s", "join_timeout_s"})
        self._identity = {"format": FORMAT, "config": numbers}
        self._nodes: dict[str, list[str]] = {}
        """File names and the nodes whose newest state they hold."""

    def save(
        self,
        round_index: int,
        strategy: FluxStrategy,
        grid: object,
        frame: Callable[[str], pd.DataFrame],
        totals: Totals,
    ) -> None:
        """Write the state after ``round_index``; the checkpoint before stays whole until this one is.

        Raises:
            OSError: the disk is full or gone; the checkpoint before is still there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep(self._named())
        store = strategy.store
        names = {table: f"{table}-{round_index}.parquet" for table in TABLES}
        names |= {kind: f"{kind}-{round_index}.safetensors" for kind in ("experts", "roles")}
        save_tensors(self.folder / names["experts"], store_tensors(store))
        roles = {name: torch.from_numpy(array.copy()) for name, array in strategy.role_state.to_arrays().items()}
        save_tensors(self.folder / names["roles"], roles)
        for table in TABLES:
            records.write(table, frame(table), self.folder / names[table], {"run_id": strategy.config.run_id})
        if isinstance(grid, LocalGrid):
            self._save_nodes(round_index, grid)
        manifest = {
            **self._identity,
            "round": round_index,
            "files": names,
            "nodes": self._nodes,
            "totals": asdict(totals),
            "digests": store.digest_of_version,
            "changed_at": {f"{layer}.{expert}": v for (layer, expert), v in store.changed_at.items() if v},
            "profiled": sorted(strategy.profiled),
            "clip_norm": strategy.guard.bound,
        }
        _replace_text(self.folder / "manifest.json", json.dumps(manifest))
        self._sweep(self._named(manifest))

    def resume(self, strategy: FluxStrategy, grid: object) -> Resumed | None:
        """Put the saved state into ``strategy`` and ``grid``; ``None`` where there is none of this configuration.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another base model.
        """
        manifest = self._read_manifest()
        if manifest is None:
            return None
        try:
            return self._restore(manifest, strategy, grid)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint in {self.folder} cannot be used: {error}; remove the folder to start the run anew"
            ) from error

    def remove(self) -> None:
        """Forget the checkpoint: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)
        parent = self.folder.parent
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()

    def _restore(self, manifest: dict[str, Any], strategy: FluxStrategy, grid: object) -> Resumed:
        files = manifest["files"]
        experts: dict[tuple[int, int], dict[str, Tensor]] = {}
        for name, tensor in load_file(self.folder / files["experts"]).items():
            key, part = wires.parse_name(name)
            experts.setdefault(key, {})[part] = tensor
        changed_at = {_pair(name): version for name, version in manifest["changed_at"].items()}
        strategy.store.set(experts, changed_at, manifest["digests"])
        roles = {name: tensor.numpy() for name, tensor in load_file(self.folder / files["roles"]).items()}
        strategy.role_state = RoleState.from_arrays(roles)
        strategy.profiled = set(manifest["profiled"])
        if strategy.guard.clip is not None:
            strategy.guard.clip = replace(strategy.guard.clip, bound=manifest["clip_norm"])
        self._nodes = {name: list(keys) for name, keys in manifest["nodes"].items()}
        if isinstance(grid, LocalGrid):
            for name, keys in self._nodes.items():
                node_states.restore(load_file(self.folder / name), keys, grid, strategy.store)
        tables = {table: records.read(table, self.folder / files[table]) for table in TABLES}
        return Resumed(manifest["round"], Totals(**manifest["totals"]), **tables)

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.folder / "manifest.json"
        if not path.is_file():
            return None
        try:
            manifest: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}; remove {self.folder} to start the run anew") from None
        if {name: manifest.get(name) for name in self._identity} != self._identity:
            log.warning("%s is of another configuration: it is not resumed from, and will be replaced", self.folder)
            return None
        return manifest

    def _save_nodes(self, round_index: int, grid: LocalGrid) -> None:
        changed = grid.take_changed()
        tensors = node_states.collect(grid, changed)
        name = f"nodes-{round_index}.safetensors"
        save_tensors(self.folder / name, tensors)
        keys = [str(node) for node in changed]
        kept = {file: [key for key in old if key not in set(keys)] for file, old in self._nodes.items()}
        self._nodes = {file: old for file, old in kept.items() if old} | {name: keys}

    def _named(self, manifest: Mapping[str, Any] | None = None) -> set[str]:
        """Files that belong to the checkpoint on disk."""
        manifest = manifest or self._read_manifest() or {"files": {}, "nodes": {}}
        files = set(manifest["files"].values())
        about = {Path(name).with_suffix(".json").name for name in files if name.endswith(".parquet")}
        return {"manifest.json", *files, *about, *manifest["nodes"]}

    def _sweep(self, keep: set[str]) -> None:
        for path in self.folder.iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)


def store_tensors(store: ExpertStore) -> dict[str, Tensor]:
    """The experts that are no longer the base's, by their names on the wire, in the model's own type."""
    return {
        wires.key_name(key, name): tensor.contiguous()
        for key in store.changed()
        for name, tensor in store.tensors(key).items()
    }


def _pair(name: str) -> tuple[int, int]:
    layer, expert = name.split(".")
    return int(layer), int(expert)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` as safetensors, and see them on disk before going on."""
    save_file({name: tensor.detach().cpu() for name, tensor in tensors.items()}, path)
    _sync(path)


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
