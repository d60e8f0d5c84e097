"""A training step without weights: what would be in memory, and when, from a configuration alone.

The model is built on the meta device, where a tensor has a shape and a size but no contents, its experts are replaced
by stand-ins of the planned shape, and one real forward and backward pass of it is run: the model's own code, autograd's
own decisions about what to keep, the passes of :mod:`fluxlib.moe.passes`, with :class:`LiveBytes` adding up what is
alive. Only two things are made up, because they depend on contents: tokens are spread evenly over the slots, and
attention keeps what a fused kernel keeps.

- :class:`Slots` -- what stands in for one layer's experts, :class:`DryCompact` and :class:`DryUnpacked` -- how,
- :func:`train_peak` -- the peak of a training step, :func:`forward_peak` -- of a forward pass without gradients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import repeat_kv

from fluxlib.devices.live_bytes import LiveBytes
from fluxlib.moe import layers
from fluxlib.moe.compact import CompactExperts, LayerPlan
from fluxlib.moe.kernels import Activation, Matrices, to_matrices
from fluxlib.moe.passes import slot_pass

DRY_ATTENTION = "fluxlib_dry_run"
SCALE_BYTES = 2
"""Of a quantised block's scale."""
SCALE_BLOCK = 64
"""Values per scale."""


@dataclass(frozen=True)
class Slots:
    """What one layer's experts are replaced by.

    Attributes:
        num_tuned: slots with a weight, a gradient and an optimizer state.
        num_frozen: merged slots, read only.
        num_experts_in_frozen: experts that the merged slots stand for; the router may choose several of one slot.
        bits: 16 or more: weights are stored as they are; fewer: every slot is stored quantised and unpacked alone.
        offloaded: weights and states lie elsewhere, two working copies are here, gradients are sent away at once.
    """

    num_tuned: int
    num_frozen: int = 0
    num_experts_in_frozen: int = 0
    bits: int = 16
    offloaded: bool = False


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment of the peak: their sum, and by kind."""

    num_bytes: int
    by_kind: dict[str, int]


def even_counts(slots: Slots, num_tokens: int, top_k: int) -> list[int]:
    """(token, slot) pairs of each slot, tuned ones first, when every expert is chosen equally often.

    A token's choices that fall on one merged slot are one pair there.
    """
    reachable = slots.num_tuned + slots.num_experts_in_frozen
    top_k = min(top_k, reachable)
    counts = [round(num_tokens * top_k / reachable)] * slots.num_tuned
    for group in _group_sizes(slots):
        missed = math.comb(reachable - group, top_k) / math.comb(reachable, top_k)
        counts.append(round(num_tokens * (1 - missed)))
    return counts


class DryCompact(CompactExperts):
    """The real customised layer on the meta device, with evenly spread tokens in the place of the router's choice."""

    def __init__(self, original: Any, slots: Slots, top_k: int, tuned_dtype: torch.dtype, method: str) -> None:
        experts = iter(range(original.down_proj.shape[0]))
        tuned = tuple(islice(experts, slots.num_tuned))
        groups = tuple(tuple(islice(experts, size)) for size in _group_sizes(slots))
        super().__init__(original, LayerPlan(tuned, groups, dropped=tuple(experts)), tuned_dtype)
        self.slots, self.top_k, self.method = slots, top_k, method

    def forward(self, hidden: Tensor, top_k_index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """``hidden [N, H]`` to ``[N, H]``; Llama-4 gives ``[E * N, H]``."""
        return self._slots(hidden, *_pairs(self, hidden, weights))


class DryUnpacked(layers.ReplacedExperts):
    """Experts that lie elsewhere, or quantised, and are unpacked one at a time, on the meta device."""

    def __init__(self, original: nn.Module, slots: Slots, top_k: int) -> None:
        super().__init__(original)
        self.slots, self.top_k = slots, top_k
        self.activation = Activation(original)
        self.one = {name: getattr(original, name)[0].detach() for name in self.layout.names}
        self.collected: list[Tensor] = []
        self.on_gradient: Callable[[Tensor], None] = lambda gradient: None

    def packed_bytes(self) -> int:
        """Memory at rest, on the device."""
        if self.slots.offloaded:
            return 0
        values = sum(tensor.numel() for tensor in self.one.values())
        return int((self.slots.num_tuned + self.slots.num_frozen) * values * packed_bytes_per_value(self.slots.bits))

    def forward(self, hidden: Tensor, top_k_index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """``hidden [N, H]`` to ``[N, H]``; Llama-4 gives ``[E * N, H]``."""
        anchor = torch.zeros(0, device=hidden.device, requires_grad=torch.is_grad_enabled())
        return slot_pass(hidden, *_pairs(self, hidden, weights), self, self.activation, anchor=anchor)

    def matrices(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Matrices:
        """One expert fetched or unpacked: a copy of its own."""
        return to_matrices({name: torch.empty_like(t) for name, t in self.one.items()}, self.layout, dtype)

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        """Keep a tuned slot's gradients, unless they are sent away at once."""
        if not self.slots.offloaded and slot < self.slots.num_tuned:
            self.collected.extend(gradients.values())
            for gradient in gradients.values():
                self.on_gradient(gradient)

    def end_backward(self) -> None:
        """Nothing is left to do."""


def packed_bytes_per_value(bits: int) -> float:
    """Bytes per value of a quantised expert at rest, its scales included; 2 for 16 bits."""
    return bits / 8 + (SCALE_BYTES / SCALE_BLOCK if bits < 16 else 0)


def _group_sizes(slots: Slots) -> list[int]:
    if not slots.num_frozen:
        return []
    size, more = divmod(slots.num_experts_in_frozen, slots.num_frozen)
    return [size + (i < more) for i in range(slots.num_frozen)]


def _pairs(experts: Any, hidden: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, list[int]]:
    """What :func:`fluxlib.moe.kernels.sort_pairs` would return."""
    num_tokens = hidden.shape[0] // experts.num_experts if experts.layout.is_dense else hidden.shape[0]
    counts = even_counts(experts.slots, num_tokens, experts.top_k)
    weight = hidden.new_empty(sum(counts), dtype=torch.float32)
    if weights is not None:
        weight = weight + weights.float().sum()
    return hidden.new_empty(sum(counts), dtype=torch.long), weight, counts


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
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(DRY_ATTENTION, _dry_attention)
    # A copy: from_config writes the attention's name into the configuration it is given.
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if model._supports_sdpa:
            model.set_attn_implementation(DRY_ATTENTION)
    model.config.use_cache = False
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
        method: of computing slots in stacks, see :func:`fluxlib.moe.passes.stack_pass`.
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
    found = layers.find(model)
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


def _put(layer: layers.MoELayer, experts: nn.Module) -> None:
    setattr(layer.block, layer.name.rpartition(".")[2], experts)
