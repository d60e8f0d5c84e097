"""What LLaMA-MoE and DeepSeek-MoE share: transformers' own LLaMA with another block in the place of its MLP.

Attention, norms, rotary embedding, dense MLP, head and the passes through them are transformers' classes. Routed
experts are its ``MixtralExperts``: two fused stacks, ``gate_up_proj`` [E, 2I, H] with the gate's rows first and
``down_proj`` [E, H, I], behind its experts interface (``eager``, ``grouped_mm``, ...).

Deviation: the balance losses of the original trainings are not added to the loss (they play no part in fine-tuning
experts under a frozen router).
Deviation: frequencies of dynamic RoPE follow from the batch alone. In the original code they also depend on the longest
sequence seen before, and on padding on the left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts


def of_width(make: Callable[[Any], Any], config: Any, width: int) -> Any:
    """``make(config)``, an MLP or a layer's experts, with ``width`` instead of the config's ``intermediate_size``."""
    narrowed = copy.copy(config)
    narrowed.intermediate_size = width
    module = make(narrowed)
    module.config = config
    return module


class OriginalRope:
    """Of a configuration: ``config.json`` also names RoPE's parameters as the models' own code reads them."""

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return fields | original_rope(fields["rope_parameters"])


def original_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, as transformers before 5 writes them, from ``rope_parameters``."""
    rest = {name: value for name, value in parameters.items() if name not in ("rope_type", "type", "rope_theta")}
    if rest.get("factor") is not None:
        rest["factor"] = float(rest["factor"])  # a whole number was refused
    kind = parameters.get("rope_type", "default")
    scaling = None if kind == "default" else {"type": kind, **rest}
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling}


class RotaryEmbedding(LlamaRotaryEmbedding):
    """LLaMA's, without a memory of longer sequences."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [B, T, head_dim]."""
        self.max_seq_len_cached = 0
        cosine, sine = super().forward(x, position_ids)
        return cosine, sine


class MoeBlock(nn.Module):
    """Router, routed experts and, if there are any, shared experts of one layer, [B, T, H] to [B, T, H]."""

    def __init__(self, gate: nn.Module, experts: nn.Module, shared_experts: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate, experts, shared_experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sum over each token's experts of weight times output, plus the shared experts' output."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(flat)
        output: torch.Tensor = self.experts(flat, top_k_index, top_k_weights).reshape(hidden_states.shape)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)


class MoeDecoderLayer(LlamaDecoderLayer):
    """A LLaMA layer whose MLP is the given block ([B, T, H] to [B, T, H])."""

    def __init__(self, config: Any, layer_idx: int, block: nn.Module) -> None:
        # LLaMA's own __init__ would first allocate the dense MLP of the full width.
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = block
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MoePreTrainedModel(LlamaPreTrainedModel):
    """What transformers needs to know of the two models, and their initial weights."""

    _no_split_modules = ["MoeDecoderLayer"]
    _can_compile_fullgraph = False

    # transformers answers these two by reading the source of the module that holds the class; attention and
    # experts live in other modules here.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, MixtralExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif hasattr(module, "initialize"):
            module.initialize(self.config.initializer_range)
        else:
            super()._init_weights(module)


class MoeModel(MoePreTrainedModel, LlamaModel):
    """Embedding, decoder layers around the given blocks, final norm: token ids to hidden states [B, T, H]."""

    def __init__(self, config: Any, build_block: Callable[[Any, int], nn.Module]) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [MoeDecoderLayer(config, i, build_block(config, i)) for i in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class MoeForCausalLM(MoePreTrainedModel, LlamaForCausalLM):
    """A :class:`MoeModel` with a language-model head; abstract in ``build_block``."""

    build_block: ClassVar[Any]
    """From the configuration and a layer's number: what stands there in the place of LLaMA's MLP."""

    def __init__(self, config: Any) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = MoeModel(config, type(self).build_block)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def check_fields(kind: str, config: Any, counts: tuple[str, str], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse fields of a configuration that the model of this ``kind`` does not compute with: ValueError by name.

    Args:
        counts: fields with the number of experts per token and that of all experts.
        allowed: the values of other fields.
    """
    known = {"hidden_act": tuple(sorted(ACT2FN)), "rope_type": ("default", *sorted(ROPE_INIT_FUNCTIONS))}
    for name, values in {**known, **allowed}.items():
        value = config.rope_parameters["rope_type"] if name == "rope_type" else getattr(config, name)
        if value not in values:
            raise ValueError(f"{kind}: {name} must be one of {', '.join(map(str, values))}, got {value!r}")
    top_k, total = (getattr(config, name) for name in counts)
    if not 1 <= top_k <= total:
        raise ValueError(f"{kind}: {counts[0]} must lie in 1..{counts[1]}={total}, got {top_k}")
