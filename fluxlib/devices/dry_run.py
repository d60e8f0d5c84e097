"""A training step without weights: what would be in memory, and when, from a configuration alone.

One real forward and backward pass is run on the meta device, where a tensor has a shape and a size but no contents,
while :mod:`fluxlib.devices.memory_tracker` adds up what is alive. Two things depend on contents and are made up: tokens
are spread evenly over the slots, and attention keeps what a fused kernel keeps. Decoder layers of one make and one plan
do the same, so one of them is run and counted as often as it occurs.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import repeat_kv

from fluxlib.devices.memory_tracker import MemoryTracker
from fluxlib.moe import find
from fluxlib.moe.adapter import Adapter, sides
from fluxlib.moe.compact import CompactExperts, LayerPlan
from fluxlib.moe.dispatch import Pairs, SlotExperts, dispatch
from fluxlib.moe.packing import BITS, SCALE_BITS

DRY_ATTENTION = "fluxlib_dry_run"
KERNELS = ("auto", "grouped", "slots")
TUNED_DTYPE = torch.float32
"""Type of tuned weights and of their gradients."""
MOMENT_BYTES = 8
"""AdamW's two moments, per tuned parameter."""
MAX_BATCH, MAX_TOKENS = 2**14, 2**18
"""Sequences of a step and tokens of each, at most: beyond them sizes no longer fit into 64 bits."""


@dataclass(frozen=True)
class Step:
    """A step as far as its memory goes; ValueError for a value outside what is allowed, by name.

    Attributes:
        batch, tokens: sequences, and tokens of each, padding included.
        dtype: type of frozen weights and activations.
        bits: of the profile model (``flux``) or of the experts (``fmq``).
        kernel: how slots are computed: ``grouped``, ``slots``, or ``auto``, as
            :class:`fluxlib.moe.dispatch.StackedSlots` does on CUDA (``slots`` is its way on a CPU).
        rank: of the adapters that are tuned; 0: whole experts are.
    """

    batch: int = 16
    tokens: int = 512
    dtype: torch.dtype = torch.bfloat16
    bits: int = 4
    kernel: str = "auto"
    rank: int = 0

    def __post_init__(self) -> None:
        for name, count, most in (("batch", self.batch, MAX_BATCH), ("tokens", self.tokens, MAX_TOKENS)):
            if not 1 <= count <= most:
                raise ValueError(f"{name}: expected 1 to {most}, got {count}")
        for name, value, allowed in (("bits", self.bits, BITS), ("kernel", self.kernel, KERNELS)):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}")


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

    @property
    def group_sizes(self) -> list[int]:
        """Experts of each merged slot."""
        size, more = divmod(self.num_experts_in_frozen, max(1, self.num_frozen))
        return [size + (i < more) for i in range(self.num_frozen)]

    def num_pairs(self, num_tokens: int, top_k: int) -> list[int]:
        """(token, slot) pairs of each slot, tuned ones first, when every expert is chosen equally often.

        A token's choices that fall on one merged slot are one pair there.
        """
        reachable = self.num_tuned + self.num_experts_in_frozen
        top_k = min(top_k, reachable)
        counts = [round(num_tokens * top_k / reachable)] * self.num_tuned
        for group in self.group_sizes:
            missed = math.comb(reachable - group, top_k) / math.comb(reachable, top_k)
            counts.append(round(num_tokens * (1 - missed)))
        return counts


