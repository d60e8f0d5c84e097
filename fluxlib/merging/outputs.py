"""Experts compared by what they do to the participant's own tokens, not by their weights (beyond the paper).

Two experts may hold different weights and answer alike on the tokens at hand (HC-SMoE, arXiv 2410.08589). The scalar
products of their outputs stand in for those of their weights in :func:`fluxlib.merging.plan` (``grams``).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fluxlib.moe import find
from fluxlib.moe.capture import capture


@torch.no_grad()
def output_grams(model: nn.Module, batches: Iterable[dict[str, Tensor]], max_tokens: int = 256) -> list[Tensor]:
    """Scalar products ``[E, E]`` of the experts' outputs on local tokens, per MoE layer.

    Every expert is given the same tokens, evenly spaced among those of the batches, as its layer receives them.

    Args:
        model: with its own experts; only read.
        batches: ``input_ids`` and ``attention_mask`` ``[B, T]``.
        max_tokens: tokens per layer. Memory: ``E * max_tokens * H`` values of one layer at a time.

    Raises:
        ValueError: no token in any batch; experts that choose their tokens themselves (Llama-4).
    """
    found = find.layers(model)
    body = getattr(model, "base_model", model)
    kept: list[list[Tensor]] = [[] for _ in found]
    training = model.training
    model.eval()
    try:
        with capture(body, inputs=True) as seen:
            for batch in batches:
                body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
                mask = batch["attention_mask"].bool().flatten()
                for rows, layer in zip(kept, seen.layers, strict=True):
                    rows.append(layer.inputs[-1][mask.to(layer.inputs[-1].device)])
                seen.clear()
        tokens = [torch.cat(rows) if rows else torch.empty(0, 1) for rows in kept]
        if not len(tokens[0]):
            raise ValueError("batches must hold at least one token, got none")
        return [_gram(layer, _spaced(rows, max_tokens)) for layer, rows in zip(found, tokens, strict=True)]
    finally:
        model.train(training)


def _gram(layer: find.MoELayer, tokens: Tensor) -> Tensor:
    if find.read_layout(layer.experts).is_dense:
        raise ValueError(f"model: experts of {layer.name} cannot be given chosen tokens one by one")
    one = tokens.new_ones(len(tokens), 1)
    index = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
    outputs = [layer.experts(tokens, index + expert, one).float().flatten() for expert in range(layer.num_experts)]
    stacked = torch.stack(outputs)
    return stacked @ stacked.T


def _spaced(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()]
