"""Experts that bring their weights one at a time, under low-rank adapters: weights stay as they are, B's learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, add_product
from .dispatch import Product, Run, SlotExperts, StackedSlots
from .expert import Matrices, to_matrices
from .find import expert_tensors, write_expert


class AdaptedExperts(SlotExperts):
    """Goes before a kind of :class:`~fluxlib.moe.dispatch.SlotExperts` in a class's bases.

    Args:
        place: What that kind takes.
        adapter: The adapters.
        layer: Number of the layer, by which ``adapter`` knows its experts.

    Attributes:
        lora: B ``[E, out, rank]`` by stack name, where the layer computes.
        fixed: A ``[E, rank, in]``, likewise.
    """

    def __init__(self, *place: Any, adapter: Adapter, layer: int) -> None:
        super().__init__(*place)
        self.adapter, self.layer = adapter, layer
        start = adapter.start(expert_tensors(self.original, 0), self.layout)
        self.lora = nn.ParameterDict({n: up.repeat(self.num_experts, 1, 1).to(self.device) for n, up in start.items()})
        fixed = adapter.fixed_stacks(layer, self.original, range(self.num_experts))
        self.fixed = {name: stack.to(self.device) for name, stack in fixed.items()}
        self._adapters = StackedSlots(self.layout, self.activation, {}, "slots", self.fixed, dict(self.lora))

    def expert_tensors(self, expert: Any) -> dict[str, Tensor]:
        """Tensors of an expert with what was learned on top, where its weights are."""
        learned = {name: up.detach()[expert] for name, up in self.lora.items()}
        return self.adapter.added((self.layer, expert), super().expert_tensors(expert), learned, self.layout)

    def write_back(self) -> None:
        """Write the experts, with what was learned, into the original."""
        for expert in range(self.num_experts):
            write_expert(self.original, expert, self.expert_tensors(expert))

    def learning(self) -> list[Tensor]:
        """The B's."""
        return self._adapters.learning()

    def matrices(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Matrices:
        """See :class:`~fluxlib.moe.dispatch.Slots`."""
        tensors = dict(self.fetch(slot, upcoming, dtype))
        for name, up in self.lora.items():
            tensors[name] = add_product(tensors[name], up.detach()[slot], self.fixed[name][slot], self.layout)
        return to_matrices(tensors, self.layout, dtype)

    def add_products(self, run: Run, up: Product, down: Product) -> None:
        """As gradients of the B's."""
        self._adapters.add_products(run, up, down)

    def end_gradients(self, counts: Sequence[int]) -> list[Tensor | None]:
        """Those of the B's."""
        return self._adapters.end_gradients(counts)
