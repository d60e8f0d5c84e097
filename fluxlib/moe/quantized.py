"""Experts at rest in 2, 3, 4 or 8 bits (:mod:`fluxlib.moe.packing`), for profiling (section 4) and for FMQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .dispatch import SlotExperts
from .find import MoELayer, check_expert
from .packing import Packed, quantize_tensor
from .product import wide_dtype
from .replace import replace_all


class QuantizedExperts(SlotExperts):
    """Experts at rest in few bits; the one that is computed is dequantized alone, small ones a few at a time.

    No weight gets a gradient unless :attr:`collects_gradients` is set: then :meth:`grads` holds those of the
    dequantized weights (straight-through, for FMQ), per expert that saw tokens. Biases take 8 bits. With an adapter the
    experts stay as they are, and B's learn (QLoRA, Dettmers et al. 2023).
    """

    def __init__(self, original: nn.Module, bits: int = 4, adapter: Adapter | None = None, layer: int = 0) -> None:
        super().__init__(original, adapter, layer)
        widths = {name: 8 if name.endswith("_bias") else bits for name in self.layout.names}
        packed = {name: quantize_tensor(getattr(original, name), widths[name]) for name in widths}
        self.packed = cast("dict[str, Packed]", nn.ModuleDict(packed))
        self.collects_gradients = False
        self._ahead: dict[int, dict[str, Tensor]] = {}
        self._gradients: dict[int, dict[str, Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Memory at rest."""
        return sum(packed.num_bytes for packed in self.packed.values())

    @property
    def at_once(self) -> int:
        """Experts that are best read and written together; one where they are large."""
        return min(packed.at_once for packed in self.packed.values())

    def at_rest(self, experts: int | Sequence[int]) -> dict[str, Tensor]:
        """One expert dequantized, or the stacks of several; copies, in at least float32."""
        for expert in [experts] if isinstance(experts, int) else experts:
            check_expert(expert, self.num_experts)
        return {name: packed.read(experts, wide_dtype(packed.dtype)) for name, packed in self.packed.items()}

    def requantize(self, experts: int | Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Quantize one expert anew from full-precision tensors, or several from stacks."""
        self._ahead.clear()
        for name, tensor in tensors.items():
            self.packed[name].write(experts, tensor)

    def grads(self, expert: int) -> dict[str, Tensor]:
        """Gradients collected for an expert, zeros where it saw no token."""
        if expert in self._gradients:
            return self._gradients[expert]
        return {n: torch.zeros(p.shape, dtype=p.dtype, device=p.codes.device) for n, p in self.packed.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients collected."""
        self._gradients.clear()

    def learning(self) -> list[Tensor]:
        """See :class:`~fluxlib.moe.dispatch.Slots`."""
        return super().learning() if self.collects_gradients else []

    def fetch(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of one expert, dequantized, with those that come next where they are small."""
        if slot not in self._ahead:
            some = [slot, *upcoming[: self.at_once - 1]]
            stacks = {name: packed.read(some, dtype) for name, packed in self.packed.items()}
            self._ahead = {e: {n: stack[place] for n, stack in stacks.items()} for place, e in enumerate(some)}
        return self._ahead.pop(slot)

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        """See :class:`~fluxlib.moe.dispatch.Slots`."""
        held = self._gradients.setdefault(slot, {})
        for name, gradient in gradients.items():
            held[name] = held[name] + gradient if name in held else gradient


def quantize(
    model: nn.Module, bits: int = 4, adapter: Adapter | None = None, num_layers: int | None = None
) -> nn.Module:
    """Put a :class:`QuantizedExperts` at every MoE layer, in place; :func:`fluxlib.moe.compact.restore` undoes it.

    Args:
        num_layers: only at the first so many.
        adapter: Its B's learn; None: nothing learns that is not asked for its gradients.

    Raises:
        ValueError: Experts were replaced before, or ``bits`` is none of 2, 3, 4, 8.
    """

    def make(layer: MoELayer) -> QuantizedExperts | None:
        if num_layers is not None and layer.index >= num_layers:
            return None
        return QuantizedExperts(layer.experts, bits, adapter, layer.index)

    replace_all(model, make)
    return model
