"""Experts at rest in 2, 3, 4 or 8 bits, for profiling (section 4) and for the FMQ baseline.

- :class:`QuantizedExperts` -- an experts module that dequantizes one expert at a time,
- :func:`quantize` -- a whole model, in place, :func:`quantized` -- as a context.

How values are coded is in :mod:`fluxlib.moe.packing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from . import find
from .dispatch import SlotExperts
from .expert import Matrices, to_matrices
from .packing import BITS, Packed, check_code, dequantize, levels, quantize_tensor

__all__ = ["BITS", "Packed", "QuantizedExperts", "dequantize", "levels", "quantize", "quantize_tensor", "quantized"]


class QuantizedExperts(SlotExperts):
    """Experts at rest in few bits; the one that is computed is dequantized alone, forward and backward.

    No weight gets a gradient unless :attr:`collects_gradients` is set: then :meth:`grads` holds those of the
    dequantized weights (straight-through, for FMQ), per expert that saw tokens.
    """

    def __init__(self, original: nn.Module, packed: Mapping[str, Packed]) -> None:
        super().__init__(original)
        self.packed = cast("dict[str, Packed]", nn.ModuleDict(packed))
        self.collects_gradients = False
        self._gradients: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def from_experts(cls, experts: nn.Module, bits: int = 4, block: int = 64) -> QuantizedExperts:
        """Quantize an experts module of any handled layout; biases take 8 bits."""
        names = find.read_layout(experts).names
        return cls(experts, {n: quantize_tensor(getattr(experts, n), _bits(n, bits), block) for n in names})

    @property
    def num_bytes(self) -> int:
        """Memory at rest."""
        return sum(packed.num_bytes for packed in self.packed.values())

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """One expert dequantized; a copy."""
        find.check_expert(expert, self.num_experts)
        return {name: dequantize(packed, expert) for name, packed in self.packed.items()}

    @torch.no_grad()
    def requantize(self, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Quantize one expert anew from full-precision tensors."""
        for name, tensor in tensors.items():
            self.packed[name].write(expert, tensor)

    def grads(self, expert: int) -> dict[str, Tensor]:
        """Gradients collected for an expert, zeros where it saw no token."""
        if expert in self._gradients:
            return self._gradients[expert]
        return {name: torch.zeros_like(tensor) for name, tensor in self.expert_tensors(expert).items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients collected."""
        self._gradients.clear()

    def learning(self) -> list[Tensor]:
        """See :class:`~fluxlib.moe.dispatch.Slots`."""
        return super().learning() if self.collects_gradients else []

    def matrices(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Matrices:
        """See :class:`~fluxlib.moe.dispatch.Slots`."""
        return to_matrices({n: dequantize(p, slot, dtype) for n, p in self.packed.items()}, self.layout, dtype)

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        """See :class:`~fluxlib.moe.dispatch.Slots`."""
        held = self._gradients.setdefault(slot, {})
        for name, gradient in gradients.items():
            held[name] = held[name] + gradient if name in held else gradient


def quantize(model: nn.Module, bits: int = 4, block: int = 64) -> nn.Module:
    """Put a :class:`QuantizedExperts` at every MoE layer, in place; :func:`fluxlib.moe.compact.restore` undoes it.

    Raises:
        ValueError: The experts were replaced before, or the number of bits is none of 2, 3, 4, 8.
    """
    check_code(bits, block)
    found = find.check_original(model)
    with find.replacing(model, found):
        for layer in found:
            find.replace(model, layer, QuantizedExperts.from_experts(layer.experts, bits, block))
    return model


@contextmanager
def quantized(model: nn.Module, bits: int = 4, block: int = 64) -> Iterator[nn.Module]:
    """:func:`quantize` for the duration of a ``with`` block."""
    quantize(model, bits, block)
    try:
        yield model
    finally:
        find.restore(model, write=False)


def _bits(name: str, bits: int) -> int:
    return 8 if name.endswith("_bias") else bits
