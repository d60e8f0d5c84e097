"""Every MoE model that the installed transformers knows: found, or refused by name; equal to a plain reference."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fluxlib.moe import compact, find
from fluxlib.moe.compact import LayerPlan
from fluxlib.moe.replace import replace

# With their default configurations. Why: what the message must say.
REFUSED = {
    "deepseek_v2": "no number of experts per token",
    "jetmoe": "JetMoeMoA holds no stacks",
    "longcat_flash": "LongcatFlashExperts holds stacks .* does not declare their layout",
    "bamba": "no MoE layer",
    "doge": "no MoE layer",
    "gemma4": "no MoE layer",
    "gemma4_text": "no MoE layer",
}
# Default configurations that transformers itself cannot build a model from.
UNBUILDABLE = {"dbrx", "dots1", "hunyuan_v1_moe", "lfm2_moe", "qwen4_exp", "qwen4_exp_text"}
# Models that fit no generic tiny configuration: nested ones, hybrids, those that compute in float32 whatever they hold.
UNFIT = {"bamba", "beam", "dbrx", "dots3_note", "doge", "flint", "gemma4", "granitemoehybrid", "inkling2_text", "jamba"}
UNFIT |= {"jetmoe", "kimi_linear", "lfm2_moe", "llama4", "longcat_flash", "mimo_v2_flash"}
UNFIT |= {"qwen3_5_moe", "qwen4_exp", "qwen4_exp_text", "zaya"}

SIZES: dict[str, Any] = dict.fromkeys(
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "q_lora_rank", "kv_lora_rank"), 8
)
SIZES |= dict.fromkeys(("head_dim", "global_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8)
SIZES |= dict.fromkeys(("swa_head_dim", "linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 8)
SIZES |= dict.fromkeys(("sliding_window", "mamba_d_state"), 8)
SIZES |= dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_hidden_layers"), 2)
SIZES |= dict.fromkeys(("num_attention_heads", "num_key_value_heads", "swa_num_attention_heads", "index_n_heads"), 2)
SIZES |= dict.fromkeys(("swa_num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"), 2)
SIZES |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 12)
SIZES |= dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "decoder_sparse_step"), 1)
SIZES |= dict.fromkeys(("num_expert_group", "first_k_dense_replace", "num_dense_layers", "bos_token_id"), 1)
SIZES |= dict.fromkeys(("pad_token_id", "moe_layer_start_index", "hidden_size_per_layer_input"), 0)
SIZES |= {"vocab_size": 61, "vocab_size_per_layer_input": 61, "hidden_size": 16, "intermediate_size": 24}
SIZES |= {"qk_head_dim": 16, "max_position_embeddings": 64, "index_topk": 64, "num_kv_shared_layers": 0}
SIZES |= {"mamba_dt_rank": 4, "eos_token_id": 2, "enable_moe_block": True}


def _source(model_type: str) -> str:
    """A model's source, without importing it."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    files = Path(spec.origin).parent.glob(f"models/{model_type_to_module_name(model_type)}/modeling_*.py")
    return "".join(file.read_text() for file in files)


SOURCES = {name: _source(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING_NAMES}
MOE = [name for name, source in SOURCES.items() if "xperts" in source]
FUSED = [name for name in MOE if "use_experts_implementation" in SOURCES[name] or name.startswith("llama4")]
"""With stacked experts, called through transformers' own seam (Llama-4: through one of its own)."""


@pytest.mark.parametrize("model_type", [name for name in MOE if name not in UNBUILDABLE])
def test_default_configurations_are_found_or_refused_by_name(model_type: str) -> None:
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type]())
    if model_type in REFUSED or model_type not in FUSED:
        with pytest.raises(ValueError, match=REFUSED.get(model_type, "not handled")):
            find.layers(model)
        return
    for layer in find.layers(model):
        assert 1 <= layer.top_k <= layer.num_experts == len(layer.experts.down_proj)


def _tiny(model_type: str) -> tf.PretrainedConfig:
    """The default configuration with whatever makes a model large made small."""
    default = CONFIG_MAPPING[model_type]().to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in default}
    for name in ("layer_types", "mlp_layer_types", "moe_layer_freq"):
        if isinstance(default.get(name), list):
            sizes[name] = default[name][-2:]
    return CONFIG_MAPPING[model_type](**sizes)


def _build(model_type: str) -> nn.Module:
    model = tf.AutoModelForCausalLM.from_config(_tiny(model_type))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        matrix = parameter.dim() > 1
        parameter.data.normal_(std=0.25 if matrix else 0.1, generator=generator).add_(0.0 if matrix else 1.0)
    with contextlib.suppress(ValueError, AttributeError):
        model.set_experts_implementation("eager")  # grouped_mm takes no float64
    return model.double().eval()


def _step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the embedding."""
    embedding = model.get_input_embeddings().weight.requires_grad_()
    embedding.grad = None
    output = model(**batch)
    output.loss.backward()
    return output.logits.detach(), embedding.grad


@pytest.mark.parametrize("model_type", [name for name in FUSED if name not in UNFIT])
def test_output_and_gradients_equal_the_reference(tiny: SimpleNamespace, model_type: str) -> None:
    model, batch = _build(model_type).requires_grad_(False), tiny.batch()
    found = find.layers(model)
    plans = []
    for layer in found:
        rest = range(2, layer.num_experts)
        plans.append(LayerPlan((0, 1), (tuple(rest[:2]), tuple(rest[2:])), ((3.0, 1.0), (1.0,) * len(rest[2:]))))
    references = [tiny.PlainExperts(layer.experts, plan) for layer, plan in zip(found, plans, strict=True)]
    for layer, reference in zip(found, references, strict=True):
        replace(model, layer, reference)
    expected = _step(model, batch)
    for layer in found:
        replace(model, layer, layer.experts)
    compact.customize(model, plans)
    for ours, theirs in zip(_step(model, batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    for layer, reference in zip(find.layers(model), references, strict=True):
        for expert in (0, 1):
            for name, gradient in layer.experts.grads(expert).items():
                wanted = reference.slots[expert][name].grad
                torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12)


def test_a_mixture_without_fused_experts_is_not_called_dense() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.DogeConfig(**sizes, is_moe=True, num_experts=4)
    with torch.device("meta"), pytest.raises(ValueError, match="not handled .*: DogeCDMoE, at model.layers.0.mlp"):
        find.layers(tf.AutoModelForCausalLM.from_config(config))
