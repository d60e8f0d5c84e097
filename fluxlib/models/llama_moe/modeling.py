"""LLaMA-MoE v1 for transformers v5: a LLaMA whose MLP is a mixture of slices of itself.

Paper: the router of LLaMA-MoE adds Gaussian noise to its logits in training.
Deviation: there is no noise here, in training or evaluation: the router is frozen, and participants must
route a token as the server does.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils.output_capturing import OutputRecorder

from fluxlib.models.decoder import GatedExperts, MoeDecoderLayer, MoeForCausalLM, MoeModel, MoePreTrainedModel
from fluxlib.models.llama_moe.configuration import LlamaMoeConfig


class GateNoise(nn.Linear):
    """Width of the noise of the original training: part of the public checkpoints, never computed with."""


class LlamaMoeGate(nn.Module):
    """Top-k router: the softmax is taken over the k kept logits only.

    Returns ``(logits [N, E], top_k_weights [N, k], top_k_index [N, k])``; the weights hold the layer's scale
    factor.
    """

    def __init__(self, config: LlamaMoeConfig, layer_idx: int) -> None:
        super().__init__()
        hidden_size, num_experts = config.hidden_size, config.num_experts
        self.hidden_dim = hidden_size
        self.num_experts = num_experts
        self.top_k = config.num_selects
        self.score_scale = config.score_scale(layer_idx)
        first = nn.Linear(hidden_size, num_experts, bias=False)
        if config.gate_network == "linear":
            self.gate_network: nn.Module = first
        else:
            second = nn.Linear(num_experts, num_experts, bias=False)
            self.gate_network = nn.Sequential(first, nn.Tanh(), second)
        if config.gate_add_noise:
            # Kept so that an export is complete.
            self.weight_noise = GateNoise(hidden_size, num_experts, bias=False).requires_grad_(False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route ``hidden_states`` [N, H]."""
        logits = self.gate_network(hidden_states.reshape(-1, self.hidden_dim))
        top_k_logits, top_k_index = torch.topk(logits, self.top_k, dim=-1)
        weights = nn.functional.softmax(top_k_logits, dim=-1, dtype=torch.float32).to(logits.dtype)
        return logits, weights * self.score_scale, top_k_index


class LlamaMoeBlock(nn.Module):
    """Router and experts of one layer, [B, T, H] to [B, T, H]."""

    def __init__(self, config: LlamaMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate = LlamaMoeGate(config, layer_idx)
        self.experts = GatedExperts(config, config.num_experts, config.expert_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sum over each token's experts of weight times output."""
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])
        _, top_k_weights, top_k_index = self.gate(hidden_states)
        return self.experts(hidden_states, top_k_index, top_k_weights).reshape(shape)


class LlamaMoePreTrainedModel(MoePreTrainedModel):
    """LLaMA-MoE's block in the shared decoder."""

    config: LlamaMoeConfig
    config_class = LlamaMoeConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "router_logits": OutputRecorder(LlamaMoeGate, index=0),
        "hidden_states": MoeDecoderLayer,
        "attentions": LlamaAttention,
    }

    @classmethod
    def build_block(cls, config: LlamaMoeConfig, layer_idx: int) -> nn.Module:
        """Every layer is a mixture."""
        return LlamaMoeBlock(config, layer_idx)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, GateNoise):
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)


class LlamaMoeModel(LlamaMoePreTrainedModel, MoeModel):
    """LLaMA-MoE without a head."""


class LlamaMoeForCausalLM(LlamaMoePreTrainedModel, MoeForCausalLM):
    """LLaMA-MoE with its language-model head."""

    model_class = LlamaMoeModel
