"""What a participant keeps on its disk: the same records as in its Flower context, across restarts of its node.

A node whose configuration names a ``state-dir`` loads from it what its context lacks, and writes after every message
what has changed: arrays that are new go into one more file, all others stay where they are. So the base model lies on
the disk once (where ``models.load`` finds it) and after that only what came since. ``manifest.json`` says which array
lies in which file and is replaced last; a file that it does not name is swept up by the next write.

Every array is held against its SHA-256 when it is read. Whatever does not fit, whole or in part, is dropped: the
participant then holds nothing, says so, and gets every changed expert from the server.
"""

from __future__ import annotations

import base64
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fluxlib.federation.protocol import wire as wires

log = logging.getLogger(__name__)

STATE_DIR = "state-dir"
"""Entry of a node's configuration that names the folder."""

FORMAT = 1
MAX_FILES = 16
"""Above this many, everything is written into one file again."""

_MANIFEST = "manifest.json"


class Damaged(ValueError):
    """The folder does not hold what its manifest says."""


def keep(folder: Path, state: RecordDict) -> None:
    """Write what changed in ``state`` since the last call; a full disk costs a warning, not the round."""
    try:
        _write(folder, state)
    except OSError as error:
        log.warning("cannot keep the participant's state in %s: %s", folder, error)


def restore(folder: Path, state: RecordDict) -> bool:
    """Load into ``state`` what ``folder`` holds; whether that was anything. Damaged folders count as empty."""
    if not (folder / _MANIFEST).is_file():
        return False
    try:
        found = _read(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        log.warning("the participant's state in %s cannot be used, it starts anew: %s", folder, error)
        return False
    for name, record in found.items():
        state[name] = record
    return True


def _write(folder: Path, state: RecordDict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    before = _manifest(folder)
    known = {} if len(before["files"]) >= MAX_FILES else before["arrays"]
    arrays: dict[str, dict[str, Any]] = {}
    new: dict[str, torch.Tensor] = {}
    number = before["number"] + 1
    for record, values in state.items():
        if isinstance(values, ArrayRecord):
            for name, array in values.items():
                label, digest = f"{record}/{name}", wires.digest({name: array}).hex()
                if known.get(label, {}).get("digest") == digest:
                    arrays[label] = known[label]
                    continue
                arrays[label] = {"digest": digest, "file": f"arrays-{number}.safetensors", "dtype": array.dtype}
                new[label] = torch.from_numpy(np.frombuffer(array.data, np.uint8).copy())
    if new:
        save_file(new, folder / f"arrays-{number}.safetensors")
        _sync(folder / f"arrays-{number}.safetensors")
    manifest = {
        "format": FORMAT,
        "number": number,
        "files": sorted({entry["file"] for entry in arrays.values()}),
        "arrays": arrays,
        "records": {name: records_to_json(r) for name, r in state.items() if not isinstance(r, ArrayRecord)},
        "names": [name for name, record in state.items() if isinstance(record, ArrayRecord)],
    }
    temporary = folder / f".{_MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest))
    _sync(temporary)
    os.replace(temporary, folder / _MANIFEST)
    for path in folder.glob("arrays-*.safetensors"):
        if path.name not in manifest["files"]:
            path.unlink(missing_ok=True)


def _read(folder: Path) -> RecordDict:
    manifest = json.loads((folder / _MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        raise Damaged(f"format is {manifest['format']}, allowed is {FORMAT}")
    files = {name: load_file(folder / name) for name in manifest["files"]}
    arrays: dict[str, dict[str, Array]] = {name: {} for name in manifest["names"]}
    for label, entry in manifest["arrays"].items():
        record, _, name = label.partition("/")
        data = files[entry["file"]][label].numpy().tobytes()
        shape = wires.shape_of(data, entry["dtype"])
        array = Array(entry["dtype"], shape, "numpy.ndarray", data)
        if wires.digest({name: array}).hex() != entry["digest"]:
            raise Damaged(f"{label} is not what was written")
        arrays[record][name] = array
    state = RecordDict({name: records_from_json(value) for name, value in manifest["records"].items()})
    for name, values in arrays.items():
        state[name] = wires.make_record(values)
    return state


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
        return found if found["format"] == FORMAT else {"number": 0, "files": [], "arrays": {}}
    except (OSError, ValueError, KeyError, TypeError):
        return {"number": 0, "files": [], "arrays": {}}


def records_to_json(record: ConfigRecord | MetricRecord) -> list[Any]:
    """A record without arrays as JSON: its kind and its values, bytes as base64."""
    kind = "metric" if isinstance(record, MetricRecord) else "config"
    return [kind, {key: _to_json(value) for key, value in record.items()}]


def records_from_json(value: list[Any]) -> ConfigRecord | MetricRecord:
    """Inverse of :func:`records_to_json`."""
    kind, values = value
    made = {key: _from_json(item) for key, item in values.items()}
    return MetricRecord(made) if kind == "metric" else ConfigRecord(made)


def _to_json(value: Any) -> Any:
    return {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _from_json(value: Any) -> Any:
    return base64.b64decode(value["bytes"]) if isinstance(value, dict) else value


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
