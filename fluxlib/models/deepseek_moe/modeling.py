"""DeepSeek-MoE for transformers v5: dense first layers, then shared experts plus many small routed ones."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.utils.output_capturing import OutputRecorder

from fluxlib.models.decoder import GatedExperts, MoeDecoderLayer, MoeForCausalLM, MoeModel, MoePreTrainedModel
from fluxlib.models.deepseek_moe.configuration import DeepseekMoeConfig


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
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "router_logits": OutputRecorder(DeepseekMoeGate, index=0),
        "hidden_states": MoeDecoderLayer,
        "attentions": LlamaAttention,
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
