"""What stays on a node from message to message: records in its Flower context, and the same in a folder.

The copy of the global model is :class:`~fluxlib.federation.client.local_copy.LocalCopy`; the method's own state is
written here. Tensors go into an ``ArrayRecord``, everything else into a JSON text, so that any engine can carry it.

A node whose configuration names a ``state-dir`` goes on after a restart: it loads from there what its context lacks and
writes after every message what has changed. Each array is a file, named by its SHA-256 and held against it when it is
read; ``manifest.json`` says which record has which, and is replaced last. Where anything does not fit, all is dropped:
the participant then holds nothing, says so, and gets every changed expert from the server.
"""

from __future__ import annotations

import base64
import json
import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fluxlib.federation.protocol import wire as wires
from fluxlib.methods.base import ParticipantState
from fluxlib.profiling import Profile

log = logging.getLogger(__name__)

STATE_DIR = "state-dir"
"""Entry of a node's configuration that names the folder."""

_MANIFEST = "manifest.json"


def save_state(state: RecordDict, value: ParticipantState) -> None:
    """Write ``value`` into a node's ``state``, in place of what was there."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for item in fields(Profile) if value.profile is not None else ():
        found = getattr(value.profile, item.name)
        (tensors if isinstance(found, Tensor) else rest)[item.name] = found
    state["profile"] = ArrayRecord({name: Array(tensor.cpu().numpy()) for name, tensor in tensors.items()})
    state["participant"] = ConfigRecord({"profile_round": value.profile_round, "profile": json.dumps(rest)})


def load_state(state: RecordDict) -> ParticipantState:
    """What :func:`save_state` wrote; an empty state for a node that wrote nothing yet."""
    if "participant" not in state:
        return ParticipantState()
    about: Any = state["participant"]
    tensors = state.get("profile", ArrayRecord())
    values: dict[str, Any] = {name: torch.from_numpy(array.numpy()) for name, array in tensors.items()}
    values |= {name: _tuples(value) for name, value in json.loads(about["profile"]).items()}
    return ParticipantState(Profile(**values) if values else None, about["profile_round"])


def keep(folder: Path, state: RecordDict) -> None:
    """Write what changed in ``state`` since the last call; a full disk costs a warning, not the round."""
    records: dict[str, Any] = {}
    files: set[str] = set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, record in state.items():
            if not isinstance(record, ArrayRecord):
                records[name] = record_to_json(record)
                continue
            arrays = {key: (wires.array_digest(a).hex(), a.dtype, a.shape) for key, a in record.items()}
            records[name] = ["arrays", arrays]
            for key, (digest, *_) in arrays.items():
                files.add(digest)
                if not (folder / f"{digest}.npy").exists():
                    _write(folder / f"{digest}.npy", record[key].data)
        _write(folder / _MANIFEST, json.dumps(records).encode())
        for path in folder.glob("*.npy"):
            if path.stem not in files:
                path.unlink()
    except OSError as error:
        log.warning("cannot keep the participant's state in %s: %s", folder, error)


def restore(folder: Path, state: RecordDict) -> bool:
    """Load into ``state`` what ``folder`` holds; whether that was anything. What is damaged is removed."""
    if not (folder / _MANIFEST).is_file():
        return False
    try:
        found = {
            name: _read_arrays(folder, value) if kind == "arrays" else record_from_json([kind, value])
            for name, (kind, value) in json.loads((folder / _MANIFEST).read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("the participant's state in %s cannot be used, it starts anew: %s", folder, error)
        for path in (folder / _MANIFEST, *folder.glob("*.npy")):
            path.unlink(missing_ok=True)
        return False
    for name, record in found.items():
        state[name] = record
    return True


def record_to_json(record: ConfigRecord | MetricRecord) -> list[Any]:
    """A record without arrays as JSON: its kind and its values, bytes as base64."""
    values = {
        key: {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
        for key, value in record.items()
    }
    return ["metric" if isinstance(record, MetricRecord) else "config", values]


def record_from_json(value: list[Any]) -> ConfigRecord | MetricRecord:
    """Inverse of :func:`record_to_json`."""
    kind, values = value
    made = {key: base64.b64decode(v["bytes"]) if isinstance(v, dict) else v for key, v in values.items()}
    return MetricRecord(made) if kind == "metric" else ConfigRecord(made)


def _read_arrays(folder: Path, arrays: dict[str, Any]) -> ArrayRecord:
    record = ArrayRecord()
    for key, (digest, dtype, shape) in arrays.items():
        array = Array(dtype, tuple(shape), "numpy.ndarray", (folder / f"{digest}.npy").read_bytes())
        if wires.array_digest(array).hex() != digest:
            raise ValueError(f"{key} is not what was written")
        record[key] = array
    return record


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, whenever the node is killed."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _tuples(value: object) -> object:
    """JSON has lists only; profiles are compared by their tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
