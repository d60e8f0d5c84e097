"""What stays on a node from message to message: records in its Flower context, and the same in a file.

Tensors go into an ``ArrayRecord``, everything else into a JSON text, so that any engine can carry it.

A node whose configuration names a ``state-dir`` goes on after a restart: it loads from there what its context lacks
and writes there after every message. A file that is not as it was written is dropped: the participant then holds
nothing, says so, and gets every changed expert from the server.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.wire import WireError
from fluxlib.federation.store.tensor_file import read_tensors, write_tensors
from fluxlib.io import checked, reading
from fluxlib.merging.slots import Slots
from fluxlib.methods.base import ParticipantState
from fluxlib.profiling import Profile

log = logging.getLogger(__name__)

STATE_DIR = "state-dir"
"""Entry of a node's configuration that names the folder."""

STATE = "state.safetensors"
"""Its file with everything that the node's context holds."""

KEPT = ("uint8", "uint16", "int64", "float32")
"""Types of the arrays that are kept."""

STACK = "stack "
"""How the names of the tensors of merged slots begin."""

OTHERS = "others"
"""Name of the tensor that stands for all records without arrays: the bytes of a JSON text."""


def save_state(state: RecordDict, value: ParticipantState) -> None:
    """Write ``value`` into a node's ``state``, in place of what was there."""
    profile, slots = vars(value.profile) if value.profile else {}, value.slots
    state["profile"] = _record({name: found for name, found in profile.items() if isinstance(found, Tensor)})
    rest = json.dumps({name: found for name, found in profile.items() if not isinstance(found, Tensor)})
    made = slots.made if slots else 0
    state["participant"] = ConfigRecord({"profile_round": value.profile_round, "profile": rest, "slots_made": made})
    kept = {"place": slots.place, "weight": slots.weight, "total": slots.total} if slots else {}
    stacks = {STACK + name: stack.float() for name, stack in slots.stacks.items()} if slots else {}
    state["slots"] = _record(kept | stacks)


def _record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return wires.make_record({name: Array(tensor.cpu().contiguous().numpy()) for name, tensor in tensors.items()})


@reading("a participant's state", WireError)
def load_state(state: RecordDict) -> ParticipantState:
    """What :func:`save_state` wrote, WireError for anything else; an empty state for a node that wrote nothing yet."""
    if "participant" not in state:
        return ParticipantState()
    about: Any = state["participant"]
    values: dict[str, Any] = {name: wires.read_array(array, *KEPT) for name, array in state["profile"].items()}
    values |= {name: _tuples(value) for name, value in json.loads(about["profile"]).items()}
    number, slots = checked("profile_round", about["profile_round"], int), None
    if found := {name: wires.read_array(array, *KEPT) for name, array in state.get("slots", {}).items()}:
        stacks = {name.removeprefix(STACK): stack for name, stack in found.items() if name.startswith(STACK)}
        made = checked("slots_made", about["slots_made"], int)
        slots = Slots(made, found["place"], found["weight"], found["total"], stacks)
    return ParticipantState(Profile(**values) if values else None, number, slots)


def keep(path: Path, state: RecordDict) -> None:
    """Write ``state`` to ``path``, all of it or nothing; a full disk costs a warning, not the round."""
    try:
        write_tensors(path, to_tensors(state))
    except OSError as error:
        log.warning("cannot keep the participant's state: %s", error)


def restore(path: Path, state: RecordDict) -> bool:
    """Load into ``state`` what ``path`` holds; whether that was anything. What is damaged is removed."""
    if not path.is_file():
        return False
    try:
        state.update(from_tensors(read_tensors(path)[0]))
    except ValueError as error:
        log.warning("the participant's state cannot be used, it starts anew: %s", error)
        path.unlink()
        return False
    return True


def to_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Records as tensors for a file: arrays as ``"<record>/<key>"``, all else in :data:`OTHERS`."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, record in state.items():
        if isinstance(record, ArrayRecord):
            others[name] = "arrays"
            tensors |= {f"{name}/{key}": wires.read_array(array, *KEPT) for key, array in record.items()}
        else:
            others[name] = [isinstance(record, MetricRecord), dict(record)]
    text = json.dumps(others, default=lambda value: {"bytes": value.hex()})
    return tensors | {OTHERS: torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())}


@reading("a participant's state", WireError)
def from_tensors(tensors: Mapping[str, Tensor]) -> RecordDict:
    """Inverse of :func:`to_tensors`; WireError for anything else."""
    text = tensors[OTHERS].numpy().tobytes()
    others = json.loads(text, object_hook=lambda found: bytes.fromhex(found["bytes"]) if "bytes" in found else found)
    state = RecordDict()
    for name, value in others.items():
        if value == "arrays":
            keys = [key for key in tensors if key.startswith(f"{name}/")]
            state[name] = _record({key.removeprefix(f"{name}/"): tensors[key] for key in keys})
        else:
            state[name] = (MetricRecord if value[0] else ConfigRecord)(value[1])
    return state


def _tuples(value: object) -> object:
    """JSON has lists only; profiles are compared by their tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
