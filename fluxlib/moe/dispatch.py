"""A token's way through experts, from the router's choices to their outputs; in this order:

1. :func:`choices` and :func:`sort_pairs`: choices of experts become (token, slot) :class:`Pairs`, sorted by slot,
2. :class:`Slots`: where a slot's weights come from, as :class:`Matrices`; stacks, or one expert at a time,
3. :func:`dispatch`: rows of the pairs go through their slots and are summed per token,
4. :class:`_Pass`: how, forward and backward.

A pass works on runs of pairs: slot by slot, so that what a slot needs stays in the cache and its weights may come
from anywhere; or, for many or small slots, on all pairs at once by grouped products. It keeps the pre-activations
``[P, 2I]`` alone for the backward pass. The gate weight's gradient needs no output of the experts: with u the gradient
of the down projection's input it is ``<u, act>`` (plus ``<g, bias>``).
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter import Adapter, LearningExperts, add_product
from .expert import Activation, Matrices, to_matrices
from .find import Layout, ReplacedExperts
from .product import SMALLEST, is_wide, matmul, own_types, pad_pairs, takes_grouped, wide_dtype

ALL = -1
"""In the place of a slot's number: all slots, as stacks."""

SMALL_VALUES = 1 << 21
"""Pairs times the wider of their rows, in values: below it, everything a pass makes stays in a CPU's cache."""


@dataclass(frozen=True)
class Pairs:
    """(token, slot) pairs, sorted by slot, each once.

    Attributes:
        token: ``[P]``, row of the hidden states.
        weight: ``[P]`` gate weight, in at least float32 so that sums over a slot's experts are exact enough.
        counts: Pairs of each slot: S numbers that add up to P.
    """

    token: Tensor
    weight: Tensor
    counts: list[int]

    def of_slots(self, first: int, last: int) -> Pairs:
        """The pairs of slots first to last - 1."""
        start, end = sum(self.counts[:first]), sum(self.counts[:last])
        return Pairs(self.token[start:end], self.weight[start:end], self.counts[first:last])


