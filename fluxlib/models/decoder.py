"""The decoder that LLaMA-MoE and DeepSeek-MoE share: transformers' own LLaMA layers around routed experts.

Both models are a LLaMA with another block in the place of its MLP. So attention, norms, rotary embedding and
dense MLP are transformers' classes, imported; what is here is the rest:

- :class:`GatedExperts`: one layer's routed experts as two fused stacks, behind transformers' experts
  interface (``eager``, ``grouped_mm``, ...), called ``experts(hidden_states, top_k_index, top_k_weights)``;
- :class:`MoeDecoderLayer`: attention, then whatever block it is given;
- :class:`MoePreTrainedModel`, :class:`MoeModel`, :class:`MoeForCausalLM`: the three classes of a transformers
  model, abstract in one point: ``build_block(config, layer_idx)``, which the two models define;
- :func:`check_fields`: what fields of a configuration must be before they are compared or looked up.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


@use_experts_implementation
class GatedExperts(nn.Module):
    """Routed experts of one layer: ``down(act(gate(x)) * up(x))`` each, stored as two stacks.

    ``gate_up_proj`` is [E, 2I, H] with the gate's rows first, ``down_proj`` [E, H, I].
    """

    def __init__(self, config: Any, num_experts: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.hidden_size, intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts, one expert at a time (the ``eager`` implementation).

        ``hidden_states`` [N, H], ``top_k_index`` [N, k] long, ``top_k_weights`` [N, k]; returns [N, H].
        """
        output = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            token, position = torch.where(top_k_index == expert)
            gate_up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert])
            gate, up = gate_up.chunk(2, dim=-1)
            contribution = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            contribution = contribution * top_k_weights[token, position, None]
            output.index_add_(0, token, contribution.to(output.dtype))
        return output


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


class MoePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the two models, and their initial weights."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": MoeDecoderLayer,
        "attentions": LlamaAttention,
    }

    @classmethod
    def build_block(cls, config: Any, layer_idx: int) -> nn.Module:
        """Return the block that stands in layer ``layer_idx`` in the place of LLaMA's MLP."""
        raise TypeError(f"{cls.__name__} has no build_block; use the classes of llama_moe or deepseek_moe")

    # transformers answers these two by reading the source of the module that holds the class; attention and
    # experts live in other modules here.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GatedExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)


class MoeModel(MoePreTrainedModel):
    """Embedding, decoder layers, final norm: token ids to hidden states [B, T, H]."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [MoeDecoderLayer(config, i, self.build_block(config, i)) for i in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states of ``input_ids`` [B, T], or of ``inputs_embeds`` [B, T, H], as in LLaMA."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = positions.unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class MoeForCausalLM(MoePreTrainedModel, GenerationMixin):
    """A :class:`MoeModel` with a language-model head.

    Deviation: the balance losses of the original trainings are not added to ``loss`` (they play no part in
    fine-tuning experts under a frozen router); ``output_router_logits=True`` returns the routers' logits for
    who needs them.
    """

    model_class: type[MoeModel] = MoeModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [B, T, V] and, given ``labels`` [B, T] (-100: not scored), the mean next-token loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def check_fields(kind: str, config: Any, *whole: str) -> None:
    """Raise ValueError unless the fields ``whole`` are whole numbers and ``hidden_act`` is one that is known.

    Args:
        kind: of the model, for the message.
        config: a configuration that is being made.
        whole: names of fields.
    """
    for name in whole:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{kind}: {name} must be a whole number, got {value!r}")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"{kind}: hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {config.hidden_act!r}")
