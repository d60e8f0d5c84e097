"""LLaMA-MoE v1 for transformers v5: a LLaMA whose MLP is a mixture of slices of itself.

Paper: the router of LLaMA-MoE adds Gaussian noise to its logits in training.
Deviation: there is no noise here, in training or evaluation: the router is frozen, and participants must route a token
as the server does.
"""

# No `from __future__ import annotations`: @strict checks the types of fields only where they are no strings.
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fluxlib.models.decoder import MoeBlock, MoeForCausalLM, OriginalRope, check_fields, of_width

# What the released checkpoints hold. Another value changes the mathematics of the block, so it is refused.
SUPPORTED = {
    "gate_type": ("TopKBalancedNoisyGate",),
    "gate_network": ("mlp", "linear"),
    "gate_use_softmax": (True,),
    "calculator_type": ("UniversalCalculator",),
    "multiply_gate_scores": (True,),
    "add_weight_norm": (False,),
    "mlp_bias": (False,),
}


@strict
class LlamaMoeConfig(OriginalRope, LlamaConfig):
    """LLaMA whose MLP is cut into ``num_experts`` experts, ``num_selects`` of them computed per token.

    Attributes:
        num_experts: experts per layer (E).
        num_selects: experts per token (k); ``num_experts_per_tok`` is the same number.
        size_experts: width of each expert, one list per layer; None means
            ``intermediate_size / num_experts``.
        gate_network: ``mlp`` (linear, tanh, linear) or ``linear``.
        gate_add_noise: the checkpoint holds ``weight_noise`` of the noisy training; it is kept and never
            used.
        score_scale_factor: the experts' output is multiplied by it; a number, or a list with one per layer.

    The balance loss, noise and capacity fields are kept as they came and play no part here. A field that is left out
    has the original's default, which need not be what the released models use.

    Raises:
        ValueError: for a field whose value this implementation does not compute, by name.
    """

    model_type = "llama_moe"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts_per_tok": "num_selects",
        "num_local_experts": "num_experts",
    }
    base_model_tp_plan = None
    base_model_pp_plan = None

    pad_token_id: int | None = 0
    num_experts: int = 16
    num_selects: int = 4
    size_experts: list | None = None
    gate_type: str = "TopKBalancedNoisyGate"
    gate_network: str = "mlp"
    gate_use_softmax: bool = True
    gate_use_balance: bool = True
    gate_balance_loss_weight: float | int = 1e-2
    gate_add_noise: bool = True
    gate_noise_epsilon: float | int = 1e-2
    calculator_type: str = "UniversalCalculator"
    multiply_gate_scores: bool = True
    score_scale_factor: float | int | list = 1.0
    add_weight_norm: bool = False
    drop_tokens: bool = True
    dropped_padding: str = "zero"
    capacity_factor: float | int = 1.25

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_fields("LLaMA-MoE", self, ("num_selects", "num_experts"), SUPPORTED)
        if self.intermediate_size % self.num_experts:
            raise ValueError(
                f"LLaMA-MoE: intermediate_size {self.intermediate_size} is not divisible by"
                f" num_experts {self.num_experts}; unequal experts have no fused form"
            )
        sizes = [[self.expert_size] * self.num_experts] * self.num_hidden_layers
        if self.size_experts not in (None, sizes):
            raise ValueError(
                "LLaMA-MoE: size_experts must list, for each layer, num_experts equal sizes of"
                f" intermediate_size / num_experts = {self.expert_size}; unequal experts have no fused form"
            )
        factors = self.score_scale_factor
        if isinstance(factors, list) and len(factors) != self.num_hidden_layers:
            raise ValueError(
                f"LLaMA-MoE: score_scale_factor lists {len(factors)} factors for {self.num_hidden_layers} layers"
            )

    @property
    def expert_size(self) -> int:
        """Width of one expert's intermediate layer (I)."""
        return self.intermediate_size // self.num_experts


class GateNoise(nn.Linear):
    """Width of the noise of the original training: part of the public checkpoints, never computed with."""

    def initialize(self, std: float) -> None:
        """Nothing is known of it."""
        init.zeros_(self.weight)


class LlamaMoeGate(nn.Module):
    """Top-k router: the softmax is taken over the k kept logits only.

    Returns ``(logits [N, E], top_k_weights [N, k], top_k_index [N, k])``; the weights hold the layer's scale
    factor.
    """

    def __init__(self, config: LlamaMoeConfig, layer_idx: int) -> None:
        super().__init__()
        hidden_size, num_experts, factor = config.hidden_size, config.num_experts, config.score_scale_factor
        self.top_k = config.num_selects
        self.score_scale = float(factor[layer_idx] if isinstance(factor, list) else factor)
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
        logits = self.gate_network(hidden_states)
        top_k_logits, top_k_index = torch.topk(logits, self.top_k, dim=-1)
        weights = nn.functional.softmax(top_k_logits, dim=-1, dtype=torch.float32).to(logits.dtype)
        return logits, weights * self.score_scale, top_k_index


def build_block(config: LlamaMoeConfig, layer_idx: int) -> nn.Module:
    """A mixture in every layer."""
    return MoeBlock(LlamaMoeGate(config, layer_idx), of_width(MixtralExperts, config, config.expert_size))


class LlamaMoeForCausalLM(MoeForCausalLM):
    """LLaMA-MoE with its language-model head."""

    config_class = LlamaMoeConfig
    build_block = staticmethod(build_block)
