"""Configuration of DeepSeek-MoE (``model_type: deepseek``); the defaults are deepseek-moe-16b-base."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from fluxlib.models.fields import check_fields


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
