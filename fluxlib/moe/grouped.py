"""The pass of tokens through stacked slots in a handful of grouped matrix products.

For many or small slots, where :func:`fluxlib.moe.passes.slot_pass` would start many small kernels. The products are
``torch.nn.functional.grouped_mm``: one kernel over all slots for bfloat16 on CUDA, a loop in C++ on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gemm
from .find import Layout
from .kernels import Activation, wide_dtype, without_autocast


def grouped_pass(
    hidden: Tensor,
    token: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    layout: Layout,
    stacks: Mapping[str, Tensor],
    activation: Activation,
) -> Tensor:
    """Weighted outputs of slots in stacks ``[S, ...]``, summed per token: ``[N, H]``.

    Arguments as in :func:`fluxlib.moe.passes.slot_pass`; a stack that requires a gradient gets one.

    Raises:
        ValueError: float64, or rows that are no multiple of 16 bytes.
    """
    if not is_possible(hidden, stacks):
        shapes = [tuple(stack.shape) for stack in stacks.values()]
        raise ValueError(f"method: 'grouped' takes no float64 and rows of 16 n bytes, got {hidden.dtype} {shapes}")
    if len(token) == 0:
        return torch.zeros_like(hidden) + 0 * sum(stack.sum() for stack in stacks.values())
    return _GroupedPass.apply(hidden, weight, token, counts, layout, activation, tuple(stacks), *stacks.values())


# Pairs times the wider of their rows, in values: below it, everything a pass makes stays in a CPU's cache.
SMALL_VALUES = 1 << 21


def is_possible(hidden: Tensor, stacks: Mapping[str, Tensor]) -> bool:
    """Whether ``grouped_mm`` takes these: no float64, rows of a multiple of 16 bytes."""
    sizes = [size for stack in stacks.values() for size in stack.shape[1:]]
    aligned = all(size * hidden.element_size() % 16 == 0 for size in sizes)
    return aligned and hidden.dtype != torch.float64 and hasattr(F, "grouped_mm")


def suits(hidden: Tensor, counts: Sequence[int], stacks: Mapping[str, Tensor]) -> bool:
    """Whether grouped products are possible and beat a walk over the slots.

    On CUDA: where they are one kernel (bfloat16). On a CPU they are a loop in C++, which wins while the work is so
    small that Python's own time shows, unless the walk's products are faster there (:mod:`fluxlib.moe.gemm`).
    """
    if not is_possible(hidden, stacks):
        return False
    if hidden.device.type == "cuda":
        return hidden.dtype == torch.bfloat16 and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
    num_pairs, busy = sum(counts), sum(count > 0 for count in counts)
    largest = max(stack[0].numel() for stack in stacks.values())
    if gemm.is_wide(hidden) and num_pairs * largest >= gemm.SMALLEST * max(1, busy):
        return False
    widest = max(size for stack in stacks.values() for size in stack.shape[1:])
    return hidden.device.type == "cpu" and num_pairs * widest <= SMALL_VALUES


class _GroupedPass(torch.autograd.Function):
    """See :func:`grouped_pass`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token: Tensor,
        counts: Sequence[int],
        layout: Layout,
        activation: Activation,
        names: tuple[str, ...],
        *stacks: Tensor,
    ) -> Tensor:
        ctx.groups = _Groups(layout, counts, dict(zip(names, stacks, strict=True)), hidden)
        projected = ctx.groups.linear(hidden[token], layout.up_name)
        result = ctx.groups.linear(activation.forward(projected), "down_proj")
        if activation.post_norm is not None:
            result = activation.post_norm(result)
        out = ctx.groups.scatter(result * weight[:, None], token, len(hidden))
        ctx.save_for_backward(hidden, weight, token, projected)
        ctx.activation, ctx.names = activation, names
        return out.to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token, projected = ctx.saved_tensors
        groups, activation, needs = ctx.groups, ctx.activation, ctx.needs_input_grad
        act, pull = activation.backward(projected)
        incoming = gradient[token]
        scaled = (incoming * weight[:, None]).to(incoming.dtype)
        if activation.post_norm is None:
            back = groups.back(incoming, "down_proj")
            through = (back * act).sum(1, dtype=weight.dtype) + groups.bias_part(incoming, weight.dtype)
            back = (back * weight[:, None]).to(back.dtype)
        else:
            normed, scaled = activation.norm_backward(groups.linear(act, "down_proj"), scaled)
            through = (incoming * normed).sum(1, dtype=weight.dtype)
            back = groups.back(scaled, "down_proj")
        projected_gradient = pull(back)
        hidden_gradient = None
        if needs[0]:
            hidden_gradient = groups.back(projected_gradient, groups.layout.up_name)
            hidden_gradient = groups.scatter(hidden_gradient, token, len(hidden)).to(hidden.dtype)
        stacks: list[Tensor | None] = [None] * len(ctx.names)
        if any(needs[7:]):
            made = groups.weight_gradients(hidden[token], projected_gradient, groups.layout.up_name)
            made |= groups.weight_gradients(act, scaled, "down_proj")
            stacks = [made[name] if need else None for name, need in zip(ctx.names, needs[7:], strict=True)]
        return (hidden_gradient, through if needs[1] else None, *[None] * 5, *stacks)


