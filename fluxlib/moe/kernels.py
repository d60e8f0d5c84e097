"""What the passes of tokens through experts are made of.

- :class:`Matrices`, :class:`Source` -- one expert's weights in computing order, and where they come from,
- :class:`StackSource` -- slots that live in stacks ``[S, ...]``; quantized and offloaded experts bring their own,
- :class:`Activation` -- the model's own gate, with its derivative,
- :func:`sort_pairs` -- (token, slot) pairs, duplicates joined, sorted by slot,
- :func:`dense_choices` -- the choices behind Llama-4's call.

The passes themselves are in :mod:`fluxlib.moe.passes`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import moe as _integration

from .find import ReplacedExperts
from .layout import Layout, read_layout

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

    def end_backward(self) -> None:
        """Called once all gradients of a pass were handed over."""
        ...


class StackSource:
    """Slots in stacks ``[S, ...]`` named as in the layout; for gradients, stacks that they are written into."""

    def __init__(self, layout: Layout, stacks: Mapping[str, Tensor]) -> None:
        self.layout = layout
        self.stacks = stacks

    def matrices(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Matrices:
        """Views of one slot (a copy only where the stack has another dtype)."""
        return to_matrices({name: stack[slot] for name, stack in self.stacks.items()}, self.layout, dtype)

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        """Write one slot's gradients into the stacks."""
        for name, gradient in gradients.items():
            self.stacks[name][slot].copy_(gradient)

    def end_backward(self) -> None:
        """Nothing is left to do."""


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
        shell: Any = copy.copy(experts)
        shell._parameters = {n: p for n, p in experts._parameters.items() if n not in layout.names}
        # A copy: the original may wait on another device.
        self.post_norm: nn.Module | None = None
        if layout.has_post_norm:
            self.post_norm = copy.deepcopy(shell.post_expert_norm).requires_grad_(False)
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
        """``[n, 2I] -> [n, I]`` (``[n, I] -> [n, I]`` without a gate); not recorded by autograd."""
        if not self.is_swiglu:
            return self.function(projected)
        gate, up = projected.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def backward(self, projected: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The output again, and the function from its gradient to the gradient of ``projected``."""
        if self.is_swiglu:
            return _swiglu_backward(projected)
        with torch.enable_grad():
            leaf = projected.detach().requires_grad_()
            result = self.function(leaf)
        return result.detach(), lambda gradient: torch.autograd.grad(result, leaf, gradient)[0]

    def norm_backward(self, result: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The post-expert norm of ``result``, and the gradient of ``result`` from the norm's (both ``[n, H]``)."""
        if self.post_norm is None:
            return result, gradient
        with torch.enable_grad():
            leaf = result.detach().requires_grad_()
            normed = self.post_norm(leaf)
        return normed.detach(), torch.autograd.grad(normed, leaf, gradient.to(normed.dtype))[0]


def sort_pairs(slot: Tensor, weight: Tensor, num_slots: int, joins: bool) -> tuple[Tensor, Tensor, list[int]]:
    """(token, slot) pairs sorted by slot, each once.

    Weights come out in at least float32, so that sums over a slot's experts are exact enough.

    Args:
        slot: ``[N, k]`` long, the slot of each choice; -1 leaves it out.
        weight: ``[N, k]`` gate weights.
        num_slots: Number of slots, S.
        joins: Whether two choices of a token may fall on one slot; their weights are then summed.

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
    # The one point where the host waits for the device.
    counts = torch.bincount(key, minlength=num_slots + 1)[:num_slots].tolist()
    order = order[: sum(counts)]
    return order // slot.shape[1], weight.flatten()[order], counts


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


def without_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A Function's backward pass in the types of its forward pass, wherever it is called."""

    @functools.wraps(backward)
    def run(ctx: Any, gradient: Tensor) -> Any:
        with own_types(gradient):
            return backward(ctx, gradient)

    return run


def choices(
    experts: ReplacedExperts, hidden: Tensor, top_k_index: Tensor | None, top_k_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Index (-1: none) and weight of every choice of a call, the weight in at least the hidden states' type."""
    if top_k_index is None or top_k_weights is None:
        return dense_choices(hidden, experts.num_experts)
    return top_k_index, top_k_weights.to(torch.promote_types(top_k_weights.dtype, hidden.dtype))


def dense_choices(scaled: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Choices behind Llama-4's call, ``scaled [E * N, H]``: ``index`` and ``weight`` ``[E * N, 1]``.

    The gate weight is in the rows already, so weights are one; rows that are zero were not chosen: index -1. An expert
    without bias maps zero to zero with a zero gradient, so leaving them out changes nothing.
    """
    index = torch.arange(num_experts, device=scaled.device).repeat_interleave(scaled.shape[0] // num_experts)
    index = torch.where((scaled.detach() != 0).any(1), index, -1)[:, None]
    return index, torch.ones_like(index, dtype=scaled.dtype)


def _default_gate(function: Callable[[Tensor], Tensor], projected: Tensor) -> Tensor:
    gate, up = projected.chunk(2, dim=-1)
    return function(gate) * up


def _swiglu_backward(projected: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    gate, up = projected.chunk(2, dim=-1)
    act = F.silu(gate)

    def pull(gradient: Tensor) -> Tensor:
        out = torch.empty_like(projected)
        gate_gradient, up_gradient = out.chunk(2, dim=-1)
        torch.mul(gradient, act, out=up_gradient)
        torch.ops.aten.silu_backward(gradient * up, gate, grad_input=gate_gradient)
        return out

    return act * up, pull
