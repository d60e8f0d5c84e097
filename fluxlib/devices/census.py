"""Parameters of a model by kind and layer, from its configuration alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fluxlib.devices import dry_run
from fluxlib.moe import find

KINDS = ("embedding", "attention", "norms", "router", "shared experts", "dense mlp", "routed experts", "other")


@dataclass(frozen=True)
class LayerCensus:
    """Parameters of one decoder layer by kind; ``num_experts`` and ``top_k`` are 0 for a dense one."""

    index: int
    num_experts: int
    top_k: int
    parameters: dict[str, int]


@dataclass(frozen=True)
class Census:
    """Parameters of a model by kind, and layer by layer."""

    parameters: dict[str, int]
    layers: tuple[LayerCensus, ...]
    num_experts: int
    """Routed experts over all layers."""
    expert_parameters: int
    """Parameters of one routed expert."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return sum(layer.num_experts > 0 for layer in self.layers)


def census(config: Any) -> Census:
    """Count a model's parameters by kind on the meta device.

    Raises:
        ValueError: a dense model, or experts of a form that is not handled (see :func:`fluxlib.moe.find.layers`).
    """
    return census_of(dry_run.meta_model(config, torch.bfloat16))


def census_of(model: Any) -> Census:
    """Count the parameters of a model in memory (or on the meta device) by kind."""
    found = find.layers(model)
    experts = {f"{layer.name}.{name}" for layer in found for name, _ in layer.experts.named_parameters()}
    blocks = {layer.name.rpartition(".")[0]: layer for layer in found}
    tied = getattr(model.config, "tie_word_embeddings", False)
    totals: Counter[str] = Counter()
    by_layer: dict[int, Counter[str]] = {}
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        kind = "routed experts" if name in experts else _kind(name, blocks)
        totals[kind] += parameter.numel()
        if match := re.search(r"\.layers\.(\d+)\.", name):
            by_layer.setdefault(int(match[1]), Counter())[kind] += parameter.numel()
    moe = {int(re.search(r"\.layers\.(\d+)\.", layer.name)[1]): layer for layer in found}  # type: ignore[index]
    num_experts = sum(layer.num_experts for layer in found)
    return Census(
        parameters={kind: totals[kind] for kind in KINDS if totals[kind]},
        layers=tuple(
            LayerCensus(i, moe[i].num_experts if i in moe else 0, moe[i].top_k if i in moe else 0, dict(by_layer[i]))
            for i in sorted(by_layer)
        ),
        num_experts=num_experts,
        expert_parameters=totals["routed experts"] // num_experts,
    )


def _kind(name: str, blocks: dict[str, Any]) -> str:
    """Kind of a parameter outside routed experts, from its name and from the MoE block it may belong to."""
    block = next((block for block in blocks if name.startswith(f"{block}.")), None)
    if block is not None:
        return "shared experts" if "shared" in name.removeprefix(block) else "router"
    tests: list[tuple[str, Callable[[str], Any]]] = [
        ("embedding", lambda n: re.search(r"embed|lm_head|wte", n)),
        ("norms", lambda n: re.search(r"norm|\.ln_", n)),
        ("attention", lambda n: re.search(r"attn|attention", n)),
        ("dense mlp", lambda n: re.search(r"mlp|feed_forward|ffn", n)),
    ]
    return next((kind for kind, matches in tests if matches(name.lower())), "other")
