"""Dropped experts leave the top-k (FMES).

The router's logits of dropped experts become minus infinity before the model's own rule chooses and weighs, so the
weights of the others are renormalised the way the model does it. Nothing of the router is copied or rewritten: the
one product that makes the logits is intercepted while the router runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .find import MoELayer

ROUTER_NAMES = ("gate", "router")
# Far below any score, yet finite: groups of experts (DeepSeek-V3) are ranked by sums of these.
_NEVER = -1e4


def find_router(layer: MoELayer) -> nn.Module:
    """Router of a layer: the block's child named ``gate`` or ``router``; ValueError: there is none."""
    for name in ROUTER_NAMES:
        if isinstance(router := getattr(layer.block, name, None), nn.Module):
            return router
    children = [name for name, _ in layer.block.named_children()]
    raise ValueError(f"layer {layer.name}: no router among {ROUTER_NAMES}; its block has {children}")


def drop(layer: MoELayer, dropped: Iterable[int]) -> Callable[[], None]:
    """Take experts out of a layer's routing, in place; gives a function that undoes it.

    Raises:
        ValueError: Fewer than k experts would stay, or the router's logits cannot be found.
    """
    experts = sorted(set(dropped))
    stay = layer.num_experts - len(experts)
    if stay < layer.top_k:
        raise ValueError(f"dropped: at least {layer.top_k} experts (top-k) must stay in {layer.name}, {stay} would")
    router = find_router(layer)
    weight = getattr(router, "weight", None)
    if isinstance(weight, Tensor) and weight.shape[0] == layer.num_experts:
        undo: Callable[[], None] = _MaskedForward(router, layer.num_experts, experts).undo
    else:
        linears = [(name, m) for name, m in router.named_modules() if isinstance(m, nn.Linear) and "noise" not in name]
        heads = [module for _, module in linears if module.out_features == layer.num_experts]
        if not heads:
            raise ValueError(f"layer {layer.name}: cannot find the logits in its router, a {type(router).__name__}")
        handle = heads[-1].register_forward_hook(lambda _m, _a, output: _fill(output, experts))
        undo = handle.remove
    try:
        _prove(layer, router, experts)
    except ValueError:
        undo()
        raise
    return undo


class _MaskLinear(TorchFunctionMode):
    """While active, the first linear product with one output per expert has -inf at the dropped ones."""

    def __init__(self, num_experts: int, dropped: list[int]) -> None:
        super().__init__()
        self.num_experts, self.dropped, self.done = num_experts, dropped, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; mask the logits."""
        result = func(*args, **(kwargs or {}))
        if func is F.linear and not self.done and result.shape[-1] == self.num_experts:
            self.done = True
            return _fill(result, self.dropped)
        return result


class _MaskedForward:
    """Runs a router whose own weight makes the logits under :class:`_MaskLinear`.

    Bound methods of an object that holds the router, and no closures: a deep copy of the model has a mask of its own.
    """

    def __init__(self, router: nn.Module, num_experts: int, dropped: list[int]) -> None:
        self.router, self.num_experts, self.dropped = router, num_experts, dropped
        self.override = router.__dict__.get("forward")
        bias = getattr(router, "e_score_correction_bias", None)
        self.kept = None if bias is None else bias.detach()[dropped].clone()
        if bias is not None:
            bias.data[dropped] = _NEVER
        router.forward = self.forward  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The router's own call, without the dropped experts."""
        with _MaskLinear(self.num_experts, self.dropped):
            if self.override is not None:
                return self.override(*args, **kwargs)
            return type(self.router).forward(self.router, *args, **kwargs)

    def undo(self) -> None:
        """Put back the router's own call and its correction."""
        del self.router.__dict__["forward"]
        if self.override is not None:
            self.router.forward = self.override  # type: ignore[method-assign]
        if self.kept is not None:
            bias: Any = self.router.e_score_correction_bias
            bias.data[self.dropped] = self.kept.to(bias)


def _fill(logits: Tensor, dropped: list[int]) -> Tensor:
    index = torch.tensor(dropped, device=logits.device)
    return logits.index_fill(-1, index, float("-inf"))


@torch.no_grad()
def _prove(layer: MoELayer, router: nn.Module, dropped: list[int]) -> None:
    """Run the router on a few tokens and see that no dropped expert receives weight."""
    parameter = next(router.parameters())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4 * layer.num_experts, layer.hidden_size, generator=generator).to(parameter)
    output = router(tokens)
    tensors = [t for t in output if isinstance(t, Tensor)] if isinstance(output, tuple) else [output]
    index = [t for t in tensors if not t.is_floating_point()]
    if index:
        weights = next((t for t in tensors if t.is_floating_point() and t.shape == index[0].shape), None)
        hit = torch.isin(index[0], torch.tensor(dropped, device=index[0].device))
        hit = hit if weights is None else hit & (weights != 0)
    else:
        hit = tensors[0][..., dropped] != 0
    if hit.any():
        raise ValueError(f"layer {layer.name}: its router, a {type(router).__name__}, still chooses dropped experts")
