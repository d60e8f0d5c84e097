"""The fast matrix product: one function, :func:`matmul`, and the reason for it.

``a @ b`` in float32 on an x86 CPU goes to MKL, which uses 512-bit vectors on Intel's processors only; oneDNN, in the
same PyTorch, uses them wherever they exist. On an AMD EPYC of the Zen 5 family that is 236 against 110 GFLOP/s per
core, at the same precision (see ``make bench``). oneDNN compiles anew for every number of rows, so there are to be few
of them: :func:`pad_pairs`. :func:`freeze_linears` has the layers of a model that do not learn multiplied so, too.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST = 1 << 22
"""Multiplications below which a product is too small for oneDNN's own overhead."""

SMALLEST_LINEAR = 1 << 25
"""The same for a frozen layer, whose rows are not padded: a new number of rows costs a millisecond of compiling."""

FEWEST_ROWS = 64
"""Rows below which a product keeps its own number of rows."""


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a [n, i] @ b [i, o] (+ bias [o])``; not recorded by autograd in every case, so for use inside a Function."""
    if a.numel() * b.shape[1] >= SMALLEST and is_wide(a):
        return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")
    return a @ b if bias is None else torch.addmm(bias, a, b)


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


def takes_grouped(dtype: torch.dtype, sizes: Iterable[int]) -> bool:
    """Whether PyTorch's grouped products take matrices of that type, with rows of these sizes: of whole 16 bytes."""
    return dtype != torch.float64 and all(size * dtype.itemsize % 16 == 0 for size in sizes)


def pad_pairs(hidden: Tensor, token: Tensor, weight: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Round the pairs of each slot up where oneDNN will multiply: token and weight ``[P]``, and S counts of pairs.

    The pairs added have weight zero: they change no sum and get no gradient. At most an eighth is added, 1/16 in the
    mean, and a slot of up to 8,192 pairs has one of 60 sizes.
    """
    padded = [padded_rows(count) for count in counts]
    if padded == list(counts) or not is_wide(hidden):
        return token, weight, list(counts)
    own = torch.arange(len(token)).split(list(counts))
    order = torch.cat([F.pad(rows, (0, n - len(rows)), value=len(token)) for rows, n in zip(own, padded, strict=True)])
    return F.pad(token, (0, 1))[order], F.pad(weight, (0, 1))[order], padded


def padded_rows(count: int) -> int:
    """The next of eight sizes per power of two; below FEWEST_ROWS the number itself."""
    if count < FEWEST_ROWS:
        return count
    step = 1 << (count.bit_length() - 4)
    return -(-count // step) * step


class FrozenLinear(nn.Linear):
    """A linear layer that does not learn, multiplied as :func:`matmul` does; made by :func:`freeze_linears`."""

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., i] -> [..., o]``."""
        if not self._gains(input):
            return F.linear(input, self.weight, self.bias)
        # Reshaped out here: what a Function returns must be no view of its own, or no one may write into it.
        made: Tensor = _FrozenLinear.apply(input.reshape(-1, self.in_features), self.weight, self.bias)
        return made.view(*input.shape[:-1], -1)

    def _gains(self, input: Tensor) -> bool:
        if input.numel() * self.out_features < SMALLEST_LINEAR or not is_wide(input):
            return False
        learns = any(parameter.requires_grad for parameter in self.parameters())
        return not learns and self.weight.dtype == input.dtype and not torch.is_autocast_enabled("cpu")


class _FrozenLinear(torch.autograd.Function):
    """``input [n, i] @ weight.T (+ bias)``, with a weight that gets no gradient; the input is not kept."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return matmul(input, weight.T, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        # The same product again, so that the gradient has a gradient.
        return _FrozenLinear.apply(gradient, weight.T, None), None, None


def freeze_linears(model: nn.Module, wider_than: int = 0) -> None:
    """Turn linear layers into :class:`FrozenLinear`, in place; one whose weight learns computes as before.

    Layers with at most ``wider_than`` outputs stay as they are (routers, which others watch or mask).
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features > wider_than:
            module.__class__ = FrozenLinear


def thaw_linears(model: nn.Module) -> None:
    """Undo :func:`freeze_linears`."""
    changed: list[Any] = [module for module in model.modules() if type(module) is FrozenLinear]
    for module in changed:
        module.__class__ = nn.Linear


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which sums over experts are kept: float32 for 16-bit types."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@contextmanager
def own_types(hidden: Tensor) -> Iterator[torch.dtype]:
    """Turn autocast off; gives the type in which to compute with ``hidden``: autocast's where it was on."""
    kind = hidden.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        yield hidden.dtype
        return
    dtype = hidden.dtype if hidden.dtype == torch.float64 else torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        yield dtype
