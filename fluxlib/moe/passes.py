"""Tokens through a set of experts, forward and backward.

- :func:`slot_pass` -- walks over the slots that have tokens: what a slot needs stays small enough for the cache, and
  weights may come from anywhere (:class:`~fluxlib.moe.kernels.Source`),
- :func:`stack_pass` -- for slots that live in stacks: the pass above, or grouped matrix products
  (:mod:`fluxlib.moe.grouped`) for many or small slots,
- :func:`plain_pass` -- the same in plain PyTorch, for reading and for tests.

Under autocast hidden states are cast to its type first, and the passes then choose their types themselves, as a
Function's backward pass does not see autocast as its forward pass did.

Both passes keep only the pre-activations ``[P, 2I]`` of the P (token, slot) pairs for the backward pass and make
weight gradients for trainable slots only. The gate weight's gradient needs no output of the experts: with u the
gradient of the down projection's input, it is ``<u, act>`` (plus ``<g, bias>``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .find import Layout
from .gemm import matmul, pad_pairs
from .grouped import grouped_pass, suits
from .kernels import Activation, Matrices, Source, StackSource, own_types, wide_dtype, without_autocast


def slot_pass(
    hidden: Tensor,
    token: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    source: Source,
    activation: Activation,
    stacks: Mapping[str, Tensor] | None = None,
    anchor: Tensor | None = None,
) -> Tensor:
    """Weighted outputs of the slots, summed per token: ``[N, H]``.

    Args:
        hidden: ``[N, H]``.
        token: ``[P]`` row of ``hidden`` of each pair, sorted by slot, no row twice in a slot.
        weight: ``[P]`` gate weight of each pair.
        counts: Number of pairs of each slot.
        source: Weights of the slots.
        activation: Gate and norm of the experts.
        stacks: Trainable stacks; autograd hands their gradients on. None: no weight gradient is computed.
        anchor: An empty tensor that requires a gradient makes ``source.add_gradients`` receive the weight gradients
            of every slot with tokens (for sources that keep their own).
    """
    stacks = stacks or {}
    names, values = tuple(stacks), tuple(stacks.values())
    # Inside a Function gradients are always off, and what it needs is the same with and without them.
    keeps = torch.is_grad_enabled()
    with own_types(hidden) as dtype:
        computed = hidden.to(dtype)
        token, weight, counts = pad_pairs(computed, token, weight, counts)
        out = _SlotPass.apply(computed, weight, anchor, token, counts, source, activation, keeps, names, *values)
    return out.to(hidden.dtype)


def stack_pass(
    hidden: Tensor,
    token: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    layout: Layout,
    stacks: Mapping[str, Tensor],
    activation: Activation,
    method: str = "auto",
) -> Tensor:
    """The pass for slots in stacks, by the method that suits the device.

    Args:
        method: ``"slots"``, ``"grouped"``, or ``"auto"``: what is faster, see :func:`fluxlib.moe.grouped.suits`.

    Raises:
        ValueError: Another method.
    """
    if method not in ("auto", "slots", "grouped"):
        raise ValueError(f"method: expected 'auto', 'slots' or 'grouped', got {method!r}")
    with own_types(hidden) as dtype:
        computed = hidden.to(dtype)
        if method == "grouped" or (method == "auto" and suits(computed, counts, stacks)):
            return grouped_pass(computed, token, weight, counts, layout, stacks, activation).to(hidden.dtype)
    trainable = stacks if any(stack.requires_grad for stack in stacks.values()) else None
    return slot_pass(hidden, token, weight, counts, StackSource(layout, stacks), activation, trainable)


def plain_pass(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: Sequence[Matrices], activation: Activation
) -> Tensor:
    """Reference: every expert on every token, in plain PyTorch. See :func:`slot_pass` for the fast one."""
    out = torch.zeros_like(hidden)
    for index, expert in enumerate(experts):
        projected = hidden @ expert.up + (0 if expert.up_bias is None else expert.up_bias)
        result = activation.function(projected) @ expert.down + (0 if expert.down_bias is None else expert.down_bias)
        if activation.post_norm is not None:
            result = activation.post_norm(result)
        out = out + result * ((top_k_index == index) * top_k_weights).sum(1, keepdim=True)
    return out


@dataclass(frozen=True)
class _Slot:
    """A slot that has pairs: its number, its pairs, and the slots that come after it."""

    number: int
    start: int
    end: int
    upcoming: Sequence[int]


def _busy(counts: Sequence[int], backward: bool = False) -> list[_Slot]:
    """Slots that have pairs, in order; backward from last to first, so that what was used last is used first."""
    ends = list(itertools.accumulate(counts))
    order = [slot for slot, count in enumerate(counts) if count]
    if backward:
        order.reverse()
    return [_Slot(s, ends[s] - counts[s], ends[s], order[i + 1 :]) for i, s in enumerate(order)]


class _SlotPass(torch.autograd.Function):
    """The pass over slots; see :func:`slot_pass`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        anchor: Tensor | None,
        token: Tensor,
        counts: Sequence[int],
        source: Source,
        activation: Activation,
        keeps: bool,
        names: tuple[str, ...],
        *stacks: Tensor,
    ) -> Tensor:
        out = torch.zeros(hidden.shape, device=hidden.device, dtype=wide_dtype(hidden.dtype))
        kept: list[Tensor] = []
        for slot in _busy(counts):
            matrices = source.matrices(slot.number, slot.upcoming, hidden.dtype)
            rows, gate = token[slot.start : slot.end], weight[slot.start : slot.end, None]
            projected = matmul(hidden.index_select(0, rows), matrices.up, matrices.up_bias)
            result = matmul(activation.forward(projected), matrices.down, matrices.down_bias)
            if activation.post_norm is not None:
                result = activation.post_norm(result)
            out.index_add_(0, rows, _weighted(result.to(out.dtype), gate))
            if keeps and any(ctx.needs_input_grad):
                kept.append(projected)
        ctx.save_for_backward(hidden, weight, token, *kept)
        ctx.counts, ctx.source, ctx.activation = counts, source, activation
        ctx.stacks = {name: (stack.shape, stack.dtype) for name, stack in zip(names, stacks, strict=True)}
        return out.to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token, *kept = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        stacks = {n: torch.empty(s, dtype=t, device=hidden.device) for n, (s, t) in ctx.stacks.items()}
        for stack in stacks.values():
            for idle in (slot for slot, count in enumerate(ctx.counts) if not count):
                stack[idle].zero_()
        wants_experts = bool(stacks) or ctx.needs_input_grad[2]
        source = ctx.source
        sink = StackSource(source.layout, stacks) if stacks else source
        wide = wide_dtype(hidden.dtype)
        hidden_gradient = torch.zeros(hidden.shape, device=hidden.device, dtype=wide) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight) if wants_weight else None
        for slot, projected in zip(_busy(ctx.counts, backward=True), reversed(kept), strict=True):
            matrices = source.matrices(slot.number, slot.upcoming, hidden.dtype)
            rows, gate = token[slot.start : slot.end], weight[slot.start : slot.end, None]
            incoming = gradient.index_select(0, rows)
            local = _local_gradients(matrices, ctx.activation, projected, incoming, gate)
            if weight_gradient is not None:
                weight_gradient[slot.start : slot.end] = local.gate
            if wants_experts:
                result = _weighted(incoming, gate) if local.result is None else local.result
                states = hidden.index_select(0, rows)
                sink.add_gradients(slot.number, _weight_gradients(source.layout, states, local, result))
            if hidden_gradient is not None:
                hidden_gradient.index_add_(0, rows, matmul(local.projected, matrices.up.T).to(wide))
        if wants_experts:
            sink.end_backward()
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        return (hidden_gradient, weight_gradient, *[None] * 7, *stacks.values())