class _CompactOnMeta(CompactExperts):
    """The real customised layer on the meta device, with evenly spread tokens in the place of the router's choice."""

    def __init__(self, layer: find.MoELayer, slots: Slots, step: Step) -> None:
        experts = iter(range(layer.num_experts))
        tuned = tuple(islice(experts, slots.num_tuned))
        groups = tuple(tuple(islice(experts, size)) for size in slots.group_sizes)
        adapter = Adapter(step.rank, 1.0, 0) if step.rank else None
        super().__init__(layer.experts, LayerPlan(tuned, groups, dropped=tuple(experts)), TUNED_DTYPE, adapter)
        self.slots, self.top_k, self.method = slots, layer.top_k, step.kernel

    def forward(self, hidden: Tensor, top_k_index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.compute(hidden, _pairs(self, hidden, weights))


class _UnpackedOnMeta(SlotExperts):
    """Experts that lie elsewhere, or quantised, and are unpacked one at a time, on the meta device."""

    def __init__(self, layer: find.MoELayer, slots: Slots, on_gradient: Callable[[Tensor], None] | None) -> None:
        super().__init__(layer.experts)
        self.slots, self.top_k, self.on_gradient = slots, layer.top_k, on_gradient
        self.one = {name: getattr(layer.experts, name)[0].detach() for name in self.layout.names}
        self.collected: list[Tensor] = []

    def forward(self, hidden: Tensor, top_k_index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return dispatch(hidden, _pairs(self, hidden, weights), self)

    def fetch(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: torch.empty_like(t) for name, t in self.one.items()}

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        if self.on_gradient is not None and slot < self.slots.num_tuned:
            self.collected.extend(gradients.values())
            for gradient in gradients.values():
                self.on_gradient(gradient)


def _pairs(experts: Any, hidden: Tensor, weights: Tensor | None) -> Pairs:
    """What sorting the router's choices by slot would give."""
    num_tokens = hidden.shape[0] // experts.num_experts if experts.layout.is_dense else hidden.shape[0]
    counts = experts.slots.num_pairs(num_tokens, experts.top_k)
    weight = hidden.new_empty(sum(counts), dtype=torch.float32)
    if weights is not None:
        weight = weight + weights.float().sum()
    return Pairs(hidden.new_empty(sum(counts), dtype=torch.long), weight, counts)


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


def _dry_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    if not query.is_meta:
        raise ValueError(f"{DRY_ATTENTION} computes nothing: it is for models on the meta device")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # As transformers does for a batch with padding.
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def meta_model(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of ``config`` on the meta device, with attention that fits a dry run.

    Models that transformers has only plain attention for (gpt-oss) keep it. ValueError: it has no such model.
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


def peak(model: Any, slots: Sequence[Slots], step: Step, learns: bool = True) -> Counter[str]:
    """Bytes by kind at the peak of one training step in which only the tuned slots learn.

    Args:
        model: from :func:`meta_model`; a copy of it is changed and run.
        slots: one per MoE layer; else ValueError.
        learns: False: of a forward pass without gradients (profiling, probing).
    """
    model = copy.deepcopy(model)
    found = find.layers(model)
    if len(slots) != len(found):
        raise ValueError(f"slots: expected one per MoE layer, {len(found)}, got {len(slots)}")
    decoder = model.get_submodule(found[0].name.partition(".layers.")[0])
    every = list(decoder.layers)
    planned = {find.decoder_layers(model, layer)[1]: (layer, here) for layer, here in zip(found, slots, strict=True)}
    # Before the first tuned slot nothing has a gradient; the layer after it is the last that uses what layers share.
    first = min(number for number, (_, here) in planned.items() if here.num_tuned) if learns else 0
    kinds = [
        (min(number, first + 2), number == len(every) - 1, planned.get(number, (None, None))[1], *_make(layer))
        for number, layer in enumerate(every)
    ]
    chosen = [number for number, kind in enumerate(kinds) if kind not in kinds[:number]]
    stands_for = [chosen.index(kinds.index(kind)) for kind in kinds]
    tracker, held, repeated = MemoryTracker(), list[Tensor](), Counter[str]()
    inside = {id(tensor) for layer in found for tensor in layer.experts.parameters()}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in inside:
            tracker.mark(tensor, "others")
    model.requires_grad_(False)
    for number in (number for number in chosen if number in planned):
        before = tracker.by_kind.copy()
        held += _replace(*planned[number], step, tracker)
        for kind, num_bytes in tracker.by_kind.items():
            times = stands_for.count(chosen.index(number)) - 1
            repeated[kind] += times * (num_bytes - before[kind])
    decoder.layers = nn.ModuleList([every[number] for number in chosen])
    _run(model, step, tracker, learns, list(decoder.layers))
    forward = [0, *(1 + place for place in stands_for), 1 + len(chosen)]
    backward = [1 + 2 * len(chosen) - place for place in reversed(stands_for[first:])] if learns else []
    return _peak_of_all((tracker.stretches[index] for index in forward + backward), repeated)


def _make(layer: nn.Module) -> tuple[Any, ...]:
    """What two layers have in common that do the same."""
    return repr(layer), tuple((name, parameter.shape) for name, parameter in layer.named_parameters())


def _replace(layer: find.MoELayer, slots: Slots, step: Step, tracker: MemoryTracker) -> list[Tensor]:
    """Put what is planned at the experts' place and mark all that lies still; gives what has to be kept alive."""
    held: list[Tensor] = []

    def hold(num_bytes: int, kind: str) -> None:
        held.append(torch.empty(num_bytes, dtype=torch.uint8, device="meta"))
        tracker.mark(held[-1], kind)

    experts: _UnpackedOnMeta | _CompactOnMeta
    learned = slots.num_tuned * learned_parameters(layer, step.rank)
    hold(0 if slots.offloaded and not step.rank else MOMENT_BYTES * learned, "optimizer")
    if (slots.offloaded or slots.bits < 16) and step.rank:  # B's, their gradients and A's stay
        fixed = slots.num_tuned * step.rank * sides(layer.experts)[0]
        hold(TUNED_DTYPE.itemsize * (2 * learned + fixed), "tuned")
    if slots.offloaded or slots.bits < 16:
        collects = not (slots.offloaded or step.rank)
        experts = _UnpackedOnMeta(layer, slots, (lambda grad: tracker.mark(grad, "gradients")) if collects else None)
        if not slots.offloaded:
            values = (slots.num_tuned + slots.num_frozen) * sum(tensor.numel() for tensor in experts.one.values())
            hold(int(values * ((slots.bits + SCALE_BITS) / 8)), "frozen")
    else:
        experts = _CompactOnMeta(layer, slots, step)
        for stack in experts.merged_stacks().values():
            tracker.mark(stack, "frozen")
        for stack in (*experts.tuned_stacks().values(), *(experts.tuned_fixed or {}).values()):
            tracker.mark(stack, "tuned")
        for parameter in experts.learned_stacks().values():
            tracker.mark(parameter, "tuned")
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.mark(p.grad, "gradients"))
    setattr(layer.block, layer.name.rpartition(".")[2], experts)
    return held


def learned_parameters(layer: find.MoELayer, rank: int) -> int:
    """Parameters of one expert that are tuned: all, or B of an adapter."""
    return rank * sides(layer.experts)[1] or sum(stack[0].numel() for stack in layer.experts.parameters())


def _run(model: Any, step: Step, tracker: MemoryTracker, learns: bool, decoder: list[nn.Module]) -> None:
    """The step itself, cut at each decoder layer's input: forward, and again when that has got its gradient."""

    def cut(hidden: Any) -> None:
        hidden = hidden if isinstance(hidden, Tensor) else hidden[0]
        tracker.cut()
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: tracker.cut())

    for layer in decoder:
        layer.register_forward_pre_hook(lambda _, inputs: cut(inputs))
    decoder[-1].register_forward_hook(lambda _, inputs, output: cut(output))
    model.train(learns)
    with tracker, torch.set_grad_enabled(learns):
        ids = torch.zeros((step.batch, step.tokens), dtype=torch.long, device="meta")
        out = model(input_ids=ids, labels=ids if learns else None)
        if learns:
            loss = out.loss
            del out
            loss.backward()
        tracker.cut()


def _peak_of_all(stretches: Iterable[tuple[Counter[str], ...]], start: Counter[str]) -> Counter[str]:
    """The peak of stretches that follow one another, each as it was measured but for what is alive at its start."""
    state, highest = start.copy(), start
    for before, peak, after in stretches:
        highest = max(highest, state + peak - before, key=Counter.total)  # the earlier one, if they are equal
        state = state + after - before
    return highest
