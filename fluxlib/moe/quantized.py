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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import layers
from .kernels import Activation, Matrices, dense_choices, sort_pairs, to_matrices
from .layers import ReplacedExperts
from .passes import slot_pass

BITS = (2, 3, 4, 8)
# Codes that are looked up together: one byte of 2 or 4-bit codes, half of the 3 bytes of 3-bit codes.
WORD_CODES = {2: 4, 3: 4, 4: 2}
CACHE_VALUES = 1 << 17


class Packed(nn.Module):
    """A quantized stack ``[E, ...]``; a block never straddles two experts.

    Memory at rest per expert of n values: ``n * bits / 8`` bytes of codes, 2 bytes of scale per block, 4 bytes more.
    Buffers are integers throughout, so that moving the model to another floating-point type leaves them alone.

    Args:
        stack: Floating point; an expert's values are taken in row-major order, its last block may be short.
        bits: 2, 3, 4 or 8.
        block: Values per scale, a multiple of 8.

    Raises:
        ValueError: Another number of bits or block size.
    """

    codes: Tensor
    scale_bits: Tensor
    unit_bits: Tensor

    def __init__(self, stack: Tensor, bits: int, block: int = 64) -> None:
        super().__init__()
        if bits not in BITS:
            raise ValueError(f"bits: expected one of {BITS}, got {bits}")
        if block < 8 or block % 8:
            raise ValueError(f"block: expected a positive multiple of 8, got {block}")
        self.bits, self.block, self.dtype, self.shape = bits, block, stack.dtype, tuple(stack.shape[1:])
        blocks = -(-math.prod(self.shape) // block)
        place = {"device": stack.device}
        self.register_buffer("codes", torch.empty(len(stack), blocks * block * bits // 8, dtype=torch.uint8, **place))
        self.register_buffer("scale_bits", torch.empty(len(stack), blocks, dtype=torch.int16, **place))
        self.register_buffer("unit_bits", torch.empty(len(stack), dtype=torch.int32, **place))
        for expert, tensor in enumerate(stack.detach()):
            self.write(expert, tensor)

    @property
    def unit(self) -> Tensor:
        """Largest scale of each expert, ``[E]`` float32; not finite where a value was not."""
        return self.unit_bits.view(torch.float32)

    @property
    def scales(self) -> Tensor:
        """Scales ``[E, blocks]`` float16, relative to the expert's unit."""
        return self.scale_bits.view(torch.float16)

    @property
    def num_bytes(self) -> int:
        """Memory at rest."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @torch.no_grad()
    def write(self, expert: int, tensor: Tensor) -> None:
        """Quantize one expert's tensor into its place."""
        values = tensor.detach().to(device=self.codes.device, dtype=torch.float32).flatten()
        values = F.pad(values, (0, -values.numel() % self.block)).view(-1, self.block)
        codes, scales = self.codes[expert].view(len(values), -1), []
        for start in range(0, len(values), rows := self._rows):
            coded, scale = _encode(values[start : start + rows], self.bits)
            codes[start : start + rows] = _pack(coded, self.bits).view(len(coded), -1)
            scales.append(scale)
        scale = torch.cat(scales)
        self.unit[expert] = scale.amax().clamp(min=1e-30)
        self.scales[expert] = (scale / self.unit[expert]).to(torch.float16)

    @torch.no_grad()
    def read(self, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """One expert's tensor, in the type it had or in ``dtype``."""
        codes = self.codes[expert].view(self.scales.shape[1], -1)
        scales = self.scales[expert].float() * self.unit[expert]
        out = torch.empty(len(codes), self.block, device=codes.device, dtype=dtype or self.dtype)
        for start in range(0, len(codes), rows := self._rows):
            part = slice(start, start + rows)
            values = _decode(codes[part].flatten(), self.bits).view(-1, self.block)
            out[part] = values.mul_(scales[part, None])
        return out.flatten()[: math.prod(self.shape)].view(self.shape)

    @property
    def _rows(self) -> int:
        """Blocks worked on at a time: what fits a core's cache; all of them on an accelerator."""
        return max(1, CACHE_VALUES // self.block) if self.codes.device.type == "cpu" else len(self.scale_bits[0])


def quantize_tensor(stack: Tensor, bits: int, block: int = 64) -> Packed:
    """Quantize a stack ``[E, ...]``, each expert by itself; see :class:`Packed`."""
    return Packed(stack, bits, block)


def dequantize(packed: Packed, expert: int, dtype: torch.dtype | None = None) -> Tensor:
    """One expert's tensor, in the type it had or in ``dtype``."""
    return packed.read(expert, dtype)


@functools.cache
def levels(bits: int) -> tuple[float, ...]:
    """Levels of a 2, 3 or 4-bit code, ascending: Lloyd-Max quantiser of a standard normal variable."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    values = normal.icdf((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(500):
        middle = (values[1:] + values[:-1]) / 2
        edges = torch.cat([middle.new_tensor([-math.inf]), middle, middle.new_tensor([math.inf])])
        density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        values = -(density[1:] - density[:-1]) / (normal.cdf(edges[1:]) - normal.cdf(edges[:-1]))
    return tuple(values.tolist())


class QuantizedExperts(ReplacedExperts):
    """Experts at rest in few bits; the one that is computed is dequantized alone, forward and backward.

    No weight gets a gradient unless :attr:`collects_gradients` is set: then :meth:`grads` holds those of the
    dequantized weights (straight-through, for FMQ), per expert that saw tokens.
    """

    def __init__(self, original: nn.Module, packed: Mapping[str, Packed]) -> None:
        super().__init__(original)
        self.packed = nn.ModuleDict(packed)
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
            self.packed[name].write(expert, tensor)

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

    def end_backward(self) -> None:
        """See :class:`fluxlib.moe.kernels.Source`."""

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


# One cell per step of GRID between -SPAN and SPAN units of the scale: finding a level is a table look-up.
SPAN, GRID = 4.0, 2048


@functools.cache
def _tables(bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of the grid: level and code of each cell; and the levels behind each word of codes."""
    table = torch.tensor(levels(bits))
    cells = (torch.arange(GRID) + 0.5) * (2 * SPAN / GRID) - SPAN
    codes = torch.bucketize(cells, (table[1:] + table[:-1]) / 2)
    per_word = WORD_CODES[bits]
    words = torch.arange(2 ** (bits * per_word))[:, None] >> (bits * torch.arange(per_word))
    behind = table[words & (2**bits - 1)].contiguous()
    # One complex or double number per word: gathering those is several times faster than gathering short rows.
    behind = behind.view({2: torch.float64, 4: torch.complex128}[per_word])
    return tuple(t.to(device) for t in (table[codes], codes.int(), behind.flatten()))  # type: ignore[return-value]


def _encode(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes ``[blocks, block]`` int32 and scales ``[blocks]`` of float32 values.

    Several first scales are tried for each block: for normal values the standard deviation is best, for a block with an
    outlier one that reaches it. Each is followed by the scale of least squared error, ``<v, l> / <l, l>``, whose gain
    ``<v, l>^2 / <l, l>`` says which is best.
    """
    largest = values.abs().amax(1)
    if bits == 8:
        codes = (values * (127 / largest.clamp(min=1e-30))[:, None]).round_().to(torch.int32)
        return codes, largest / 127
    level_of, code_of, _ = _tables(bits, values.device)
    deviation, reach = values.square().mean(1).sqrt(), largest / levels(bits)[-1]
    scale, gain = torch.zeros_like(largest), torch.full_like(largest, -1.0)
    for start in (deviation, (deviation + reach) / 2, reach):
        level = level_of.index_select(0, _cells(values, start)).view(values.shape)
        product, square = (values * level).sum(1), level.square().sum(1)
        better = product.square() / square
        scale = torch.where(better > gain, product / square, scale)
        gain = torch.maximum(better, gain)
    cell = _cells(values, scale)
    level = level_of.index_select(0, cell).view(values.shape)
    scale = (values * level).sum(1) / level.square().sum(1)
    return code_of.index_select(0, cell).view(values.shape), scale


def _cells(values: Tensor, scale: Tensor) -> Tensor:
    """Cell of the grid of each value, flat, int32."""
    cells = values * (GRID / (2 * SPAN) / scale.clamp(min=1e-30))[:, None]
    return cells.add_(GRID / 2).clamp_(0, GRID - 1).int().flatten()


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., 8 n]`` into ``[n * bits]`` bytes: 8 codes fill ``bits`` bytes, first code lowest."""
    if bits == 8:
        return codes.to(torch.int8).flatten().view(torch.uint8)
    per_word = WORD_CODES[bits]
    parts = codes.view(-1, per_word)
    words = parts[:, 0].clone()
    for i in range(1, per_word):
        words |= parts[:, i] << (bits * i)
    if bits != 3:
        return words.to(torch.uint8)
    pairs = words.view(-1, 2)
    words = pairs[:, 0] | (pairs[:, 1] << 12)
    return torch.stack([words & 255, (words >> 8) & 255, words >> 16], dim=1).to(torch.uint8).flatten()


def _decode(packed: Tensor, bits: int) -> Tensor:
    """Levels ``[n]`` float32 behind packed codes; in 8 bits the signed codes themselves."""
    if bits == 8:
        return packed.view(torch.int8).float()
    words = packed.int()
    if bits == 3:
        parts = words.view(-1, 3)
        joined = parts[:, 0] + (parts[:, 1] << 8) + (parts[:, 2] << 16)
        words = torch.stack([joined & 4095, joined >> 12], dim=1).flatten()
    return _tables(bits, packed.device)[2].index_select(0, words).view(torch.float32)
