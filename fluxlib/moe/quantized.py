"""Experts at rest in 2, 3, 4 or 8 bits, for profiling (section 4) and for the FMQ baseline.

Values are coded in blocks of one expert's matrix: a code per value, a scale per block. 8 bits are evenly spaced
between minus and plus the block's largest value; 2, 3 and 4 bits use the levels that are best for normally distributed
values (Lloyd and Max), with a scale fitted to the block. Blocks never straddle experts.

- :class:`Packed` -- one quantized stack, :func:`quantize_tensor` and :func:`dequantize`,
- :class:`QuantizedExperts` -- an experts module that dequantizes one expert at a time,
- :func:`quantize` -- a whole model, in place or as a context.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import layers
from .kernels import Activation, Matrices, dense_choices, slot_pass, sort_pairs, to_matrices
from .layers import ReplacedExperts

BITS = (2, 3, 4, 8)


@dataclass
class Packed:
    """A quantized stack ``[E, ...]``, packed per expert.

    Attributes:
        codes: ``[E, bytes]`` uint8; 8 codes of b bits fill b bytes.
        scales: ``[E, blocks]`` float16, relative to the expert's ``unit``.
        unit: ``[E]`` float32.
        shape: Shape of one expert's tensor.
        bits: 2, 3, 4 or 8.
        block: Values per scale.
        dtype: Type it was, and is dequantized to.
    """

    codes: Tensor
    scales: Tensor
    unit: Tensor
    shape: tuple[int, ...]
    bits: int
    block: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Memory at rest."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.unit))


@functools.cache
def levels(bits: int) -> tuple[float, ...]:
    """Levels of a code, ascending: Lloyd-Max for a standard normal variable (2, 3, 4 bits), even for 8 bits."""
    if bits == 8:
        return tuple((i - 127) / 127 for i in range(255)) + (1.0,)
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {BITS}, got {bits}")
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    probabilities = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    values = normal.icdf(probabilities)
    for _ in range(500):
        middle = (values[1:] + values[:-1]) / 2
        edges = torch.cat([middle.new_tensor([-math.inf]), middle, middle.new_tensor([math.inf])])
        density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        values = -(density[1:] - density[:-1]) / (normal.cdf(edges[1:]) - normal.cdf(edges[:-1]))
    return tuple(values.tolist())


def quantize_tensor(stack: Tensor, bits: int, block: int = 64) -> Packed:
    """Quantize a stack ``[E, ...]``, each expert by itself.

    Args:
        stack: Floating point; an expert's values are taken in row-major order, the last block may be short.
        bits: 2, 3, 4 or 8.
        block: Values per scale, a multiple of 8.

    Raises:
        ValueError: Another number of bits or block size.
    """
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {BITS}, got {bits}")
    if block < 8 or block % 8:
        raise ValueError(f"block: expected a positive multiple of 8, got {block}")
    with torch.no_grad():
        coded = [_quantize_one(expert, bits, block) for expert in stack.detach()]
    codes, scales, unit = (torch.stack(part) for part in zip(*coded, strict=True))
    return Packed(codes, scales, unit, tuple(stack.shape[1:]), bits, block, stack.dtype)


def dequantize(packed: Packed, expert: int, dtype: torch.dtype | None = None) -> Tensor:
    """One expert's tensor, in the type it had or in ``dtype``."""
    table = torch.tensor(levels(packed.bits), device=packed.codes.device, dtype=torch.float32)
    scales = packed.scales[expert].float() * packed.unit[expert]
    values = table[_unpack(packed.codes[expert], packed.bits)].view(-1, packed.block) * scales[:, None]
    size = math.prod(packed.shape)
    return values.flatten()[:size].view(packed.shape).to(dtype or packed.dtype)