def choices(
    experts: ReplacedExperts, hidden: Tensor, top_k_index: Tensor | None, top_k_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Index (-1: none) and weight of every choice of a call, the weight in at least the hidden states' type."""
    if top_k_index is None or top_k_weights is None:
        return dense_choices(hidden, experts.num_experts)
    return top_k_index, top_k_weights.to(torch.promote_types(top_k_weights.dtype, hidden.dtype))


def dense_choices(scaled: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Choices behind Llama-4's call, ``scaled [E * N, H]``: ``index`` and ``weight`` ``[E * N, 1]``.

    The gate weight is in the rows already, so weights are one; rows that are zero were not chosen: index -1. An expert
    without bias maps zero to zero with a zero gradient, so leaving them out changes nothing.
    """
    index = torch.arange(num_experts, device=scaled.device).repeat_interleave(scaled.shape[0] // num_experts)
    index = torch.where((scaled.detach() != 0).any(1), index, -1)[:, None]
    return index, torch.ones_like(index, dtype=scaled.dtype)


def sort_pairs(slot: Tensor, weight: Tensor, num_slots: int, joins: bool = False) -> Pairs:
    """Choices as pairs, from the ``slot [N, k]`` (-1 leaves one out) and the gate ``weight [N, k]`` of each.

    With ``joins`` two choices of a token may fall on one slot; their weights are then summed.
    """
    keep = slot >= 0
    weight = weight.to(wide_dtype(weight.dtype))
    if joins and slot.shape[1] > 1:
        same = slot.unsqueeze(2) == slot.unsqueeze(1)
        weight = (same * weight.unsqueeze(1)).sum(2)
        keep = keep & ~same.tril(-1).any(2)
    key = torch.where(keep, slot, num_slots).flatten()
    order = key.argsort(stable=True)
    # The one point where the host waits for the device.
    counts = torch.bincount(key, minlength=num_slots + 1)[:num_slots].tolist()
    order = order[: sum(counts)]
    return Pairs(order // slot.shape[1], weight.flatten()[order], counts)


Stacks = Mapping[str, Tensor]
"""Tensors of several slots by name, each ``[S, ...]``."""

Product = tuple[Tensor, Tensor]
"""Inputs ``[n, in]`` of a product with weights, and gradients of its outputs ``[n, out]``."""


class Slots(Protocol):
    """Where the weights of slots come from, and where their gradients go."""

    layout: Layout
    activation: Activation

    def learning(self) -> list[Tensor]:
        """What autograd shall see of them: tensors of which one requires a gradient, or none.

        By default an empty tensor, so that autograd comes by and :meth:`add_gradients` is called.
        """
        return [torch.zeros(0, requires_grad=True)] if torch.is_grad_enabled() else []

    def is_grouped(self, hidden: Tensor, counts: Sequence[int]) -> bool:
        """Whether all slots are multiplied at once, by grouped products."""
        return False

    def matrices(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Matrices:
        """Weights of a slot (or of ALL); ``upcoming`` are the slots that will be asked for next."""

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        """Take weight gradients of a slot (or of ALL), by stack name and in the stack's layout."""

    def add_products(self, run: Run, up: Product, down: Product) -> None:
        """Take both products of a run; by default as weight gradients."""
        self.add_gradients(run.slot, run.gradients(self.layout, up, down))

    def end_gradients(self, counts: Sequence[int]) -> list[Tensor | None]:
        """Gradients of what :meth:`learning` gave, after those of all slots that have pairs."""
        return [None]


class StackedSlots(Slots):
    """Slots in stacks ``[S, ...]``, named as in the layout; those that require a gradient get one.

    With an adapter (:mod:`fluxlib.moe.adapter`) a slot's weight ``W + B @ A`` is formed when it is used, which is as
    much arithmetic as ``rank`` tokens, and the weight's own gradient never is.

    Args:
        method: ``"slots"``, ``"grouped"`` (slot by slot for experts with biases), or ``"auto"``: what is faster.
        fixed: A ``[S, rank, in]`` by name: gradients are those of B; None: those of the stacks.
        learned: B ``[S, out, rank]`` by name, where it is not zero and frozen.

    Raises:
        ValueError: Another method, or ``"grouped"`` for float64 or rows that are no multiple of 16 bytes.
    """

    def __init__(
        self, layout: Layout, activation: Activation, stacks: Stacks, method: str,
        fixed: Stacks | None = None, learned: Stacks | None = None,
    ) -> None:  # fmt: skip
        if method not in ("auto", "slots", "grouped"):
            raise ValueError(f"method: expected 'auto', 'slots' or 'grouped', got {method!r}")
        self.layout, self.activation, self.stacks, self.method = layout, activation, stacks, method
        self.fixed, self.learned = fixed, stacks if learned is None else learned
        self._gradients: dict[str, Tensor] = {}

    @property
    def count(self) -> int:
        """Number of slots, S."""
        return len(next(iter(self.stacks.values())))

    def learning(self) -> list[Tensor]:
        """The stacks, or the B's."""
        return list(self.learned.values()) if any(stack.requires_grad for stack in self.learned.values()) else []

    def is_grouped(self, hidden: Tensor, counts: Sequence[int]) -> bool:
        """On CUDA: where grouped products are one kernel (bfloat16). On a CPU they are a loop in C++, which wins while
        the work is so small that Python's own time shows, unless :mod:`fluxlib.moe.product` is faster there."""
        every = (*self.stacks.values(), *self.learned.values())
        num_pairs, sizes = sum(counts), [size for stack in every for size in stack.shape[1:]]
        if self.method == "slots" or not num_pairs or self.layout.has_bias:
            return False
        possible = takes_grouped(hidden.dtype, sizes)
        if self.method == "grouped" and not possible:
            raise ValueError(f"method: 'grouped' takes no float64 and rows of 16 n bytes, got {hidden.dtype} {sizes}")
        if self.method == "grouped" or not possible:
            return possible
        if hidden.device.type == "cuda":
            new = torch.cuda.get_device_capability(hidden.device) >= (8, 0)
            return new and hidden.dtype == torch.bfloat16 and self.fixed is None
        per_slot = num_pairs * max(stack[0].numel() for stack in self.stacks.values()) / sum(map(bool, counts))
        is_small = hidden.device.type == "cpu" and num_pairs * max(sizes) <= SMALL_VALUES
        return is_small and not (is_wide(hidden) and per_slot >= SMALLEST)

    def matrices(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Matrices:
        """Views (copies where the stacks have another type, or B's on top)."""
        return to_matrices(self.formed(slot, self._of(self.stacks, slot)), self.layout, dtype)

    def formed(self, slot: int, tensors: Stacks) -> Stacks:
        """The weights of a slot with its B's, if there are any, on top."""
        if self.fixed is None or self.learned is self.stacks:
            return tensors
        learned, fixed = self._of(self.learned, slot), self._of(self.fixed, slot)
        made = {n: add_product(tensors[n], up.detach(), fixed[n], self.layout) for n, up in learned.items()}
        return {**tensors, **made}

    @staticmethod
    def _of(stacks: Stacks, slot: int) -> dict[str, Tensor]:
        return {name: stack if slot == ALL else stack[slot] for name, stack in stacks.items()}

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        """Write into stacks of gradients."""
        for name, gradient in gradients.items():
            if slot == ALL:
                self._gradients[name] = gradient.to(self.learned[name].dtype)
                continue
            if name not in self._gradients:
                self._gradients[name] = torch.empty_like(self.learned[name])
            self._gradients[name][slot].copy_(gradient)

    def add_products(self, run: Run, up: Product, down: Product) -> None:
        """With an adapter as B's gradients, ``g.T @ (x @ A.T)``."""
        if self.fixed is None:
            super().add_products(run, up, down)
            return
        fixed, pairs = self._of(self.fixed, run.slot), ((self.layout.up_name, up), ("down_proj", down))
        made = {name: run.outer(g, run.linear(x, fixed[name].to(x.dtype).mT)) for name, (x, g) in pairs}
        self.add_gradients(run.slot, made)

    def end_gradients(self, counts: Sequence[int]) -> list[Tensor | None]:
        """The stacks of gradients, zero where a slot has no pair."""
        made, self._gradients = self._gradients, {}
        for name, (slot, count) in itertools.product(made, enumerate(counts)):
            if not count:
                made[name][slot].zero_()
        return [made[name] if made else torch.zeros_like(stack) for name, stack in self.learned.items()]


class WatchedSlots(StackedSlots):
    """Frozen slots whose weight gradients are computed one at a time, for their squared norms alone.

    Args:
        norms: ``[S]``, to which the squared norms are added: of micro-batches, whose gradients are taken to be
            perpendicular. Deviation: exact with one micro-batch, else an estimate, for their sum is kept by nobody.
    """

    def __init__(
        self, layout: Layout, activation: Activation, stacks: Stacks, norms: Tensor, fixed: Stacks | None = None
    ) -> None:
        super().__init__(layout, activation, stacks, "slots", fixed)
        self.norms = norms

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        """Their squared norm; the gradients go."""
        self.norms[slot] += sum(gradient.float().square().sum() for gradient in gradients.values())

    learning, end_gradients = Slots.learning, Slots.end_gradients  # nothing learns, and no gradient is kept


class SlotExperts(LearningExperts, Slots):
    """Base of experts that are a slot each and bring their weights one at a time."""

    def __init__(self, original: nn.Module, adapter: Adapter | None = None, layer: int = 0) -> None:
        super().__init__(original, None, adapter, layer)
        self.tuned_fixed = self.fixed(self.tuned)
        self._adapted = None if adapter is None else _AdaptedSlots(self)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """``hidden_states [N, H]``, ``top_k_index [N, k]``, ``top_k_weights [N, k]`` -> ``[N, H]``."""
        pairs = sort_pairs(*choices(self, hidden_states, top_k_index, top_k_weights), self.num_experts)
        return dispatch(hidden_states, pairs, self._adapted or self)

    def at_rest(self, expert: int) -> dict[str, Tensor]:
        """Tensors of an expert where its weights are: the original's, by default."""
        return super().expert_tensors(expert)

    @abstractmethod
    def fetch(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Tensors of one expert where the layer computes, in ``dtype``; ``upcoming`` will be asked for next."""

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Tensors of an expert, with what its B's learned on top, where its weights are."""
        return self.with_learned(expert, expert, self.at_rest(expert))

    def write_back(self) -> None:
        """Write what B's learned into the original."""
        if self.adapter is not None:
            super().write_back()

    def matrices(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Matrices:
        """See :class:`Slots`."""
        return to_matrices(self.fetch(slot, upcoming, dtype), self.layout, dtype)


class _AdaptedSlots(StackedSlots):
    """Experts that bring their weights one at a time, with the B's of an adapter on top, which learn alone."""

    def __init__(self, experts: SlotExperts) -> None:
        kind = (experts.layout, experts.activation)
        super().__init__(*kind, {}, "slots", experts.tuned_fixed, experts.learned_stacks())
        self.fetch = experts.fetch

    def matrices(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> Matrices:
        """The weights that are fetched, with the slot's B's on top."""
        return to_matrices(self.formed(slot, self.fetch(slot, upcoming, dtype)), self.layout, dtype)


def dispatch(hidden: Tensor, pairs: Pairs, slots: Slots) -> Tensor:
    """Weighted outputs of the slots, summed per token: ``hidden [N, H] -> [N, H]``.

    Under autocast hidden states are cast to its type, and the pass computes in that.
    """
    keeps = torch.is_grad_enabled()  # inside a Function it never is
    with own_types(hidden) as dtype:
        computed, ends = hidden.to(dtype), None
        if slots.is_grouped(computed, pairs.counts):
            ends = torch.tensor(pairs.counts, device=hidden.device).cumsum(0, dtype=torch.int32)
        else:
            pairs = Pairs(*pad_pairs(computed, pairs.token, pairs.weight, pairs.counts))
        work = _Work(slots, pairs.counts, ends, keeps)
        out = _Pass.apply(computed, pairs.weight, pairs.token, work, *slots.learning())
    return out.to(hidden.dtype)


class _Pass(torch.autograd.Function):
    """:func:`dispatch`, forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, token: Tensor, work: _Work, *learning: Tensor) -> Tensor:
        out = torch.zeros(hidden.shape, device=hidden.device, dtype=wide_dtype(hidden.dtype))
        kept, activation = [], work.slots.activation
        for run in work.runs(hidden.dtype):
            rows, gate, weights = token[run.pairs], weight[run.pairs, None], run.matrices
            projected = run.linear(hidden.index_select(0, rows), weights.up, weights.up_bias)
            result = run.linear(activation.forward(projected), weights.down, weights.down_bias)
            if activation.post_norm is not None:
                result = activation.post_norm(result)
            run.add_rows(out, rows, _weighted(result.to(out.dtype), gate))
            if work.keeps and any(ctx.needs_input_grad):
                kept.append(projected)
        ctx.save_for_backward(hidden, weight, token, *kept)
        ctx.work = work
        return out.to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with own_types(gradient):
            return _backward(ctx, gradient)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (hidden, weight, token, *kept), work = ctx.saved_tensors, ctx.work
    slots, activation, wide = work.slots, work.slots.activation, wide_dtype(hidden.dtype)
    wants_hidden, wants_weight, *_ = ctx.needs_input_grad
    wants_slots = any(ctx.needs_input_grad[4:])
    hidden_gradient = torch.zeros(hidden.shape, device=hidden.device, dtype=wide) if wants_hidden else None
    weight_gradient = torch.zeros_like(weight) if wants_weight else None
    for run, projected in zip(work.runs(hidden.dtype, backward=True), reversed(kept), strict=True):
        rows, gate, weights = token[run.pairs], weight[run.pairs, None], run.matrices
        incoming = gradient.index_select(0, rows)
        act, pull = activation.backward(projected)
        if activation.post_norm is None:
            back = run.linear(incoming, weights.down.mT)
            through = (back * act).sum(1, dtype=wide)
            if weights.down_bias is not None:
                through += (incoming * weights.down_bias).sum(1, dtype=wide)
            back, incoming = _weighted(back, gate), _weighted(incoming, gate) if wants_slots else incoming
        else:
            result = run.linear(act, weights.down, weights.down_bias)
            normed, scaled = activation.norm_backward(result, (incoming * gate).to(incoming.dtype))
            through = (incoming * normed).sum(1, dtype=wide)
            back, incoming = run.linear(scaled, weights.down.mT), scaled
        back = pull(back)
        if weight_gradient is not None:
            weight_gradient[run.pairs] = through
        if wants_slots:
            up, down = (hidden.index_select(0, rows), back), (act, incoming)
            slots.add_products(run, up, down)
            del up, down, act, incoming
        if hidden_gradient is not None:
            run.add_rows(hidden_gradient, rows, run.linear(back, weights.up.mT))
    if hidden_gradient is not None:
        hidden_gradient = hidden_gradient.to(hidden.dtype)
    return hidden_gradient, weight_gradient, None, None, *(slots.end_gradients(work.counts) if wants_slots else ())


@dataclass(frozen=True)
class Run:
    """Pairs that are multiplied together: those of one slot, or of ALL by grouped products."""

    slot: int
    pairs: slice
    counts: list[int]
    matrices: Matrices
    ends: Tensor | None = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [n, i] @ weight (+ bias)``, each row with the weights of its slot."""
        if self.ends is None:
            return matmul(x, weight, bias)
        return F.grouped_mm(x.contiguous(), weight, offs=self.ends)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """``a.T @ b`` over the rows of each slot."""
        if self.ends is None:
            return matmul(a.T, b)
        return F.grouped_mm(a.contiguous().T, b.contiguous(), offs=self.ends)

    def gradients(self, layout: Layout, up: Product, down: Product) -> dict[str, Tensor]:
        """Weight gradients by stack name."""
        made = {}
        for name, pair in ((layout.up_name, up), ("down_proj", down)):
            made[name] = self.outer(*(pair if layout.is_transposed else reversed(pair)))
            if layout.has_bias:
                made[f"{name}_bias"] = pair[1].sum(0)
        return made

    def add_rows(self, out: Tensor, rows: Tensor, values: Tensor) -> None:
        """Add values to rows slot by slot: no row twice in a call, so the result is the same every time."""
        for row, value in zip(rows.split(self.counts), values.split(self.counts), strict=True):
            out.index_add_(0, row, value.to(out.dtype))


@dataclass(frozen=True)
class _Work:
    """Which slots a pass goes through; ``ends [S]`` of their pairs for grouped products, None slot by slot."""

    slots: Slots
    counts: list[int]
    ends: Tensor | None
    keeps: bool

    def runs(self, dtype: torch.dtype, backward: bool = False) -> Iterator[Run]:
        """In order; backward from the last slot to the first, so that what was used last is used first."""
        if self.ends is not None:
            yield Run(ALL, slice(None), self.counts, self.slots.matrices(ALL, (), dtype), self.ends)
            return
        ends = list(itertools.accumulate(self.counts))
        busy = [slot for slot, count in enumerate(self.counts) if count]
        if backward:
            busy.reverse()
        for position, slot in enumerate(busy, 1):
            pairs = slice(ends[slot] - self.counts[slot], ends[slot])
            yield Run(slot, pairs, [self.counts[slot]], self.slots.matrices(slot, busy[position:], dtype))


def _weighted(rows: Tensor, gate: Tensor) -> Tensor:
    """``rows * gate``, in place where the types allow it; what is given is not needed any more."""
    return rows.mul_(gate) if rows.dtype == gate.dtype else (rows * gate).to(rows.dtype)
