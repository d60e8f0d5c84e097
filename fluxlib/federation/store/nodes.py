"""Participants' states of the in-process grid, to and from tensors: what a checkpoint keeps of them.

The experts a participant holds are left out (see :mod:`fluxlib.federation.store.checkpoint`). All its other records are
kept as they are, arrays as tensors and everything else as the bytes of a JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fluxlib.federation.client.disk import records_from_json, records_to_json
from fluxlib.federation.client.held import Held
from fluxlib.federation.engines.local_grid import LocalGrid
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.protocol.wire import key_name, make_record

EXPERTS = "experts"
_RECORDS = "records"


def collect(grid: LocalGrid, nodes: Iterable[int]) -> dict[str, Tensor]:
    """The states of ``nodes`` as tensors, named ``"<node>/<record>/<key>"``, without their experts."""
    tensors: dict[str, Tensor] = {}
    for node in nodes:
        plain: dict[str, Any] = {}
        for name, record in grid.context(node).state.items():
            if name == EXPERTS:
                continue
            if isinstance(record, ArrayRecord):
                for key, array in record.items():
                    tensors[f"{node}/{name}/{key}"] = torch.from_numpy(array.numpy())
            else:
                plain[name] = records_to_json(record)
        text = json.dumps(plain).encode()
        tensors[f"{node}/{_RECORDS}"] = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
    return tensors


def restore(tensors: Mapping[str, Tensor], nodes: Iterable[str], grid: LocalGrid, store: ExpertStore) -> None:
    """Inverse of :func:`collect` for ``nodes``; their experts come from ``store``."""
    wanted = set(nodes)
    states: dict[str, RecordDict] = {node: RecordDict() for node in wanted}
    for name, tensor in tensors.items():
        node, _, rest = name.partition("/")
        if node not in wanted:
            continue
        state = states[node]
        if rest == _RECORDS:
            for record, value in json.loads(tensor.numpy().tobytes()).items():
                state[record] = records_from_json(value)
        else:
            record, _, key = rest.partition("/")
            state.setdefault(record, ArrayRecord())[key] = Array(tensor.numpy())
    for node, state in states.items():
        if "held" in state:
            held = Held(int(state["held"]["version"]), str(state["held"]["digest"]), _experts(state, store))
            held.save(state)
        grid.context(int(node)).state = state


def _experts(state: RecordDict, store: ExpertStore) -> ArrayRecord:
    """Experts that had changed by the held version and not since; the others come with the next delta."""
    version, flat = int(state["held"]["version"]), state["held"]["approximate"]
    approximate = set(zip(flat[::2], flat[1::2], strict=True))
    keys = [key for key in store.changed() if store.changed_at[key] <= version]
    arrays = {key: store.approximation(key) if key in approximate else store.arrays(key) for key in keys}
    return make_record({key_name(key, name): array for key in keys for name, array in arrays[key].items()})
