"""DeepSeek-MoE for transformers v5: dense first layers, then shared experts plus many small routed ones."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils.output_capturing import OutputRecorder

from fluxlib.models.decoder import (
    GatedExperts,
    MoeForCausalLM,
    MoeModel,
    MoePreTrainedModel,
    check_fields,
)


@strict
class DeepseekMoeConfig(LlamaConfig):
    """LLaMA whose MLP is, from layer ``first_k_dense_replace`` on, shared experts plus routed ones.

    Attributes:
        n_routed_experts: routed experts per layer (E); ``num_experts`` is the same number.
        n_shared_experts: experts that every token passes, built as one MLP; None or 0 for none.
        num_experts_per_tok: routed experts per token (k).
        moe_intermediate_size: width of one expert (I).
        moe_layer_freq: of the layers that may be mixtures, those whose index is a multiple of it are.
        norm_topk_prob: renormalise the k kept probabilities to sum 1.
        routed_scaling_factor: factor on the routed experts' output.

    The auxiliary loss's fields are kept as they came and play no part here.

    Raises:
        ValueError: for a field whose value this implementation does not compute, by name.
    """

    model_type = "deepseek"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
    }
    base_model_tp_plan = None
    base_model_pp_plan = None

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    moe_intermediate_size: int = 1408
    n_routed_experts: int = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    routed_scaling_factor: float | int = 1.0
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_fields("DeepSeek-MoE", self, "n_routed_experts", "num_experts_per_tok", "moe_layer_freq")
        if self.scoring_func != "softmax":
            raise ValueError(f"DeepSeek-MoE: scoring_func must be 'softmax', got {self.scoring_func!r}")
        for name in ("attention_bias", "mlp_bias"):
            if getattr(self, name):
                raise ValueError(f"DeepSeek-MoE: {name} must be False, got {getattr(self, name)!r}")
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                "DeepSeek-MoE: num_experts_per_tok must lie in"
                f" 1..n_routed_experts={self.n_routed_experts}, got {self.num_experts_per_tok}"
            )
        if self.moe_layer_freq < 1:
            raise ValueError(f"DeepSeek-MoE: moe_layer_freq must be at least 1, got {self.moe_layer_freq}")

    @property
    def expert_size(self) -> int:
        """Width of one routed expert's intermediate layer (I)."""
        return self.moe_intermediate_size

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer ``layer_idx`` is a mixture; the others are dense."""
        return layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0


class DeepseekMoeGate(nn.Module):
    """Top-k router: softmax over all experts first, then the k largest, by default not renormalised.

    Returns ``(logits [N, E], top_k_weights [N, k], top_k_index [N, k])``.
    """

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.hidden_dim = config.hidden_size
        self.num_experts = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.scale = float(config.routed_scaling_factor)
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route ``hidden_states`` [N, H]."""
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        probabilities = nn.functional.softmax(logits, dim=-1, dtype=torch.float32)
        weights, top_k_index = torch.topk(probabilities, self.top_k, dim=-1)
        if self.norm_topk_prob and self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, (weights * self.scale).to(logits.dtype), top_k_index


def mlp_of_width(config: DeepseekMoeConfig, width: int) -> LlamaMLP:
    """Return LLaMA's gated MLP with ``width`` instead of the config's ``intermediate_size``."""
    narrowed = copy.copy(config)
    narrowed.intermediate_size = width
    mlp = LlamaMLP(narrowed)
    mlp.config = config
    return mlp


class DeepseekMoeBlock(nn.Module):
    """Router, routed experts and shared experts of one layer, [B, T, H] to [B, T, H]."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.gate = DeepseekMoeGate(config)
        self.experts = GatedExperts(config, config.n_routed_experts, config.moe_intermediate_size)
        if config.n_shared_experts:
            self.shared_experts = mlp_of_width(config, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sum over each token's experts of weight times output, plus the shared experts' output."""
        shape = hidden_states.shape
        flat = hidden_states.reshape(-1, shape[-1])
        _, top_k_weights, top_k_index = self.gate(flat)
        output = self.experts(flat, top_k_index, top_k_weights).reshape(shape)
        return output + self.shared_experts(hidden_states) if hasattr(self, "shared_experts") else output


class DeepseekMoePreTrainedModel(MoePreTrainedModel):
    """DeepSeek-MoE's blocks in the shared decoder."""

    config: DeepseekMoeConfig
    config_class = DeepseekMoeConfig
    _can_record_outputs: ClassVar[dict[str, Any]] = MoePreTrainedModel._can_record_outputs | {
        "router_logits": OutputRecorder(DeepseekMoeGate, index=0),
    }

    @classmethod
    def build_block(cls, config: DeepseekMoeConfig, layer_idx: int) -> nn.Module:
        """Dense or mixture, as the config says."""
        return DeepseekMoeBlock(config) if config.is_moe_layer(layer_idx) else LlamaMLP(config)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekMoeGate):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class DeepseekMoeModel(DeepseekMoePreTrainedModel, MoeModel):
    """DeepSeek-MoE without a head."""


class DeepseekMoeForCausalLM(DeepseekMoePreTrainedModel, MoeForCausalLM):
    """DeepSeek-MoE with its language-model head."""

    model_class = DeepseekMoeModel