class QuantizedExperts(ReplacedExperts):
    """Experts at rest in few bits; the one that is computed is dequantized alone, forward and backward.

    No weight gets a gradient unless :attr:`collects_gradients` is set: then :meth:`grads` holds those of the
    dequantized weights (straight-through, for FMQ), per expert that saw tokens.
    """

    def __init__(self, original: nn.Module, packed: Mapping[str, Packed]) -> None:
        super().__init__(original)
        self.packed = dict(packed)
        self.activation = Activation(original)
        self.collects_gradients = False
        self._gradients: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def from_experts(cls, experts: nn.Module, bits: int = 4, block: int = 64) -> QuantizedExperts:
        """Quantize an experts module of any handled layout; biases stay as they are in 8 bits or more."""
        names = layers.read_layout(experts).names
        return cls(experts, {n: quantize_tensor(getattr(experts, n), _bits(n, bits), block) for n in names})

    @property
    def num_bytes(self) -> int:
        """Memory at rest."""
        return sum(packed.num_bytes for packed in self.packed.values())

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """One expert dequantized; a copy."""
        layers._check_expert(expert, self.num_experts)
        return {name: dequantize(packed, expert) for name, packed in self.packed.items()}

    @torch.no_grad()
    def requantize(self, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Quantize one expert anew from full-precision tensors."""
        for name, tensor in tensors.items():
            packed = self.packed[name]
            codes, scales, unit = _quantize_one(tensor, packed.bits, packed.block)
            packed.codes[expert], packed.scales[expert], packed.unit[expert] = codes, scales, unit

    def grads(self, expert: int) -> dict[str, Tensor]:
        """Gradients collected for an expert, zeros where it saw no token."""
        if expert in self._gradients:
            return self._gradients[expert]
        return {name: torch.zeros_like(tensor) for name, tensor in self.expert_tensors(expert).items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients collected."""
        self._gradients.clear()

    def matrices(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Matrices:
        """See :class:`fluxlib.moe.kernels.Source`."""
        return to_matrices({n: dequantize(p, slot, dtype) for n, p in self.packed.items()}, self.layout, dtype)

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        """See :class:`fluxlib.moe.kernels.Source`."""
        held = self._gradients.setdefault(slot, {})
        for name, gradient in gradients.items():
            held[name] = held[name] + gradient if name in held else gradient

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """``hidden_states [N, H]``, ``top_k_index [N, k]``, ``top_k_weights [N, k]`` -> ``[N, H]``."""
        if self.layout.is_dense:
            index, weights = dense_choices(hidden_states, self.num_experts)
        else:
            index, weights = top_k_index, top_k_weights
        pairs = sort_pairs(index, weights, self.num_experts, joins=False)
        anchor = None
        if self.collects_gradients and torch.is_grad_enabled():
            anchor = torch.zeros(0, device=hidden_states.device, requires_grad=True)
        return slot_pass(hidden_states, *pairs, self, self.activation, anchor=anchor)


def quantize(model: nn.Module, bits: int = 4, block: int = 64) -> nn.Module:
    """Put a :class:`QuantizedExperts` at every MoE layer, in place; :func:`fluxlib.moe.compact.restore` undoes it.

    Raises:
        ValueError: The experts were replaced before, or the number of bits is none of 2, 3, 4, 8.
    """
    found = layers.find(model)
    for layer in found:
        if isinstance(layer.experts, ReplacedExperts):
            raise ValueError(f"model: experts of {layer.name} were replaced before; call restore(model) first")
    layers.freeze(model)
    for layer in found:
        layers.replace(model, layer, QuantizedExperts.from_experts(layer.experts, bits, block))
    return model


@contextmanager
def quantized(model: nn.Module, bits: int = 4, block: int = 64) -> Iterator[nn.Module]:
    """:func:`quantize` for the duration of a ``with`` block."""
    quantize(model, bits, block)
    try:
        yield model
    finally:
        layers.restore(model, write=False)


def _bits(name: str, bits: int) -> int:
    return 8 if name.endswith("_bias") else bits


def _quantize_one(tensor: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[bytes]``, scales ``[blocks]`` and unit of one expert's tensor."""
    values = tensor.detach().float().flatten()
    values = torch.nn.functional.pad(values, (0, -values.numel() % block)).view(-1, block)
    table = torch.tensor(levels(bits), device=values.device)
    edges = (table[1:] + table[:-1]) / 2
    if bits == 8:
        scale = values.abs().amax(1)
        codes = (values * (127 / scale.clamp(min=1e-30))[:, None]).round_().add_(127).to(torch.long)
    else:
        scale = values.square().mean(1).sqrt()
        for _ in range(2):
            codes = torch.bucketize(values / scale.clamp(min=1e-30)[:, None], edges)
            level = table[codes]
            scale = ((values * level).sum(1) / level.square().sum(1)).clamp(min=0)
        codes = torch.bucketize(values / scale.clamp(min=1e-30)[:, None], edges)
    unit = scale.amax().clamp(min=1e-30)
    return _pack(codes.flatten(), bits), (scale / unit).to(torch.float16), unit


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[n]``, n a multiple of 8, into ``[n * bits / 8]`` bytes: 8 codes fill ``bits`` bytes."""
    if bits == 8:
        return codes.to(torch.uint8)
    shifts = torch.arange(8, device=codes.device) * bits
    words = (codes.view(-1, 8).long() << shifts).sum(1)
    return torch.stack([(words >> (8 * i)) & 255 for i in range(bits)], dim=1).flatten().to(torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`_pack`; int32 codes."""
    if bits == 8:
        return packed.int()
    parts = packed.view(-1, bits).int()
    words = sum(parts[:, i] << (8 * i) for i in range(bits))
    shifts = torch.arange(8, device=packed.device, dtype=torch.int32) * bits
    return ((words[:, None] >> shifts) & (2**bits - 1)).flatten()
