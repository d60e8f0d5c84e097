"""Error feedback: what rounding took from a change on its way up is added to the next change of the same expert.

The residual stays with the sender, as a record of its state, so it lasts across rounds, checkpoints and engines. An
expert that is not tuned in a round keeps its residual for the next time that it is. A change that is lost or refused is
lost with the residual that was added to it, as any change is.

Only ``int8`` uses it. ``bfloat16`` rounds a change by at most 1/256 of itself, element by element, which costs nothing
that could be measured; on the downlink what travels is the whole difference from the base, whose error does not add up.
"""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.sync import Experts
from fluxlib.federation.protocol.wire import Form
from fluxlib.methods.base import ExpertKey

RESIDUAL = "residual"
"""Name of the record in a participant's state."""


def is_used(wire: Form) -> bool:
    """Whether changes that travel as ``wire`` carry what earlier ones lost."""
    return wire == "int8"


@torch.no_grad()
def add_residual(changes: Experts, state: RecordDict) -> dict[ExpertKey, dict[str, Tensor]]:
    """``changes`` with the residuals of their experts added."""
    residual = state.get(RESIDUAL, {})
    return {
        key: {
            name: tensor + wires.decode(residual[label]) if (label := wires.key_name(key, name)) in residual else tensor
            for name, tensor in tensors.items()
        }
        for key, tensors in changes.items()
    }


@torch.no_grad()
def keep_residual(changes: Experts, sent: ArrayRecord, wire: Form, state: RecordDict) -> None:
    """Write into ``state`` what ``sent`` lacks of ``changes``; residuals of other experts stay."""
    kept = dict(state.get(RESIDUAL, {}))
    for key, tensors in changes.items():
        for name, tensor in tensors.items():
            label = wires.key_name(key, name)
            kept[label] = wires.encode(tensor.cpu().float() - wires.decode(sent[label], wire, tensor.shape))
    state[RESIDUAL] = wires.make_record(kept)
