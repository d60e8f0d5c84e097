"""What the device clock needs to know of a model: how many parameters, and where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import PreTrainedModel

from fluxlib import models
from fluxlib.devices.dry_run import meta_model
from fluxlib.models.parameters import count_parameters
from fluxlib.moe import find
from fluxlib.moe.adapter import sides


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model. Parameters are counts, per expert or over the whole model."""

    num_layers: int
    num_experts: int
    """Routed experts over all layers."""
    top_k_sum: int
    """Routed experts that one token passes through, over all layers."""
    hidden_size: int
    expert_parameters: int
    """Parameters of one routed expert."""
    other_parameters: int
    """All parameters outside routed experts."""
    embedding_parameters: int
    """Those of the input embedding, which is looked up, not multiplied (0 when it is also the output head)."""
    expert_sides: tuple[int, int] = (0, 0)
    """:func:`fluxlib.moe.adapter.sides`."""

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.other_parameters + self.num_experts * self.expert_parameters

    def learned_parameters(self, rank: int) -> int:
        """Parameters of one routed expert that are tuned and travel: all, or B of an adapter."""
        return rank * self.expert_sides[1] or self.expert_parameters

    def dense_flops(self, tokens: float, tokens_per_sample: float) -> float:
        """Forward FLOPs outside routed experts: matrices, and causal attention over half of the positions."""
        matrices = 2.0 * (self.other_parameters - self.embedding_parameters)
        return tokens * (matrices + 2.0 * tokens_per_sample * self.hidden_size * self.num_layers)

    def expert_flops(self, tokens: float) -> float:
        """Forward FLOPs of the routed experts."""
        return tokens * 2.0 * self.top_k_sum * self.expert_parameters


@lru_cache(maxsize=8)
def shapes(name: str) -> Shapes:
    """Shapes of a model by name (see :func:`fluxlib.models.known`), from its configuration alone."""
    return shapes_of(meta_model(models.config(name), torch.float32))


def shapes_of(model: PreTrainedModel) -> Shapes:
    """Shapes of a model in memory; its weights may be on the meta device."""
    moe, counted = find.layers(model), count_parameters(model)
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return Shapes(
        num_layers=model.config.num_hidden_layers,
        num_experts=counted.num_experts,
        top_k_sum=sum(layer.top_k for layer in moe),
        hidden_size=moe[0].hidden_size,
        expert_parameters=counted.per_expert,
        other_parameters=counted.total - counted.by_kind["routed experts"],
        embedding_parameters=0 if tied else embedding.numel(),
        expert_sides=sides(moe[0].experts),
    )
