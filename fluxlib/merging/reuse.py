"""Merged slots that are still good from the round before.

After a round a participant receives the experts that changed, a fraction of all. A slot whose members are the same,
with equal shares, and none of them changed, would come out equal: :func:`reusable_slots` finds those, and
:func:`fluxlib.moe.compact.customize` copies them instead of reading their members again. The others are merged one
layer at a time: memory beside the customised model is one layer's slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fluxlib.moe import find
from fluxlib.moe.compact import CompactExperts, LayerPlan

KnownSlots = list[dict[int, dict[str, Tensor]]]
"""Per layer: the group's number in the new plan, and its merged tensors."""


def reusable_slots(
    before: Sequence[CompactExperts],
    plans: Sequence[LayerPlan],
    changed: Tensor,
    tolerance: float = 0.0,
) -> KnownSlots:
    """Slots of the last round's customised model that stand for slots of this round's plans.

    Args:
        before: the customised layers of the last round, see :func:`compact_layers`.
        plans: of this round.
        changed: bool ``[L, E]``, experts whose weights are not what they were.
        tolerance: shares of the members in their slot may differ by as much; 0: the result is bit-identical.

    Raises:
        ValueError: other numbers of layers, or a negative tolerance.
    """
    if not len(before) == len(plans) == len(changed):
        raise ValueError(
            f"before, plans and changed must have one entry per layer, got {len(before)}, {len(plans)}, {len(changed)}"
        )
    if tolerance < 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    return [
        _reusable(old, new, set(row.nonzero().flatten().tolist()), tolerance)
        for old, new, row in zip(before, plans, changed.cpu().bool(), strict=True)
    ]


def compact_layers(model: nn.Module) -> list[CompactExperts]:
    """The customised layers of a model; they outlive :func:`fluxlib.moe.compact.restore`."""
    return [layer.experts for layer in find.layers(model) if isinstance(layer.experts, CompactExperts)]


def _reusable(old: CompactExperts, new: LayerPlan, changed: set[int], tolerance: float) -> dict[int, dict[str, Tensor]]:
    slots = {group: slot for slot, group in enumerate(old.plan.groups)}
    found = {}
    for number, group in enumerate(new.groups):
        slot = slots.get(group)
        if slot is None or changed & set(group) or not _same_order(old.plan, slot, new, number):
            continue
        shares = torch.tensor(old.plan.shares(slot)) - torch.tensor(new.shares(number))
        if float(shares.abs().max()) <= tolerance:
            found[number] = {name: stack[slot] for name, stack in old.merged_stacks().items()}
    return found


def _same_order(old: LayerPlan, slot: int, new: LayerPlan, number: int) -> bool:
    """Whether the members' neurons are matched alike."""
    if old.permutations is None or new.permutations is None:
        return old.permutations is new.permutations
    pairs = zip(old.permutations[slot], new.permutations[number], strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
