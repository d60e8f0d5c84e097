"""Few-bit codes for stacks of experts.

Values are coded in blocks of one expert's matrix: a code per value, a scale per block. 8 bits are evenly spaced
between minus and plus the block's largest value; 2, 3 and 4 bits use the levels that are best for normally distributed
values (Lloyd and Max), with a scale fitted to the block by least squares.

On a CPU bitsandbytes needs 1.4 to 3 times as long to quantise, errs by 8 % more, and dequantises 3 to 4 times as fast:
the better tool where experts are quantised once and read many times, which no participant does (``make bench``).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BITS = (2, 3, 4, 8)
# Codes that are looked up together: one byte of 2 or 4-bit codes, half of the 3 bytes of 3-bit codes.
WORD_CODES = {2: 4, 3: 4, 4: 2}
CACHE_VALUES = 1 << 17
BLOCK = 64
"""Values that share a scale."""
SCALE_BITS = 16 / BLOCK
"""Of a block's scale, per value."""


class Packed(nn.Module):
    """A quantized stack ``[E, ...]`` of floats; a block never straddles two experts, the last one may be short.

    Memory at rest per expert of n values: ``n * bits / 8`` bytes of codes, 2 bytes of scale per block, 4 bytes more.
    Buffers are integers throughout, so that moving the model to another floating-point type leaves them alone.

    Raises:
        ValueError: ``bits`` is none of 2, 3, 4 and 8.
    """

    codes: Tensor
    scale_bits: Tensor
    unit_bits: Tensor

    def __init__(self, stack: Tensor, bits: int) -> None:
        super().__init__()
        if bits not in BITS:
            raise ValueError(f"bits: expected one of {BITS}, got {bits}")
        self.bits, self.dtype, self.shape = bits, stack.dtype, tuple(stack.shape[1:])
        blocks = -(-math.prod(self.shape) // BLOCK)
        num, place = len(stack), stack.device
        self.register_buffer("codes", torch.zeros(num, blocks * BLOCK * bits // 8, dtype=torch.uint8, device=place))
        self.register_buffer("scale_bits", torch.zeros(num, blocks, dtype=torch.int16, device=place))
        self.register_buffer("unit_bits", torch.zeros(num, dtype=torch.int32, device=place))
        for first in range(0, num, self.at_once):
            some = range(num)[first : first + self.at_once]
            self.write(some, stack[first : first + self.at_once])

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

    @property
    def at_once(self) -> int:
        """Experts that are coded together: small ones, as many as fit a core's cache."""
        return max(1, CACHE_VALUES // math.prod(self.shape))

    @torch.no_grad()
    def write(self, experts: int | Sequence[int], tensors: Tensor) -> None:
        """Quantize an expert's tensor into its place, or the stack of several; one not finite makes its unit NaN."""
        index = torch.tensor([experts] if isinstance(experts, int) else list(experts), device=self.codes.device)
        values = tensors.detach().to(device=self.codes.device, dtype=torch.float32).reshape(len(index), -1)
        finite = torch.isfinite(values.sum(1))
        if not finite.all():
            self.unit[index[~finite]] = math.nan
            index, values = index[finite], values[finite]
        if not len(index):
            return
        values = F.pad(values, (0, -values.shape[1] % BLOCK)).view(-1, BLOCK)
        codes = self.codes.new_empty(len(values), BLOCK * self.bits // 8)
        scale = self._encode(values, codes).view(len(index), -1)
        unit = scale.amax(1).clamp(min=1e-30)
        self.codes[index] = codes.view(len(index), -1)
        self.unit[index], self.scales[index] = unit, (scale / unit[:, None]).to(torch.float16)

    @torch.no_grad()
    def read(self, experts: int | Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """One expert's tensor, or the stack of several, in the type it had or in ``dtype``."""
        index: int | list[int] = experts if isinstance(experts, int) else list(experts)
        codes = self.codes[index].view(-1, BLOCK * self.bits // 8)
        scales = self.scales[index].float() * self.unit[index, None]
        values = self._decode(codes, scales.view(-1), dtype or self.dtype)
        shape = self.shape if isinstance(index, int) else (len(index), *self.shape)
        return values.view(scales.shape[:-1].numel(), -1)[:, : math.prod(self.shape)].reshape(shape)

    def _encode(self, values: Tensor, codes: Tensor) -> Tensor:
        """Fill ``codes [blocks, bytes]`` for ``values [blocks, block]`` float32; gives the scales ``[blocks]``."""
        scales = []
        for start in range(0, len(values), rows := self._rows):
            coded, scale = _encode(values[start : start + rows], self.bits)
            codes[start : start + rows] = _pack(coded, self.bits).view(len(coded), -1)
            scales.append(scale)
        return torch.cat(scales)

    def _decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Values ``[blocks, block]``."""
        out = torch.empty(len(codes), BLOCK, device=codes.device, dtype=dtype)
        for start in range(0, len(codes), rows := self._rows):
            part = slice(start, start + rows)
            values = _decode(codes[part].flatten(), self.bits).view(-1, BLOCK)
            out[part] = values.mul_(scales[part, None])
        return out

    @property
    def _rows(self) -> int:
        """Blocks worked on at a time: what fits a core's cache; all of them on an accelerator."""
        return max(1, CACHE_VALUES // BLOCK) if self.codes.device.type == "cpu" else len(self.scale_bits[0])


class PackedNF4(Packed):
    """4 bits by bitsandbytes' own kernels, with its levels (NF4) and each block's largest value as scale."""

    def _encode(self, values: Tensor, codes: Tensor) -> Tensor:
        from bitsandbytes import functional

        coded, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
        codes.view(-1).copy_(coded.view(-1))
        return state.absmax

    def _decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        from bitsandbytes import functional

        wide = torch.float32 if dtype == torch.float64 else dtype
        state = functional.QuantState(
            scales, torch.Size((len(codes), BLOCK)), functional.get_4bit_type("nf4", codes.device), BLOCK, "nf4", wide
        )
        return functional.dequantize_4bit(codes.view(-1, 1), state).to(dtype)


def quantize_tensor(stack: Tensor, bits: int) -> Packed:
    """Quantize a stack ``[E, ...]``, each expert by itself: 4 bits on CUDA by bitsandbytes, where it is installed."""
    if stack.device.type == "cuda" and bits == 4:
        if importlib.util.find_spec("bitsandbytes") is not None:
            return PackedNF4(stack, bits)
        warnings.warn("4-bit experts: bitsandbytes is not installed (pip install 'fluxlib[quantization]'), which is"
                      " faster on CUDA; the library's own code is used", stacklevel=2)  # fmt: skip
    return Packed(stack, bits)


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

    Several first scales are tried: for normal values the standard deviation is best, for a block with an outlier one
    that reaches it. Each is followed by that of least squared error, ``<v, l> / <l, l>``; gain: ``<v, l>^2 / <l, l>``.
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
