"""What stays on a participant's device between rounds, as records of its Flower context.

Tensors go into an ``ArrayRecord``, everything else into a JSON text of a ``ConfigRecord``, so that any engine can
carry the state and nothing is pickled. The experts a participant holds are in :class:`fluxlib.federation.client.held.Held`.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fluxlib.methods.base import ParticipantState
from fluxlib.profiling import Profile

PROFILE, PARTICIPANT = "profile", "participant"
"""Names of the records."""
STATE_RECORDS = (PROFILE, PARTICIPANT)


def save_state(state: RecordDict, value: ParticipantState) -> None:
    """Write ``value`` into a node's ``state``, in place of what was there."""
    more = {"profile_round": value.profile_round, "profile": ""}
    if value.profile is not None:
        arrays, rest = _split(value.profile)
        state[PROFILE] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        more["profile"] = rest
    elif PROFILE in state:
        del state[PROFILE]
    state[PARTICIPANT] = ConfigRecord(more)


def load_state(state: RecordDict) -> ParticipantState:
    """What :func:`save_state` wrote; an empty state for a node that wrote nothing yet."""
    if PARTICIPANT not in state:
        return ParticipantState()
    known = None
    if PROFILE in state:
        values: dict[str, Any] = {name: torch.from_numpy(array.numpy()) for name, array in state[PROFILE].items()}
        values |= {name: _tuples(value) for name, value in json.loads(state[PARTICIPANT]["profile"]).items()}
        known = Profile(**values)
    return ParticipantState(known, int(state[PARTICIPANT]["profile_round"]))


def _split(profile: Profile) -> tuple[dict[str, np.ndarray], str]:
    values = {item.name: getattr(profile, item.name) for item in fields(profile)}
    arrays = {name: value.cpu().numpy() for name, value in values.items() if isinstance(value, Tensor)}
    return arrays, json.dumps({name: value for name, value in values.items() if name not in arrays})


def _tuples(value: object) -> object:
    """JSON has lists only; profiles are compared by their tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
