"""What one expert is made of: two matrices, and the model's own gate between them with its derivative."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import moe as _integration

from .find import Layout, read_layout

_DEFAULT_GATE = getattr(_integration, "_default_apply_gate", None)


@dataclass(frozen=True)
class Matrices:
    """Weights of one slot in computing order: ``x @ up [H, 2I] + up_bias``, gate, ``@ down [I, H] + down_bias``.

    Those of a stack of S slots have a first dimension S.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def to_matrices(tensors: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Matrices:
    """An expert's tensors, or stacks of them, in computing order."""
    tensors = {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
    up, down = tensors[layout.up_name], tensors["down_proj"]
    if not layout.is_transposed:
        up, down = up.mT, down.mT
    return Matrices(up, down, tensors.get(f"{layout.up_name}_bias"), tensors.get("down_proj_bias"))


class Activation:
    """The gate (or activation) and the post-expert norm of an experts module of any layout, without its weights."""

    def __init__(self, experts: nn.Module) -> None:
        layout = read_layout(experts)
        shell: Any = copy.copy(experts)
        shell._parameters = {n: p for n, p in experts._parameters.items() if n not in layout.names}
        # A copy: the original may wait on another device.
        self.post_norm: nn.Module | None = None
        if layout.has_post_norm:
            self.post_norm = copy.deepcopy(shell.post_expert_norm).requires_grad_(False)
        gate = getattr(type(experts), "_apply_gate", None)
        is_default = gate in (None, _DEFAULT_GATE)
        self.is_swiglu = layout.has_gate and is_default and "silu" in type(shell.act_fn).__name__.lower()
        if not layout.has_gate:
            self.function: Callable[[Tensor], Tensor] = shell.act_fn
        else:
            self.function = functools.partial(_gated, shell.act_fn) if gate is None else shell._apply_gate

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
        assert self.post_norm is not None
        with torch.enable_grad():
            leaf = result.detach().requires_grad_()
            normed = self.post_norm(leaf)
        return normed.detach(), torch.autograd.grad(normed, leaf, gradient.to(normed.dtype))[0]


def _gated(function: Callable[[Tensor], Tensor], projected: Tensor) -> Tensor:
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
