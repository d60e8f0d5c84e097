"""Matrix products for the passes, by the faster of the libraries PyTorch carries.

``a @ b`` in float32 on an x86 CPU goes to MKL, which uses 512-bit vectors on Intel's processors only; oneDNN, in the
same PyTorch, uses them wherever they exist. On an AMD EPYC of the Zen 5 family that is 236 against 110 GFLOP/s per
core, at the same precision (see ``make bench``).
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SMALLEST = 1 << 22
"""Multiplications below which a product is too small for oneDNN's own overhead."""


FEWEST_ROWS = 64
"""Rows below which a product keeps its own number of rows."""


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a [n, i] @ b [i, o] (+ bias [o])``; not recorded by autograd in every case, so for use inside a Function."""
    if a.numel() * b.shape[1] >= SMALLEST and is_wide(a):
        return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")
    return a @ b if bias is None else torch.addmm(bias, a, b)


def pad_pairs(hidden: Tensor, token: Tensor, weight: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Round the number of pairs of each slot up where oneDNN will multiply, as it compiles anew for every new shape.

    The pairs added have weight zero: they change no sum and get no gradient. At most an eighth is added, 1/16 in the
    mean, and a slot of up to 8,192 pairs has one of 60 sizes.
    """
    padded = [padded_rows(count) for count in counts]
    if padded == list(counts) or not is_wide(hidden):
        return token, weight, list(counts)
    order = torch.full((sum(padded),), len(token), dtype=torch.long)
    start = place = 0
    for count, room in zip(counts, padded, strict=True):
        order[place : place + count] = torch.arange(start, start + count)
        start, place = start + count, place + room
    return _extended(token)[order], _extended(weight)[order], padded


def padded_rows(count: int) -> int:
    """The next of eight sizes per power of two; below FEWEST_ROWS the number itself."""
    if count < FEWEST_ROWS:
        return count
    step = 1 << (count.bit_length() - 4)
    return -(-count // step) * step


def _extended(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_zeros(1)])


def is_wide(x: Tensor) -> bool:
    """Whether oneDNN's products use wider vectors than MKL's here and for such tensors; the same in every run."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _has_wider()


@functools.cache
def _has_wider() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512") or "GenuineIntel" in _processor():
        return False
    probe = torch.eye(8)
    try:
        made = torch.ops.mkldnn._linear_pointwise(probe, probe, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(made, probe)


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
