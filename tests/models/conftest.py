"""Tiny checkpoints in the two public formats, written key by key, and the plain models they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN, LAYERS, HEADS = 48, 32, 3, 4
LLAMA_MOE = {
    "architectures": ["LlamaMoEForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_llama_moe.LlamaMoEConfig"},
    "model_type": "llama_moe",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "hidden_act": "silu",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "num_experts": 6,
    "num_selects": 2,
    "size_experts": [[8] * 6] * LAYERS,
    "gate_type": "TopKBalancedNoisyGate",
    "gate_network": "mlp",
    "gate_use_softmax": True,
    "gate_use_balance": True,
    "gate_balance_loss_weight": 0.01,
    "gate_add_noise": True,
    "gate_noise_epsilon": 0.01,
    "calculator_type": "UniversalCalculator",
    "multiply_gate_scores": True,
    "score_scale_factor": [4.0, 2.0, 3.0],
    "add_weight_norm": False,
    "drop_tokens": True,
    "dropped_padding": "zero",
    "capacity_factor": 1.25,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0",
}
DEEPSEEK = {
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "model_type": "deepseek",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "moe_intermediate_size": 8,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
}
CONFIGS = {"llama_moe": LLAMA_MOE, "deepseek": DEEPSEEK}


def public_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the keys and shapes of the public checkpoint that ``config`` describes."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def add(key: str, *shape: int) -> None:
        values = torch.randn(shape, generator=generator) * (0.3 if len(shape) == 2 else 0.1)
        tensors[key] = (values + (len(shape) == 1)).to(torch.bfloat16)

    add("model.embed_tokens.weight", VOCAB, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for projection in "qkvo":
            add(f"{prefix}self_attn.{projection}_proj.weight", HIDDEN, HIDDEN)
            if config.get("attention_bias"):
                add(f"{prefix}self_attn.{projection}_proj.bias", HIDDEN)
        add(f"{prefix}input_layernorm.weight", HIDDEN)
        add(f"{prefix}post_attention_layernorm.weight", HIDDEN)
        if config["model_type"] == "llama_moe":
            if config["gate_network"] == "mlp":
                add(f"{prefix}mlp.gate.gate_network.0.weight", 6, HIDDEN)
                add(f"{prefix}mlp.gate.gate_network.2.weight", 6, 6)
            else:
                add(f"{prefix}mlp.gate.gate_network.weight", 6, HIDDEN)
            add(f"{prefix}mlp.gate.weight_noise.weight", 6, HIDDEN)
            for expert in range(6):
                add(f"{prefix}mlp.calculator.experts.weight_gate.{expert}", 8, HIDDEN)
                add(f"{prefix}mlp.calculator.experts.weight_up.{expert}", 8, HIDDEN)
                add(f"{prefix}mlp.calculator.experts.weight_down.{expert}", HIDDEN, 8)
            continue
        mlps = {"mlp.": 40}
        if layer >= config["first_k_dense_replace"]:
            add(f"{prefix}mlp.gate.weight", 6, HIDDEN)
            mlps = {"mlp.shared_experts.": 16} | {f"mlp.experts.{expert}.": 8 for expert in range(6)}
        for name, width in mlps.items():
            add(f"{prefix}{name}gate_proj.weight", width, HIDDEN)
            add(f"{prefix}{name}up_proj.weight", width, HIDDEN)
            add(f"{prefix}{name}down_proj.weight", HIDDEN, width)
    add("model.norm.weight", HIDDEN)
    add("lm_head.weight", VOCAB, HIDDEN)
    return tensors


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    kind: str = "safetensors",
    num_shards: int = 3,
) -> Path:
    """Write a checkpoint as the hub holds it; the tensors go round-robin to the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        shard = {key: tensors[key] for key in list(tensors)[number::num_shards]}
        name = f"{stem}.{suffix}" if num_shards == 1 else f"{stem}-{number + 1:05}-of-{num_shards:05}.{suffix}"
        if kind == "safetensors":
            save_file(shard, folder / name, metadata={"format": "pt"})
        else:
            torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    if num_shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


class PlainBlock(nn.Module):
    """The block as its paper writes it: every expert on every token, one matrix at a time, in float64."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor], layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        prefix = f"model.layers.{layer}.mlp."
        self.tensors = {k.removeprefix(prefix): v.double() for k, v in tensors.items() if k.startswith(prefix)}

    def mlp(self, x: torch.Tensor, gate: str, up: str, down: str) -> torch.Tensor:
        t = self.tensors
        return (nn.functional.silu(x @ t[gate].T) * (x @ t[up].T)) @ t[down].T

    def routed(self, x: torch.Tensor, weights: torch.Tensor, gate: str, up: str, down: str) -> torch.Tensor:
        parts = [weights[..., e, None] * self.mlp(x, gate.format(e), up.format(e), down.format(e)) for e in range(6)]
        return torch.stack(parts).sum(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t, config = self.tensors, self.config
        if config["model_type"] == "llama_moe":
            if config["gate_network"] == "mlp":
                logits = torch.tanh(x @ t["gate.gate_network.0.weight"].T) @ t["gate.gate_network.2.weight"].T
            else:
                logits = x @ t["gate.gate_network.weight"].T
            kept = logits.topk(config["num_selects"], dim=-1).indices
            masked = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
            scale = config["score_scale_factor"]
            weights = masked.softmax(-1) * (scale[self.layer] if isinstance(scale, list) else scale)
            names = [f"calculator.experts.weight_{m}.{{}}" for m in ("gate", "up", "down")]
            return self.routed(x, weights, *names)
        if self.layer < config["first_k_dense_replace"]:
            return self.mlp(x, "gate_proj.weight", "up_proj.weight", "down_proj.weight")
        scores = (x @ t["gate.weight"].T).softmax(-1)
        kept = scores.topk(config["num_experts_per_tok"], dim=-1).indices
        weights = torch.zeros_like(scores).scatter(-1, kept, scores.gather(-1, kept))
        if config["norm_topk_prob"]:
            weights = weights / weights.sum(-1, keepdim=True)
        names = [f"experts.{{}}.{m}_proj.weight" for m in ("gate", "up", "down")]
        shared = [f"shared_experts.{m}_proj.weight" for m in ("gate", "up", "down")]
        return self.routed(x, weights, *names) + self.mlp(x, *shared)


def plain_model(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """transformers' LLaMA in float64 with :class:`PlainBlock` in the place of its MLPs."""
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "attention_bias")
    fields = {name: config[name] for name in shared if name in config}
    model = LlamaForCausalLM(LlamaConfig(**fields, intermediate_size=8)).double()
    state = {key: tensor.double() for key, tensor in tensors.items() if ".mlp." not in key}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    for layer, decoder in enumerate(model.model.layers):
        decoder.mlp = PlainBlock(config, tensors, layer)
    return model.eval()


@pytest.fixture(params=["llama_moe", "deepseek"])
def public_config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


@pytest.fixture
def tensors_of() -> Callable[..., dict[str, torch.Tensor]]:
    return public_tensors


@pytest.fixture
def write() -> Callable[..., Path]:
    return write_checkpoint


@pytest.fixture
def plain() -> Callable[..., LlamaForCausalLM]:
    return plain_model


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def configs() -> dict[str, dict[str, Any]]:
    return CONFIGS
