"""What stands at the experts' place in a dry run: the planned slots on the meta device, with evenly spread tokens.

- :class:`Slots` -- what one layer's experts are replaced by,
- :class:`DryCompact` -- tuned and merged slots: the real layer, without a router's choice,
- :class:`DryUnpacked` -- experts that lie elsewhere or quantised, and are unpacked one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fluxlib.moe.compact import CompactExperts, LayerPlan
from fluxlib.moe.dispatch import Pairs, SlotExperts, dispatch
from fluxlib.moe.expert import Matrices, to_matrices

SCALE_BYTES = 2
"""Of a quantised block's scale."""
SCALE_BLOCK = 64
"""Values per scale."""


@dataclass(frozen=True)
class Slots:
    """What one layer's experts are replaced by.

    Attributes:
        num_tuned: slots with a weight, a gradient and an optimizer state.
        num_frozen: merged slots, read only.
        num_experts_in_frozen: experts that the merged slots stand for; the router may choose several of one slot.
        bits: 16 or more: weights are stored as they are; fewer: every slot is stored quantised and unpacked alone.
        offloaded: weights and states lie elsewhere, two working copies are here, gradients are sent away at once.
    """

    num_tuned: int
    num_frozen: int = 0
    num_experts_in_frozen: int = 0
    bits: int = 16
    offloaded: bool = False


def even_counts(slots: Slots, num_tokens: int, top_k: int) -> list[int]:
    """(token, slot) pairs of each slot, tuned ones first, when every expert is chosen equally often.

    A token's choices that fall on one merged slot are one pair there.
    """
    reachable = slots.num_tuned + slots.num_experts_in_frozen
    top_k = min(top_k, reachable)
    counts = [round(num_tokens * top_k / reachable)] * slots.num_tuned
    for group in _group_sizes(slots):
        missed = math.comb(reachable - group, top_k) / math.comb(reachable, top_k)
        counts.append(round(num_tokens * (1 - missed)))
    return counts


class DryCompact(CompactExperts):
    """The real customised layer on the meta device, with evenly spread tokens in the place of the router's choice."""

    def __init__(self, original: Any, slots: Slots, top_k: int, tuned_dtype: torch.dtype, method: str) -> None:
        experts = iter(range(original.down_proj.shape[0]))
        tuned = tuple(islice(experts, slots.num_tuned))
        groups = tuple(tuple(islice(experts, size)) for size in _group_sizes(slots))
        super().__init__(original, LayerPlan(tuned, groups, dropped=tuple(experts)), tuned_dtype)
        self.slots, self.top_k, self.method = slots, top_k, method

    def forward(self, hidden: Tensor, top_k_index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """``hidden [N, H]`` to ``[N, H]``; Llama-4 gives ``[E * N, H]``."""
        return self.compute(hidden, _pairs(self, hidden, weights))


class DryUnpacked(SlotExperts):
    """Experts that lie elsewhere, or quantised, and are unpacked one at a time, on the meta device."""

    def __init__(self, original: nn.Module, slots: Slots, top_k: int) -> None:
        super().__init__(original)
        self.slots, self.top_k = slots, top_k
        self.one = {name: getattr(original, name)[0].detach() for name in self.layout.names}
        self.collected: list[Tensor] = []
        self.on_gradient: Callable[[Tensor], None] = lambda gradient: None

    def packed_bytes(self) -> int:
        """Memory at rest, on the device."""
        if self.slots.offloaded:
            return 0
        values = sum(tensor.numel() for tensor in self.one.values())
        return int((self.slots.num_tuned + self.slots.num_frozen) * values * packed_bytes_per_value(self.slots.bits))

    def forward(self, hidden: Tensor, top_k_index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """``hidden [N, H]`` to ``[N, H]``; Llama-4 gives ``[E * N, H]``."""
        return dispatch(hidden, _pairs(self, hidden, weights), self)

    def matrices(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Matrices:
        """One expert fetched or unpacked: a copy of its own."""
        return to_matrices({name: torch.empty_like(t) for name, t in self.one.items()}, self.layout, dtype)

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        """Keep a tuned slot's gradients, unless they are sent away at once."""
        if not self.slots.offloaded and slot < self.slots.num_tuned:
            self.collected.extend(gradients.values())
            for gradient in gradients.values():
                self.on_gradient(gradient)


def packed_bytes_per_value(bits: int) -> float:
    """Bytes per value of a quantised expert at rest, its scales included; 2 for 16 bits."""
    return bits / 8 + (SCALE_BYTES / SCALE_BLOCK if bits < 16 else 0)


def _group_sizes(slots: Slots) -> list[int]:
    if not slots.num_frozen:
        return []
    size, more = divmod(slots.num_experts_in_frozen, slots.num_frozen)
    return [size + (i < more) for i in range(slots.num_frozen)]


def _pairs(experts: Any, hidden: Tensor, weights: Tensor | None) -> Pairs:
    """What :func:`fluxlib.moe.dispatch.sort_pairs` would return."""
    num_tokens = hidden.shape[0] // experts.num_experts if experts.layout.is_dense else hidden.shape[0]
    counts = even_counts(experts.slots, num_tokens, experts.top_k)
    weight = hidden.new_empty(sum(counts), dtype=torch.float32)
    if weights is not None:
        weight = weight + weights.float().sum()
    return Pairs(hidden.new_empty(sum(counts), dtype=torch.long), weight, counts)
