"""Configuration of LLaMA-MoE v1 (``model_type: llama_moe``); the defaults are LLaMA-MoE-v1-3.5B (4/16)."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from fluxlib.models.fields import check_fields

# What the released checkpoints hold. Another value changes the mathematics of the block, so it is refused.
SUPPORTED = {
    "gate_type": ("TopKBalancedNoisyGate",),
    "gate_network": ("mlp", "linear"),
    "gate_use_softmax": (True,),
    "calculator_type": ("UniversalCalculator",),
    "multiply_gate_scores": (True,),
    "add_weight_norm": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}


@strict
class LlamaMoeConfig(LlamaConfig):
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

    The balance loss, noise and capacity fields are kept as they came and play no part here.

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

    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    num_experts: int = 16
    num_selects: int = 4
    size_experts: list | None = None
    gate_type: str = "TopKBalancedNoisyGate"
    gate_network: str = "mlp"
    gate_use_softmax: bool = True
    gate_use_balance: bool = True
    gate_balance_loss_weight: float = 1e-2
    gate_add_noise: bool = True
    gate_noise_epsilon: float = 1e-2
    calculator_type: str = "UniversalCalculator"
    multiply_gate_scores: bool = True
    score_scale_factor: float | int | list = 4.0
    add_weight_norm: bool = False
    drop_tokens: bool = True
    dropped_padding: str = "zero"
    capacity_factor: float | int = 1.25

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_fields("LLaMA-MoE", self, "num_experts", "num_selects", "intermediate_size", "num_hidden_layers")
        for name, allowed in SUPPORTED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"LLaMA-MoE: {name} must be one of {list(allowed)}, got {value!r}")
        if not 1 <= self.num_selects <= self.num_experts:
            raise ValueError(
                f"LLaMA-MoE: num_selects must lie in 1..num_experts={self.num_experts}, got {self.num_selects}"
            )
        self._check_sizes()
        factors = self.score_scale_factor
        if isinstance(factors, list) and len(factors) != self.num_hidden_layers:
            raise ValueError(
                f"LLaMA-MoE: score_scale_factor lists {len(factors)} factors for {self.num_hidden_layers} layers"
            )

    def _check_sizes(self) -> None:
        if self.size_experts is None:
            if self.intermediate_size % self.num_experts:
                raise ValueError(
                    f"LLaMA-MoE: intermediate_size {self.intermediate_size} is not divisible by"
                    f" num_experts {self.num_experts}; give size_experts"
                )
            return
        expected = [[self.intermediate_size // self.num_experts] * self.num_experts] * self.num_hidden_layers
        if [list(layer) for layer in self.size_experts] != expected:
            raise ValueError(
                "LLaMA-MoE: size_experts must list, for each layer, num_experts equal sizes of"
                f" intermediate_size / num_experts = {expected[0][0]}; unequal experts have no fused form"
            )

    @property
    def expert_size(self) -> int:
        """Width of one expert's intermediate layer (I)."""
        return self.intermediate_size // self.num_experts

    def score_scale(self, layer_idx: int) -> float:
        """Return the factor on layer ``layer_idx``'s expert output."""
        factor = self.score_scale_factor
        return float(factor[layer_idx] if isinstance(factor, list) else factor)
