"""One sorted pass of tokens through a set of experts, forward and backward.

Both directions walk over the slots that have tokens; what a slot needs stays small enough for the cache, and only
the pre-activations ``[P, 2I]`` of the P (token, slot) pairs are kept for the backward pass:

- :func:`sort_pairs` -- (token, slot) pairs, duplicates joined, sorted by slot,
- :class:`Activation` -- the model's own gate, with its derivative,
- :class:`StackSource` -- slots that live in stacks ``[S, ...]``; quantized and offloaded experts bring their own,
- :func:`slot_pass` -- the pass; weight gradients are computed for trainable slots only,
- :func:`plain_pass` -- the same in plain PyTorch, for tests and for reading.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import moe as _integration

from .layers import Layout, read_layout

_DEFAULT_GATE = getattr(_integration, "_default_apply_gate", None)


@dataclass(frozen=True)
class Matrices:
    """Weights of one slot in computing order: ``x @ up [H, 2I] + up_bias``, gate, ``@ down [I, H] + down_bias``."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Source(Protocol):
    """Where the weights of the slots come from."""

    layout: Layout

    def matrices(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Matrices:
        """Weights of one slot; ``upcoming`` are the slots that will be asked for next."""
        ...

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        """Take the weight gradients of one slot, by stack name and in the stack's layout."""
        ...


class StackSource:
    """Slots in stacks ``[S, ...]`` named as in the layout."""

    def __init__(self, layout: Layout, stacks: Mapping[str, Tensor]) -> None:
        self.layout = layout
        self.stacks = stacks

    def matrices(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Matrices:
        """Views of one slot (a copy only where the stack has another dtype)."""
        return to_matrices({name: stack[slot] for name, stack in self.stacks.items()}, self.layout, dtype)

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        """Write one slot's gradients into the stacks, which here hold gradients instead of weights."""
        for name, gradient in gradients.items():
            self.stacks[name][slot].copy_(gradient)


def to_matrices(tensors: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Matrices:
    """An expert's tensors in computing order."""
    tensors = {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
    up, down = tensors[layout.up_name], tensors["down_proj"]
    if not layout.is_transposed:
        up, down = up.T, down.T
    return Matrices(up, down, tensors.get(f"{layout.up_name}_bias"), tensors.get("down_proj_bias"))


class Activation:
    """The gate (or activation) and the post-expert norm of an experts module, without its weights.

    Args:
        experts: A module of any handled layout; the stacks are not kept.
    """

    def __init__(self, experts: nn.Module) -> None:
        layout = read_layout(experts)
        shell = copy.copy(experts)
        shell._parameters = {n: p for n, p in experts._parameters.items() if n not in layout.names}
        self.post_norm: Callable[[Tensor], Tensor] | None = shell.post_expert_norm if layout.has_post_norm else None
        gate = getattr(type(experts), "_apply_gate", None)
        default = gate in (None, _DEFAULT_GATE)
        self.is_swiglu = layout.has_gate and default and "silu" in type(shell.act_fn).__name__.lower()
        if not layout.has_gate:
            self.function: Callable[[Tensor], Tensor] = shell.act_fn
        elif gate is None:
            self.function = lambda projected: _default_gate(shell.act_fn, projected)
        else:
            self.function = shell._apply_gate

    def forward(self, projected: Tensor) -> Tensor:
        """``[n, 2I] -> [n, I]`` (``[n, I]`` without a gate)."""
        if not self.is_swiglu:
            return self.function(projected)
        gate, up = projected.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def backward(self, projected: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Output again, and the function from its gradient to the gradient of ``projected``."""
        if self.is_swiglu:
            gate, up = projected.chunk(2, dim=-1)
            act = F.silu(gate)

            def pull(gradient: Tensor) -> Tensor:
                out = torch.empty_like(projected)
                gate_gradient, up_gradient = out.chunk(2, dim=-1)
                torch.mul(gradient, act, out=up_gradient)
                gate_gradient.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
                return out

            return act * up, pull
        with torch.enable_grad():
            leaf = projected.detach().requires_grad_()
            result = self.function(leaf)
        return result.detach(), lambda gradient: torch.autograd.grad(result, leaf, gradient)[0]


def sort_pairs(slot: Tensor, weight: Tensor, num_slots: int, joins: bool) -> tuple[Tensor, Tensor, list[int]]:
    """(token, slot) pairs sorted by slot, each once.

    Args:
        slot: ``[N, k]`` long, the slot of each choice; -1 leaves it out.
        weight: ``[N, k]`` gate weights.
        num_slots: Number of slots, S.
        joins: Whether two choices of a token may fall on one slot; their weights are then summed.

    Weights come out in at least float32, so that sums over a slot's experts are exact enough.

    Returns:
        ``token [P]``, ``weight [P]`` and the number of pairs of each slot (S of them, adding up to P).
    """
    keep = slot >= 0
    weight = weight.to(wide_dtype(weight.dtype))
    if joins and slot.shape[1] > 1:
        same = slot.unsqueeze(2) == slot.unsqueeze(1)
        weight = (same * weight.unsqueeze(1)).sum(2)
        keep = keep & ~same.tril(-1).any(2)
    key = torch.where(keep, slot, num_slots).flatten()
    order = key.argsort(stable=True)
    counts = torch.bincount(key, minlength=num_slots + 1)[:num_slots].tolist()
    order = order[: sum(counts)]
    return order // slot.shape[1], weight.flatten()[order], counts


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which sums over experts are kept: float32 for 16-bit types."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def dense_choices(scaled: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Choices behind Llama-4's call, ``scaled [E * N, H]``: ``index`` and ``weight`` ``[E * N, 1]``.

    The gate weight is in the rows already, so weights are one; rows that are zero were not chosen: index -1. An expert
    without bias maps zero to zero with a zero gradient, so leaving them out changes nothing.
    """
    index = torch.arange(num_experts, device=scaled.device).repeat_interleave(scaled.shape[0] // num_experts)
    index = torch.where((scaled.detach() != 0).any(1), index, -1)[:, None]
    return index, torch.ones_like(index, dtype=scaled.dtype)


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
        anchor: A tensor that requires a gradient makes ``source.add_gradients`` receive every slot's weight
            gradients (for sources that keep their own).
    """
    names = tuple(stacks or ())
    tensors = [stacks[name] for name in names] if stacks else []
    return _SlotPass.apply(hidden, weight, token, counts, source, activation, names, anchor, *tensors)


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


def _default_gate(function: Callable[[Tensor], Tensor], projected: Tensor) -> Tensor:
    gate, up = projected.chunk(2, dim=-1)
    return function(gate) * up


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _busy(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """(slot, first pair, end) of the slots that have pairs."""
    out, start = [], 0
    for slot, count in enumerate(counts):
        if count:
            out.append((slot, start, start + count))
        start += count
    return out


class _SlotPass(torch.autograd.Function):
    """The pass; see :func:`slot_pass`. Saves the pre-activations and recomputes everything cheap."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token: Tensor,
        counts: Sequence[int],
        source: Source,
        activation: Activation,
        names: tuple[str, ...],
        anchor: Tensor | None,
        *stacks: Tensor,
    ) -> Tensor:
        out = torch.zeros(hidden.shape, device=hidden.device, dtype=wide_dtype(hidden.dtype))
        busy = _busy(counts)
        kept: list[Tensor] = []
        needs_backward = any(ctx.needs_input_grad)
        for position, (slot, start, end) in enumerate(busy):
            matrices = source.matrices(slot, [item[0] for item in busy[position + 1 :]], hidden.dtype)
            rows = token[start:end]
            projected = _linear(hidden.index_select(0, rows), matrices.up, matrices.up_bias)
            result = _linear(activation.forward(projected), matrices.down, matrices.down_bias)
            if activation.post_norm is not None:
                result = activation.post_norm(result)
            out.index_add_(0, rows, (result * weight[start:end, None]).to(out.dtype))
            if needs_backward:
                kept.append(projected)
        ctx.save_for_backward(hidden, weight, token, *kept)
        ctx.counts, ctx.source, ctx.activation, ctx.names = counts, source, activation, names
        ctx.stacks = [(stack.shape, stack.dtype) for stack in stacks]
        return out.to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token, *kept = ctx.saved_tensors
        source, needs = ctx.source, ctx.needs_input_grad
        sink = source
        stacks = {
            name: torch.zeros(shape, dtype=dtype, device=hidden.device)
            for name, (shape, dtype) in zip(ctx.names, ctx.stacks, strict=True)
        }
        if stacks:
            sink = StackSource(source.layout, stacks)
        wants_weights = needs[7] or any(needs[8:])
        wide = wide_dtype(hidden.dtype)
        hidden_gradient = torch.zeros(hidden.shape, device=hidden.device, dtype=wide) if needs[0] else None
        weight_gradient = torch.empty_like(weight) if needs[1] else None
        busy = _busy(ctx.counts)
        for position, (slot, start, end) in enumerate(busy):
            matrices = source.matrices(slot, [item[0] for item in busy[position + 1 :]], hidden.dtype)
            rows, gate = token[start:end], weight[start:end, None]
            incoming = gradient.index_select(0, rows)
            act, pull = ctx.activation.backward(kept[position])
            scaled: Tensor | None = None
            if ctx.activation.post_norm is not None:
                with torch.enable_grad():
                    leaf = _linear(act, matrices.down, matrices.down_bias).detach().requires_grad_()
                    normed = ctx.activation.post_norm(leaf)
                if weight_gradient is not None:
                    weight_gradient[start:end] = (incoming * normed.detach()).sum(1)
                scaled = torch.autograd.grad(normed, leaf, (incoming * gate).to(normed.dtype))[0]
                back = scaled @ matrices.down.T
            else:
                back = incoming @ matrices.down.T
                if weight_gradient is not None:
                    through = (back * act).sum(1, dtype=wide)
                    if matrices.down_bias is not None:
                        through += (incoming * matrices.down_bias).sum(1, dtype=wide)
                    weight_gradient[start:end] = through
                back = (back * gate).to(back.dtype)
            projected_gradient = pull(back)
            if wants_weights:
                if scaled is None:
                    scaled = (incoming * gate).to(incoming.dtype)
                states = hidden.index_select(0, rows)
                sink.add_gradients(slot, _weight_gradients(source.layout, states, projected_gradient, act, scaled))
            if hidden_gradient is not None:
                hidden_gradient.index_add_(0, rows, (projected_gradient @ matrices.up.T).to(wide))
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        return (hidden_gradient, weight_gradient, *[None] * 6, *stacks.values())


def _weight_gradients(
    layout: Layout, states: Tensor, projected_gradient: Tensor, act: Tensor, scaled: Tensor
) -> dict[str, Tensor]:
    """Weight gradients of one slot, by stack name."""
    if layout.is_transposed:
        out = {layout.up_name: states.T @ projected_gradient, "down_proj": act.T @ scaled}
    else:
        out = {layout.up_name: projected_gradient.T @ states, "down_proj": scaled.T @ act}
    if layout.has_bias:
        out[f"{layout.up_name}_bias"] = projected_gradient.sum(0)
        out["down_proj_bias"] = scaled.sum(0)
    return out
