"""Tiny random models of every layout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from fluxlib.models import DeepseekMoeConfig, DeepseekMoeForCausalLM, LlamaMoeConfig, LlamaMoeForCausalLM
from fluxlib.moe import find
from fluxlib.moe.compact import LayerPlan, merge
from fluxlib.moe.expert import Activation
from fluxlib.moe.find import expert_tensors

SHARED = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

OWN = {
    "llama_moe": {"num_experts": 6, "num_selects": 2, "size_experts": [[12] * 6] * 2, "intermediate_size": 72},
    "deepseek": {
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
    },
}


def _config(kind: type, **extra: object) -> tf.PretrainedConfig:
    return kind(**{**SHARED, **extra})


def _mla(kind: type, **extra: object) -> tf.PretrainedConfig:
    size = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    moe = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_shared_experts": 1}
    return _config(kind, **size, **moe, intermediate_size=24, first_k_dense_replace=1, num_hidden_layers=3, **extra)


def configs() -> dict[str, tf.PretrainedConfig]:
    """One tiny configuration per architecture of transformers, by model type."""
    return {
        "mixtral": _config(tf.MixtralConfig, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2),
        "olmoe": _config(tf.OlmoeConfig, intermediate_size=12, num_experts=8, num_experts_per_tok=3),
        "qwen2_moe": _config(
            tf.Qwen2MoeConfig,
            intermediate_size=24,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=20,
            num_experts=8,
            num_experts_per_tok=3,
        ),
        "qwen3_moe": _config(
            tf.Qwen3MoeConfig,
            intermediate_size=24,
            moe_intermediate_size=12,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            head_dim=8,
        ),
        "deepseek_v2": _mla(tf.DeepseekV2Config, topk_method="group_limited_greedy", n_group=2, topk_group=1),
        "deepseek_v3": _mla(tf.DeepseekV3Config, n_group=2, topk_group=1),
        "granitemoe": _config(tf.GraniteMoeConfig, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2),
        "phimoe": _config(tf.PhimoeConfig, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2),
        "gpt_oss": _config(
            tf.GptOssConfig,
            intermediate_size=12,
            num_local_experts=6,
            num_experts_per_tok=2,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "llama4": _config(
            tf.Llama4TextConfig,
            intermediate_size=12,
            intermediate_size_mlp=24,
            num_local_experts=6,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            head_dim=8,
            attention_chunk_size=8,
        ),
    }


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Tiny random model; every parameter and bias is random and far from zero."""
    generator = torch.Generator().manual_seed(seed)
    own = {"llama_moe": (LlamaMoeConfig, LlamaMoeForCausalLM), "deepseek": (DeepseekMoeConfig, DeepseekMoeForCausalLM)}
    if name in own:
        kind, model_class = own[name]
        model = model_class(kind(**{**SHARED, **OWN[name]}))
    else:
        model = tf.AutoModelForCausalLM.from_config(configs()[name])
    for parameter in model.parameters():
        matrix = parameter.dim() > 1
        parameter.data.normal_(std=0.25 if matrix else 0.1, generator=generator).add_(0.0 if matrix else 1.0)
    if dtype == torch.float64 and name != "llama4":
        model.set_experts_implementation("eager")  # grouped_mm takes no float64
    return model.to(dtype).eval()


def batch(tokens: int = 12, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Right-padded batch of a model call; the second row is a third shorter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, tokens - tokens // 3 :] = 0
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


class PlainExperts(nn.Module):
    """Reference: every slot on every token, plain autograd, a slot's gate weight the sum over its experts."""

    def __init__(self, original: nn.Module, plan: LayerPlan) -> None:
        super().__init__()
        self.layout, self.activation = find.read_layout(original), Activation(original)
        slots = [expert_tensors(original, e) for e in plan.tuned]
        slots += [merge(original, plan, group) for group in range(len(plan.groups))]
        self.slots = nn.ModuleList(
            nn.ParameterDict({n: nn.Parameter(t.clone(), requires_grad=i < len(plan.tuned)) for n, t in s.items()})
            for i, s in enumerate(slots)
        )
        self.slot_of = {e: i for i, e in enumerate(plan.tuned)}
        self.slot_of |= {e: len(plan.tuned) + i for i, group in enumerate(plan.groups) for e in group}

    def _one(self, slot: int, x: Tensor) -> Tensor:
        tensors, flip = self.slots[slot], not self.layout.is_transposed
        up, down = tensors[self.layout.up_name], tensors["down_proj"]
        x = x @ (up.T if flip else up)
        if self.layout.has_bias:
            x = x + tensors[f"{self.layout.up_name}_bias"]
        x = self.activation.function(x) @ (down.T if flip else down)
        if self.layout.has_bias:
            x = x + tensors["down_proj_bias"]
        return self.activation.post_norm(x) if self.activation.post_norm is not None else x

    def forward(self, x: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if index is None:
            parts = x.view(max(self.slot_of) + 1, -1, x.shape[-1])
            return torch.cat([self._one(self.slot_of[e], part) for e, part in enumerate(parts)])
        out = torch.zeros_like(x)
        for expert, slot in self.slot_of.items():
            out = out + self._one(slot, x) * ((index == expert) * weights).sum(1, keepdim=True)
        return out


ARCHITECTURES = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "granitemoe",
    "phimoe",
    "gpt_oss",
    "llama4",
    "llama_moe",
    "deepseek",
)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny() -> SimpleNamespace:
    return SimpleNamespace(build=build, batch=batch, PlainExperts=PlainExperts)
