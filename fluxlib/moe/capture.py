"""What a model routed where, and how much attention each token received.

Hooks only, all removed afterwards. Attention weights exist for one layer at a time: a hook reduces them to one number
per token as soon as the attention module returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import find
from .find import MoELayer
from .mask import find_router

ATTENTION_NAMES = ("self_attn", "attention", "attn")


@dataclass
class LayerCapture:
    """What one MoE layer saw: one entry per forward pass.

    Attributes:
        top_k_index: ``[N, k]`` long, the experts chosen; N = B * T in row-major order, padding included.
        top_k_weights: ``[N, k]`` gate weights.
        attention: ``[B, T]`` float32, attention received; empty unless asked for. 0 at padding.
    """

    top_k_index: list[Tensor] = field(default_factory=list)
    top_k_weights: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)


@dataclass
class Capture:
    """One :class:`LayerCapture` per MoE layer, first to last."""

    layers: list[LayerCapture]

    def clear(self) -> None:
        """Forget everything collected so far; call it between batches to keep memory flat."""
        for part in (part for layer in self.layers for part in vars(layer).values()):
            part.clear()


@contextmanager
def capture(model: nn.Module, attention: bool = False) -> Iterator[Capture]:
    """Record the routing of every MoE layer while the context is open.

    Attention received by a token: the mean over heads and over the queries that can see it (itself and later ones,
    within the layer's window; padding is neither a query nor a token) of the weight they give it. Section 5.3. The
    model runs with eager attention meanwhile.

    Raises:
        ValueError: The model has no MoE layer, or a layer's attention module cannot be found.
    """
    found = find.layers(model)
    seen = Capture([LayerCapture() for _ in found])
    with ExitStack() as stack:
        for layer, record in zip(found, seen.layers, strict=True):
            stack.enter_context(_watch_experts(layer, record))
        if attention:
            modules = [find_attention(model, layer) for layer in found]
            of_model: Any = model
            stack.callback(of_model.set_attn_implementation, of_model.config._attn_implementation)
            of_model.set_attn_implementation("eager")
            tokens: list[Tensor] = []
            stack.enter_context(model.register_forward_pre_hook(_keep_mask(tokens), with_kwargs=True))
            for module, record in zip(modules, seen.layers, strict=True):
                stack.enter_context(_watch_attention(module, record, tokens))
        yield seen


def find_attention(model: nn.Module, layer: MoELayer) -> nn.Module:
    """Attention module of the decoder layer that a MoE layer belongs to; ValueError: none under a known name."""
    stack, place = find.decoder_layers(model, layer)
    for name in ATTENTION_NAMES:
        if isinstance(module := getattr(stack[place], name, None), nn.Module):
            return module
    raise ValueError(f"layer {layer.name}: found no attention module named one of {ATTENTION_NAMES} above it")


def received(weights: Tensor, visible: Tensor) -> Tensor:
    """Attention received per token, ``[B, T]`` float32.

    Args:
        weights: ``[B, heads, Q, T]`` attention weights.
        visible: ``[B, Q, T]`` bool, whether a query (a token, not padding) can see a key (likewise).
    """
    total = torch.einsum("bhqt,bqt->bt", weights.float(), visible.float()) / weights.shape[1]
    return total / visible.sum(1).clamp(min=1)


def _keep_mask(tokens: list[Tensor]) -> Any:
    """Hook that keeps which of a pass are tokens and no padding, bool ``[B, T]``."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Any = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        mask = kwargs.get("attention_mask")
        tokens[:] = [torch.ones(ids.shape[:2], device=ids.device).bool() if mask is None else mask.bool()]

    return hook


def _watch_experts(layer: MoELayer, record: LayerCapture) -> Any:
    """Hook that records what an experts module is called with; Llama-4's choices are read from its router's scores."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index, weights = sorted([*args, *kwargs.values()][1:3], key=torch.is_floating_point)
        record.top_k_index.append(index.detach())
        record.top_k_weights.append(weights.detach())

    def scores(_module: nn.Module, _args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weights, index = output[0].detach().topk(layer.top_k, dim=-1)
        record.top_k_index.append(index)
        record.top_k_weights.append(weights)

    if find.read_layout(layer.experts).is_dense:
        return find_router(layer).register_forward_hook(scores)
    return layer.experts.register_forward_pre_hook(before, with_kwargs=True)


def _watch_attention(module: nn.Module, record: LayerCapture, tokens: list[Tensor]) -> Any:
    """Hook on one attention module: its weights are reduced and let go."""

    def after(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        mask = kwargs.get("attention_mask")
        weights = next((o for o in output if isinstance(o, Tensor) and o.dim() == 4), None)
        # A layer of linear attention gives its state, and is given a mask of two dimensions.
        if weights is None or (mask is not None and mask.dim() != 4):
            raise ValueError(f"model: {type(_module).__name__} returns no attention weights with eager attention")
        record.attention.append(received(weights.detach(), _visible(mask, tokens[0].to(weights.device), weights)))
        return tuple(None if o is weights else o for o in output)

    return module.register_forward_hook(after, with_kwargs=True)


def _visible(mask: Tensor | None, token: Tensor, weights: Tensor) -> Tensor:
    """``[B, Q, T]`` bool: which queries can see which keys, padding excluded on both sides."""
    batch, _, queries, keys = weights.shape
    if mask is None:
        visible = torch.ones(queries, keys, dtype=torch.bool, device=weights.device).tril(keys - queries)[None]
    else:
        visible = mask[:, 0, :, :keys] if mask.dtype == torch.bool else mask[:, 0, :, :keys] == 0
    token = token[:, -keys:]
    return visible.expand(batch, queries, keys) & token[:, None, :] & token[:, -queries:, None]
