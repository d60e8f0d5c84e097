"""A training step without weights: what would be in memory, and when, from a configuration alone.

The model is built on the meta device, where a tensor has a shape and a size but no contents, its experts are replaced
by stand-ins of the planned shape, and one real forward and backward pass of it is run: the model's own code, autograd's
own decisions about what to keep, the pass of :mod:`fluxlib.moe.dispatch`, with :class:`LiveBytes` adding up what is
alive. Only two things are made up, because they depend on contents: tokens are spread evenly over the slots, and
attention keeps what a fused kernel keeps.

- :func:`meta_model` -- the model,
- :func:`train_peak` -- the peak of a training step, :func:`forward_peak` -- of a forward pass without gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import repeat_kv

from fluxlib.devices.live_bytes import LiveBytes
from fluxlib.devices.stand_ins import DryCompact, DryUnpacked, Slots
from fluxlib.moe import find

DRY_ATTENTION = "fluxlib_dry_run"


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment of the peak: their sum, and by kind."""

    num_bytes: int
    by_kind: dict[str, int]


class _FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps and makes, and nothing else."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # The padding mask of a batch reaches the kernel as numbers, anew in every layer.
        mask = query.new_empty((query.shape[0], 1, query.shape[2], key.shape[2]))
        ctx.save_for_backward(query, key, value, out, normaliser, mask)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def meta_model(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of ``config`` on the meta device, with attention that fits a dry run.

    Models that transformers has only plain attention for (gpt-oss) keep it.

    Raises:
        ValueError: transformers has no causal language model of this configuration.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"model: expected a causal language model, got {type(config).__name__}, which has none")
    ALL_ATTENTION_FUNCTIONS.register(DRY_ATTENTION, _dry_attention)
    # A copy: from_config writes the attention's name into the configuration it is given.
    config = copy.deepcopy(config)
    with torch.device("meta"):
        # Another type would be torch's default meanwhile, for every thread of this process: a run may go on in one.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if model._supports_sdpa:
            model.set_attn_implementation(DRY_ATTENTION)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.use_cache, model.config.dtype = False, dtype
    return model


def _dry_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    if not query.is_meta:
        raise ValueError(f"{DRY_ATTENTION} computes nothing: it is for models on the meta device")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # As transformers does for a batch with padding.
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def train_peak(
    model: Any,
    slots: Sequence[Slots],
    batch: int,
    tokens: int,
    tuned_dtype: torch.dtype,
    state_bytes: int,
    checkpointing: bool = False,
    method: str = "slots",
) -> Peak:
    """Peak of one training step in which only the tuned slots learn; the optimizer's state is there from before.

    Args:
        model: from :func:`meta_model`; left as it was found.
        slots: one per MoE layer.
        batch: sequences per step.
        tokens: tokens per sequence, padding included.
        tuned_dtype: type of tuned weights and their gradients.
        state_bytes: optimizer state per tuned parameter (AdamW: 8).
        checkpointing: layers keep their input only and are run again in the backward pass.
        method: of computing slots in stacks, see :class:`fluxlib.moe.dispatch.StackedSlots`.
    """
    live = LiveBytes()
    with _dry(model, slots, tuned_dtype, live, state_bytes, method) as inputs:
        model.train()
        if checkpointing:
            _checkpointing(model, "enable", {"use_reentrant": False})
        with live:
            ids = inputs(batch, tokens)
            model(input_ids=ids, labels=ids).loss.backward()
        if checkpointing:
            _checkpointing(model, "disable")
    return Peak(live.peak_bytes, live.at_peak)


def forward_peak(model: Any, slots: Sequence[Slots], batch: int, tokens: int) -> Peak:
    """Peak of one forward pass without gradients (profiling, probing); arguments as in :func:`train_peak`."""
    live = LiveBytes()
    with _dry(model, slots, model.dtype, live, 0, "slots") as inputs:
        model.eval()
        with live, torch.no_grad():
            model(input_ids=inputs(batch, tokens))
    return Peak(live.peak_bytes, live.at_peak)


@contextmanager
def _dry(
    model: Any,
    slots: Sequence[Slots],
    tuned_dtype: torch.dtype,
    live: LiveBytes,
    state_bytes: int,
    method: str,
) -> Iterator[Callable[[int, int], Tensor]]:
    """The model with :class:`DryExperts` in it and everything that lies still marked; yields a maker of token ids."""
    found = find.layers(model)
    if len(slots) != len(found):
        raise ValueError(f"slots: expected one per MoE layer, {len(found)}, got {len(slots)}")
    held: list[Tensor] = []

    def hold(num_bytes: int, kind: str) -> None:
        held.append(torch.empty(num_bytes, dtype=torch.uint8, device="meta"))
        live.mark(held[-1], kind)

    def mark_gradient(gradient: Tensor) -> None:
        live.mark(gradient, "gradients")

    inside = {id(tensor) for layer in found for tensor in layer.experts.parameters()}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in inside:
            live.mark(tensor, "others")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        for layer, here in zip(found, slots, strict=True):
            parameters = sum(stack[0].numel() for stack in layer.experts.parameters())
            hold(0 if here.offloaded else state_bytes * here.num_tuned * parameters, "optimizer")
            if here.offloaded or here.bits < 16:
                unpacked = DryUnpacked(layer.experts, here, layer.top_k)
                unpacked.on_gradient = mark_gradient
                hold(unpacked.packed_bytes(), "frozen")
                _put(layer, unpacked)
            else:
                compact = DryCompact(layer.experts, here, layer.top_k, tuned_dtype, method)
                for stack in compact.merged_stacks().values():
                    live.mark(stack, "frozen")
                for parameter in compact.tuned_stacks().values():
                    live.mark(parameter, "tuned")
                    parameter.register_post_accumulate_grad_hook(lambda p: mark_gradient(p.grad))
                _put(layer, compact)
        yield lambda batch, tokens: torch.zeros((batch, tokens), dtype=torch.long, device="meta")
    finally:
        for layer in found:
            _put(layer, layer.experts)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _checkpointing(model: Any, what: str, *arguments: Any) -> None:
    """Switch it by the name that this version of transformers has for it."""
    prefix = "activation" if hasattr(model, f"activation_checkpointing_{what}") else "gradient"
    getattr(model, f"{prefix}_checkpointing_{what}")(*arguments)


def _put(layer: find.MoELayer, experts: nn.Module) -> None:
    setattr(layer.block, layer.name.rpartition(".")[2], experts)