class _Groups:
    """Stacked weights and the boundaries of the groups of pairs, sorted by slot."""

    def __init__(self, layout: Layout, counts: Sequence[int], stacks: Mapping[str, Tensor], like: Tensor) -> None:
        self.layout, self.counts = layout, counts
        self.dtypes = {name: stack.dtype for name, stack in stacks.items()}
        self.stacks = {name: stack.detach().to(like.dtype) for name, stack in stacks.items()}
        sizes = torch.tensor(counts, device=like.device)
        self.offsets = sizes.cumsum(0, dtype=torch.int32)
        self.slot = torch.arange(len(counts), device=like.device).repeat_interleave(sizes) if layout.has_bias else None

    def linear(self, x: Tensor, name: str) -> Tensor:
        """``x @ W (+ b)`` with each row's slot."""
        weight = self.stacks[name] if self.layout.is_transposed else self.stacks[name].transpose(-2, -1)
        out = F.grouped_mm(x, weight, offs=self.offsets)
        return out if self.slot is None else out.add_(self.stacks[f"{name}_bias"][self.slot])

    def back(self, gradient: Tensor, name: str) -> Tensor:
        """``g @ W'`` with each row's slot."""
        weight = self.stacks[name].transpose(-2, -1) if self.layout.is_transposed else self.stacks[name]
        return F.grouped_mm(gradient.contiguous(), weight, offs=self.offsets)

    def bias_part(self, incoming: Tensor, dtype: torch.dtype) -> Tensor | float:
        """What the last bias adds to the gate weight's gradient."""
        if self.slot is None:
            return 0.0
        return (incoming * self.stacks["down_proj_bias"][self.slot]).sum(1, dtype=dtype)

    def weight_gradients(self, x: Tensor, gradient: Tensor, name: str) -> dict[str, Tensor]:
        """Gradients of a stack and its bias, in the stack's layout and type."""
        pair = (x, gradient) if self.layout.is_transposed else (gradient, x)
        out = {name: F.grouped_mm(pair[0].contiguous().T, pair[1].contiguous(), offs=self.offsets)}
        if self.slot is not None:
            zeros = torch.zeros(len(self.counts), gradient.shape[1], device=x.device, dtype=wide_dtype(x.dtype))
            out[f"{name}_bias"] = zeros.index_add_(0, self.slot, gradient.to(zeros.dtype))
        return {key: value.to(self.dtypes[key]) for key, value in out.items()}

    def scatter(self, rows: Tensor, token: Tensor, num_tokens: int) -> Tensor:
        """Sum rows per token, slot by slot: no row twice in a call, so the result is the same every time."""
        out = torch.zeros(num_tokens, rows.shape[1], device=rows.device, dtype=wide_dtype(rows.dtype))
        start = 0
        for count in self.counts:
            if count:
                out.index_add_(0, token[start : start + count], rows[start : start + count].to(out.dtype))
            start += count
        return out
