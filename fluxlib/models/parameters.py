"""Parameters of a model by kind, and layer by layer; its weights may be on the meta device."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from fluxlib.moe import find


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one decoder layer by kind; ``num_experts`` and ``top_k`` are 0 for a dense one."""

    index: int
    num_experts: int
    top_k: int
    parameters: dict[str, int]


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model by kind, and layer by layer."""

    by_kind: dict[str, int]
    layers: tuple[LayerParameters, ...]
    num_experts: int
    """Routed experts over all layers."""
    per_expert: int
    """Parameters of one routed expert."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.by_kind.values())


KINDS = {
    "embedding": r"embed|lm_head|wte",
    "attention": r"attn|attention",
    "norms": r"norm|\.ln_",
    "router": "",
    "shared experts": "",
    "dense mlp": r"mlp|feed_forward|ffn",
    "routed experts": "",
    "other": "",
}
"""Kinds of parameters in the order of the table, and what their names hold outside MoE blocks."""


def count_parameters(model: Any) -> Parameters:
    """Parameters of a model by kind; its weights may be on the meta device.

    Raises:
        ValueError: a dense model, or experts of a form that is not handled (see :func:`fluxlib.moe.find.layers`).
    """
    found = find.layers(model)
    experts = {f"{layer.name}.{name}" for layer in found for name, _ in layer.experts.named_parameters()}
    blocks = [f"{layer.name.rpartition('.')[0]}." for layer in found]
    tied = getattr(model.config, "tie_word_embeddings", False)
    totals: Counter[str] = Counter()
    by_layer: dict[int, Counter[str]] = {}
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        kind = "routed experts" if name in experts else _kind(name, blocks)
        totals[kind] += parameter.numel()
        by_layer.setdefault(layer_number(name), Counter())[kind] += parameter.numel()
    by_layer.pop(-1, None)
    sizes = {layer_number(layer.name): (layer.num_experts, layer.top_k) for layer in found}
    num_experts = sum(layer.num_experts for layer in found)
    return Parameters(
        {kind: totals[kind] for kind in KINDS if totals[kind]},
        tuple(LayerParameters(i, *sizes.get(i, (0, 0)), dict(by_layer[i])) for i in sorted(by_layer)),
        num_experts,
        totals["routed experts"] // num_experts,
    )


def _kind(name: str, blocks: list[str]) -> str:
    """Kind of a parameter outside routed experts, from its name and from the MoE block it may belong to."""
    block = next((block for block in blocks if name.startswith(block)), None)
    if block is not None:
        return "shared experts" if "shared" in name.removeprefix(block) else "router"
    tests = ((kind, KINDS[kind]) for kind in ("embedding", "norms", "attention", "dense mlp"))
    return next((kind for kind, pattern in tests if re.search(pattern, name.lower())), "other")


def layer_number(name: str) -> int:
    """Number of the decoder layer (dense ones count) that a module or parameter belongs to by its ``name``; or -1."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1
