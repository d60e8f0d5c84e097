"""Parameters of a model by kind; its weights may be on the meta device."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from fluxlib.moe import find

KINDS = {
    "embedding": r"embed|lm_head|wte",
    "attention": r"^(?!.*(norm|\.ln_)).*(attn|attention)",
    "norms": r"norm|\.ln_",
    "router": "",
    "shared experts": "",
    "dense mlp": r"mlp|feed_forward|ffn",
    "routed experts": "",
    "other": "",
}
"""Kinds of parameters in the order of the table, and what their names hold outside MoE blocks."""


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model by kind."""

    by_kind: dict[str, int]
    num_experts: int
    """Routed experts over all layers."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.by_kind.values())

    @property
    def per_expert(self) -> int:
        """Parameters of one routed expert."""
        return self.by_kind["routed experts"] // self.num_experts


def count_parameters(model: Any) -> Parameters:
    """Parameters of a model by kind; ValueError as in :func:`fluxlib.moe.find.layers`."""
    found = find.layers(model)
    experts = {f"{layer.name}.{name}" for layer in found for name, _ in layer.experts.named_parameters()}
    blocks = [f"{layer.name.rpartition('.')[0]}." for layer in found]
    tied = getattr(model.config, "tie_word_embeddings", False)
    totals: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if not (tied and name == "lm_head.weight"):
            totals["routed experts" if name in experts else _kind(name, blocks)] += parameter.numel()
    return Parameters({kind: totals[kind] for kind in KINDS if totals[kind]}, sum(m.num_experts for m in found))


def _kind(name: str, blocks: list[str]) -> str:
    """Kind of a parameter outside routed experts, from its name and from the MoE block it may belong to."""
    block = next((block for block in blocks if name.startswith(block)), None)
    if block is not None:
        return "shared experts" if "shared" in name.removeprefix(block) else "router"
    return next((kind for kind, pattern in KINDS.items() if pattern and re.search(pattern, name.lower())), "other")
