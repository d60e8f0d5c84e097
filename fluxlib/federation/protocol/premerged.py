"""Experts that a participant will only merge, merged by the server from its profile (``merged_downlink: server``).

Before it trains, a participant is asked for its profile. The server plans with it on the current global model and sends
the experts to tune and to explore as ever, the plan, and each merged slot with several members that the participant
does not hold as they are now (:data:`~fluxlib.federation.protocol.sync.STALE`); where there is one such member, that is sent
instead. Slots of which it holds all members it makes by itself: they are the same, bit for bit, and in round 1 nothing
has to travel.

Slots carry their own weights in the downlink's type, not a difference from the base: a device would have to merge the
base's experts to use that, which is the work it is spared. Coded types so cost a slot some accuracy.

Paper: nothing of this; a participant there downloads all experts. Deviation: it has the current model no more, so the
profile for the next round is of what it holds: current where it tuned or explored, older elsewhere.

* :func:`importance`, :func:`profile_of`   what leaves a participant, and the profile that the server plans with
* :func:`alone_stale`                      experts that are sent instead of a slot
* :func:`merge_stale`                      the plan and the slots that have to travel
* :class:`Premerged`                       these, in a message
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fluxlib import profiling
from fluxlib.config import RunConfig
from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.protocol.wire import Form, WireError
from fluxlib.methods.base import ExpertKey, Merged
from fluxlib.moe import find
from fluxlib.moe.compact import LayerPlan, merge

if TYPE_CHECKING:
    from fluxlib.federation.protocol.messages import ProfileReport

_NEEDED = {"attention_frequency": ("attention",), "frequency": (), "uniform": (), "gate": ("gate",)}
"""What merge weights are made of, beside the frequency."""


@dataclass(frozen=True)
class Premerged:
    """One plan per MoE layer, and slots as ``"<layer>.<number of the slot>.<tensor>"``."""

    plans: tuple[LayerPlan, ...]
    arrays: ArrayRecord

    @property
    def num_slots(self) -> int:
        """Slots that travel, each as large as an expert."""
        return len({wires.parse_name(name)[0] for name in self.arrays})

    @property
    def num_bytes(self) -> int:
        """Bytes of their tensors."""
        return wires.record_bytes(self.arrays)

    def text(self) -> str:
        """The plans as JSON; the order of neurons is left out, since aligned slots always travel."""
        return json.dumps([[plan.tuned, plan.groups, plan.weights] for plan in self.plans])

    @classmethod
    def read(cls, text: str, arrays: ArrayRecord) -> Premerged:
        """Inverse of :meth:`text`."""
        plans = [
            LayerPlan(tuple(tuned), _rows(groups), None if weights is None else _rows(weights))
            for tuned, groups, weights in json.loads(text)
        ]
        return cls(tuple(plans), arrays)

    def decode(self, model: nn.Module, wire: Form, stale: frozenset[ExpertKey]) -> Merged:
        """The slots as tensors of ``model``'s type.

        Raises:
            WireError: a slot is missing that cannot be made from what is held (all but ``stale``).
        """
        slots: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.plans]
        found = find.layers(model)
        for name, array in self.arrays.items():
            (layer, slot), tensor = wires.parse_name(name)
            like = find.expert_tensors(found[layer].experts, 0)[tensor]
            slots[layer].setdefault(slot, {})[tensor] = wires.decode(array, wire, like.shape).to(like)
        for layer, plan in enumerate(self.plans):
            for slot in _stale_groups(layer, plan, stale):
                if slot not in slots[layer]:
                    raise WireError(
                        f"layer {layer}: merged slot {slot} did not come, and some of its experts are stale"
                    )
        return Merged(self.plans, tuple(slots))


def importance(known: profiling.Profile, config: RunConfig) -> dict[str, Tensor]:
    """What the run's merge weights need of a profile beside its frequency, ``[layers, experts]`` by name."""
    return {name: getattr(known, name) for name in _NEEDED[config.merging.weights]}


def profile_of(report: ProfileReport, model: nn.Module) -> profiling.Profile:
    """A profile that a plan can be made with.

    Raises:
        ValueError: importances of another shape than the frequencies, negative or not finite.
    """
    tables = {"attention": torch.zeros_like(report.frequency), **report.importance}
    for name, table in tables.items():
        if table.shape != report.frequency.shape or not torch.isfinite(table).all() or (table < 0).any():
            raise ValueError(f"{name} must be {tuple(report.frequency.shape)}, finite and not negative")
    return profiling.Profile(
        frequency=report.frequency,
        tokens=torch.zeros_like(report.frequency, dtype=torch.long),
        attention=tables["attention"],
        samples=torch.zeros(0, *report.frequency.shape, dtype=torch.bool),
        bits=16,
        num_tokens=0,
        fingerprint=profiling.fingerprint(model),
        gate=tables.get("gate", torch.empty(0)),
    )


def alone_stale(plans: Sequence[LayerPlan], stale: frozenset[ExpertKey]) -> frozenset[ExpertKey]:
    """Experts that are the only stale one of their group: sent as it is, each takes no more than the slot would.

    It is current afterwards, and not stale in the next round.
    """
    found = [
        [(layer, expert) for expert in group if (layer, expert) in stale]
        for layer, plan in enumerate(plans)
        for group in plan.groups
        if plan.permutations is None  # else the slot travels anyway
    ]
    return frozenset(keys[0] for keys in found if len(keys) == 1)


def merge_stale(store: ExpertStore, plans: Sequence[LayerPlan], stale: frozenset[ExpertKey]) -> Premerged:
    """The plans, and the slots that a participant cannot make from what it holds: all but ``stale``."""
    arrays = {
        wires.key_name((layer.index, slot), name): wires.encode(tensor, store.wire)
        for layer, plan in zip(find.layers(store.model), plans, strict=True)
        for slot in _stale_groups(layer.index, plan, stale)
        for name, tensor in merge(layer.experts, plan, slot).items()
    }
    return Premerged(tuple(plans), wires.make_record(arrays))


def _stale_groups(layer: int, plan: LayerPlan, stale: frozenset[ExpertKey]) -> list[int]:
    """Groups with a stale member, or whose members' neurons are matched: their order does not travel."""
    aligned = plan.permutations is not None
    return [
        slot
        for slot, group in enumerate(plan.groups)
        if any((layer, expert) in stale for expert in group) or (aligned and len(group) > 1)
    ]


def _rows(values: list[list]) -> tuple[tuple, ...]:
    return tuple(tuple(row) for row in values)
