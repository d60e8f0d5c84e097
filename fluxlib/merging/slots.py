"""Merged slots that a participant keeps from round to round (beyond the paper).

Merging reads every expert that is merged. But roles change more often than what a slot is made of, so a slot can stay:
an expert that is tuned leaves its place in a slot empty, and comes back to it. One that was tuned when the slots were
made has no place yet. It joins the nearest slot of its layer, by its weight: it is on the device, so hardly anything is
read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluxlib.config import MergingConfig
from fluxlib.merging.plan import merge_weights, plan
from fluxlib.moe import find
from fluxlib.moe.compact import LayerPlan, merge
from fluxlib.profiling import Profile

NOWHERE = -1
"""Slot of an expert that has none."""


@dataclass(frozen=True)
class Slots:
    """L layers, E experts a layer, M slots over all layers, those of a layer side by side.

    Attributes:
        made: the round in which they were merged.
        place: ``[L, E]`` long, the slot of each expert, or :data:`NOWHERE`.
        weight: ``[L, E]`` of each expert in its slot's mean.
        total: ``[M]`` summed weights of what a slot was made of.
        stacks: ``[M, ...]`` by the names of the experts' tensors, on the CPU.
    """

    made: int
    place: Tensor
    weight: Tensor
    total: Tensor
    stacks: Mapping[str, Tensor]


@torch.no_grad()
def merge_slots(
    model: nn.Module, profile: Profile, tuned: Tensor, num_merged: int, rules: MergingConfig, seed: int, number: int
) -> Slots:
    """All experts that are not ``tuned`` (``[L, E]`` bool) in ``num_merged`` slots, as :func:`plan` says."""
    plans = plan(model, profile, tuned, num_merged, rules, seed)
    place = torch.full(tuned.shape, NOWHERE)
    totals: list[float] = []
    made: list[dict[str, Tensor]] = []
    for row, layer, one in zip(place, find.layers(model), plans, strict=True):
        for group, members in enumerate(one.groups):
            row[list(members)] = len(made)
            totals.append(sum(one.weights[group]) if one.weights else float(len(members)))
            made.append({name: tensor.cpu() for name, tensor in merge(layer.experts, one, group).items()})
    stacks = {name: torch.stack([tensors[name] for tensors in made]) for name in (made[0] if made else ())}
    return Slots(number, place, merge_weights(profile, rules.weights).cpu(), torch.tensor(totals), stacks)


def lack_a_place(slots: Slots, tuned: Tensor) -> Tensor:
    """``[L, E]`` bool: experts that are not tuned and in no slot."""
    return ~tuned.cpu() & (slots.place == NOWHERE)


def can_stay(slots: Slots, tuned: Tensor) -> bool:
    """Whether every expert that lacks a place can have one: its layer has a slot."""
    has_slot = (slots.place != NOWHERE).any(dim=1, keepdim=True)
    return not bool((lack_a_place(slots, tuned) & ~has_slot).any())


@torch.no_grad()
def join(slots: Slots, model: nn.Module, joining: Tensor) -> Slots:
    """The slots with the ``joining`` experts (``[L, E]`` bool) in them, each in the nearest one of its layer."""
    place, total = slots.place.clone(), slots.total.clone()
    stacks = {name: stack.clone() for name, stack in slots.stacks.items()}
    layers = find.layers(model)
    for layer, expert in joining.nonzero().tolist():
        own = {name: tensor.cpu() for name, tensor in find.expert_tensors(layers[layer].experts, expert).items()}
        near = place[layer][place[layer] != NOWHERE].unique()
        squares = [(stacks[n][near].float() - own[n].float()).square().flatten(1).sum(1) for n in own]
        slot = int(near[torch.stack(squares).sum(0).argmin()])
        weight = slots.weight[layer, expert]
        share = weight / (total[slot] + weight) if weight > 0 else 0.0
        for name, tensor in own.items():
            stacks[name][slot] = torch.lerp(stacks[name][slot].float(), tensor.float(), share).to(tensor.dtype)
        place[layer, expert], total[slot] = slot, total[slot] + weight
    return Slots(slots.made, place, slots.weight, total, stacks)


def plans_of(slots: Slots, tuned: Tensor, alone: Tensor) -> tuple[list[LayerPlan], list[dict[str, Tensor]]]:
    """What becomes of every expert in a round, and the slots that it takes.

    Args:
        tuned, alone: ``[L, E]`` bool, experts that are tuned, and that are frozen in slots of their own.

    Returns:
        One plan per layer, and the stacks of its last groups, which need no merging.
    """
    plans, stacks = [], []
    for place, weight, of_tuned, of_alone in zip(slots.place, slots.weight, tuned.cpu(), alone.cpu(), strict=True):
        taken = place.masked_fill(of_tuned | of_alone, NOWHERE)
        used = taken[taken != NOWHERE].unique().tolist()
        groups = [tuple((taken == slot).nonzero().flatten().tolist()) for slot in used]
        singles = [(expert,) for expert in of_alone.nonzero().flatten().tolist()]
        weights = [tuple(weight[list(group)].tolist()) for group in (*singles, *groups)]
        plans.append(LayerPlan(tuple(of_tuned.nonzero().flatten().tolist()), (*singles, *groups), tuple(weights)))
        stacks.append({name: stack[used] for name, stack in slots.stacks.items()})
    return plans, stacks
