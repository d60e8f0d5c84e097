"""DeepSeek-MoE for transformers v5: dense first layers, then shared experts plus many small routed ones."""

# No `from __future__ import annotations`: @strict checks the types of fields only where they are no strings.
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fluxlib.models.decoder import MoeBlock, MoeForCausalLM, OriginalRope, check_fields, of_width

# Another value changes the mathematics of the block, so it is refused.
SUPPORTED = {"scoring_func": ("softmax",), "mlp_bias": (False,)}


@strict
class DeepseekMoeConfig(OriginalRope, LlamaConfig):
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
    aux_loss_alpha: float | int = 0.001
    seq_aux: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_fields("DeepSeek-MoE", self, ("num_experts_per_tok", "n_routed_experts"), SUPPORTED)
        if self.moe_layer_freq < 1:
            raise ValueError(f"DeepSeek-MoE: moe_layer_freq must be at least 1, got {self.moe_layer_freq}")


class DeepseekMoeGate(nn.Module):
    """Top-k router: softmax over all experts first, then the k largest, by default not renormalised.

    Returns ``(logits [N, E], top_k_weights [N, k], top_k_index [N, k])``.
    """

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.scale = float(config.routed_scaling_factor)
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def initialize(self, std: float) -> None:
        """Weights as those of any other matrix."""
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route ``hidden_states`` [N, H]."""
        logits = nn.functional.linear(hidden_states, self.weight)
        # In the logits' type, as the original: among probabilities that are equal in 16 bit topk decides.
        weights, top_k_index = torch.topk(logits.softmax(dim=-1), self.top_k, dim=-1)
        if self.norm_topk_prob and self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, (weights * self.scale).to(logits.dtype), top_k_index


def build_block(config: DeepseekMoeConfig, layer_idx: int) -> nn.Module:
    """Dense or mixture, as the config says."""
    if layer_idx < config.first_k_dense_replace or layer_idx % config.moe_layer_freq:
        return LlamaMLP(config)
    gate, width, num_shared = DeepseekMoeGate(config), config.moe_intermediate_size, config.n_shared_experts
    shared = of_width(LlamaMLP, config, num_shared * width) if num_shared else None
    return MoeBlock(gate, of_width(MixtralExperts, config, width), shared)


class DeepseekMoeForCausalLM(MoeForCausalLM):
    """DeepSeek-MoE with its language-model head."""

    config_class = DeepseekMoeConfig
    build_block = staticmethod(build_block)