@dataclass(frozen=True)
class _Local:
    """Gradients at the joints of one slot.

    Attributes:
        gate: ``[n]``, of the gate weights.
        projected: ``[n, 2I]``, of the pre-activations.
        act: ``[n, I]``, the input of the down projection (not a gradient).
        result: ``[n, H]``, of the down projection's output; None: that of the layer's output, times the gate weight.
    """

    gate: Tensor
    projected: Tensor
    act: Tensor
    result: Tensor | None


def _local_gradients(
    matrices: Matrices, activation: Activation, projected: Tensor, incoming: Tensor, gate: Tensor
) -> _Local:
    """Gradients at the joints from ``incoming [n, H]``, the gradient of the layer's output at the slot's tokens."""
    act, pull = activation.backward(projected)
    wide = wide_dtype(incoming.dtype)
    if activation.post_norm is not None:
        result = matmul(act, matrices.down, matrices.down_bias)
        normed, scaled = activation.norm_backward(result, (incoming * gate).to(incoming.dtype))
        through = (incoming * normed).sum(1, dtype=wide)
        return _Local(through, pull(matmul(scaled, matrices.down.T)), act, scaled)
    back = matmul(incoming, matrices.down.T)
    through = (back * act).sum(1, dtype=wide)
    if matrices.down_bias is not None:
        through += (incoming * matrices.down_bias).sum(1, dtype=wide)
    return _Local(through, pull(_weighted(back, gate)), act, None)


def _weighted(rows: Tensor, gate: Tensor) -> Tensor:
    """``rows * gate``, in place where the types allow it; what is given is not needed any more."""
    return rows.mul_(gate) if rows.dtype == gate.dtype else (rows * gate).to(rows.dtype)


def _weight_gradients(layout: Layout, states: Tensor, local: _Local, result: Tensor) -> dict[str, Tensor]:
    """Weight gradients of one slot, by stack name."""
    if layout.is_transposed:
        out = {layout.up_name: matmul(states.T, local.projected), "down_proj": matmul(local.act.T, result)}
    else:
        out = {layout.up_name: matmul(local.projected.T, states), "down_proj": matmul(result.T, local.act)}
    if layout.has_bias:
        out[f"{layout.up_name}_bias"] = local.projected.sum(0)
        out["down_proj_bias"] = result.sum(0)
    return out
