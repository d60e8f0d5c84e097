"""A participant's customised layer: tuned experts, merged experts, and a map from the originals to them.

Paper: sections 5 and 6; ``customized_moe(model, exps_config)`` there, :func:`customize` here.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import mask
from .adapter import Adapter, LearningExperts
from .dispatch import Pairs, StackedSlots, WatchedSlots, choices, dispatch, sort_pairs
from .find import MoELayer, check_expert, expert_tensors, layers, permute_neurons, read_layout
from .replace import replace_all
from .replace import restore as restore


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of each expert of one MoE layer; ``tuned``, ``groups`` and ``dropped`` together hold each once.

    Attributes:
        groups: Experts merged with one another: one frozen slot per group.
        weights: Merge weight of each member of each group, not negative, normalised inside the group; a group
            whose weights are all zero, or None, is merged uniformly.
        permutations: For each member of each group the order of its neurons ``[I]`` before averaging, or None.
        dropped: Experts that are taken out of the routing (FMES) and have no slot.

    Raises:
        ValueError: No whole numbers, an expert in two places, an empty group, or weights that do not fit the groups.
    """

    tuned: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    weights: tuple[tuple[float, ...], ...] | None = None
    permutations: tuple[tuple[Tensor | None, ...], ...] | None = field(default=None, compare=False)
    dropped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tuned", "dropped"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        object.__setattr__(self, "groups", tuple(_numbers("groups", group) for group in self.groups))
        everyone = self.experts
        twice = sorted({e for e in everyone if everyone.count(e) > 1})
        if twice:
            raise ValueError(f"plan: tuned, groups and dropped must be disjoint; experts {twice} are in two places")
        if () in self.groups:
            raise ValueError("groups: every group needs at least one expert, got an empty one")
        sizes = [len(group) for group in self.groups]
        for name, value in (("weights", self.weights), ("permutations", self.permutations)):
            if value is not None and [len(row) for row in value] != sizes:
                raise ValueError(f"{name}: expected one per member, sizes {sizes}, got {[len(row) for row in value]}")
        for row in self.weights or ():
            if min(row) < 0 or not sum(row) < float("inf"):
                raise ValueError(f"weights: expected finite numbers that are not negative, got {row}")

    @property
    def experts(self) -> list[int]:
        """All experts that the plan names."""
        return [*self.tuned, *(e for group in self.groups for e in group), *self.dropped]

    def shares(self, group: int) -> tuple[float, ...]:
        """Share of each member in a group's merged expert; they add up to 1. Paper: equation 2."""
        weights = self.weights[group] if self.weights is not None else (1.0,) * len(self.groups[group])
        total = float(sum(weights))
        return tuple(weight / total if total > 0 else 1 / len(weights) for weight in weights)

    def check(self, num_experts: int) -> None:
        """Raise ValueError unless the plan covers experts 0..num_experts-1 exactly."""
        missing = sorted(set(range(num_experts)) - set(self.experts))
        unknown = sorted(set(self.experts) - set(range(num_experts)))
        if missing or unknown:
            raise ValueError(
                f"plan: must cover experts 0..{num_experts - 1}; left out {missing}, not in this layer {unknown}"
            )


def _numbers(name: str, experts: Sequence[int]) -> tuple[int, ...]:
    """Numbers of experts, of whatever type of whole numbers, as plain ones."""
    try:
        return tuple(operator.index(expert) for expert in experts)
    except TypeError as error:
        raise ValueError(f"{name}: expected whole numbers of experts, got {experts!r}") from error


class CompactExperts(LearningExperts):
    """Experts of one layer as T tuned and M merged slots.

    A token's choices are mapped to slots; choices that fall on one slot are computed once with the sum of their gate
    weights. Merged slots are frozen: the backward pass goes through them and computes no weight gradient.

    Deviation: Llama-4 multiplies the gate weight into the expert's input, so choices on one slot stay separate there.

    Args:
        dtype: Type of the tuned parameters (float32 beside a 16-bit model); None takes the original's.
        adapter, layer: Of :class:`fluxlib.moe.adapter.LearningExperts`.
        merged: Stacks of the plan's last groups ``[n, ...]``, by name, which are then not merged anew.

    Attributes:
        slot_of: ``[E]`` long, the slot of each expert, -1 for dropped ones. Tuned slots come first.
        method: How slots are computed; see :class:`fluxlib.moe.dispatch.StackedSlots`.
    """

    slot_of: Tensor

    def __init__(
        self,
        original: nn.Module,
        plan: LayerPlan,
        dtype: torch.dtype | None = None,
        adapter: Adapter | None = None,
        layer: int = 0,
        merged: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(original, plan.tuned, adapter, layer)
        plan.check(self.num_experts)
        self.plan, self.num_tuned, self.num_merged = plan, len(plan.tuned), len(plan.groups)
        slot_of = torch.full((self.num_experts,), -1, dtype=torch.long, device=self.device)
        for slot, members in enumerate([*[(e,) for e in plan.tuned], *plan.groups]):
            slot_of[list(members)] = slot
        self.register_buffer("slot_of", slot_of, persistent=False)
        self.method = "auto"
        self.watch(0)
        self.tuned_fixed = self.fixed(plan.tuned)
        self._joins = any(len(group) > 1 for group in plan.groups) and not self.layout.is_dense
        given = merged or {name: getattr(original, name).detach()[:0] for name in self.layout.names}
        num_new = self.num_merged - len(next(iter(given.values())))
        new = [merge(original, plan, group) for group in range(num_new)]
        for name in self.layout.names:
            stack = getattr(original, name).detach()
            tuned = stack[list(plan.tuned)]
            if adapter is None:
                setattr(self, f"tuned_{name}", nn.Parameter(tuned.to(dtype or stack.dtype), requires_grad=True))
            else:
                self.register_buffer(f"tuned_{name}", tuned, persistent=False)
            parts = [tensors[name][None] for tensors in new]
            frozen = torch.cat([*parts, given[name].to(stack)])
            self.register_buffer(f"merged_{name}", frozen, persistent=False)

    def watch(self, count: int) -> None:
        """Measure the gradient norms of the experts in the first ``count`` frozen slots from now on.

        A backward pass then computes their weight gradients, one expert at a time, and keeps the norms alone.

        Raises:
            ValueError: Fewer frozen slots, or more than one expert in one of them.
        """
        groups = self.plan.groups[:count]
        if len(groups) < count or any(len(group) > 1 for group in groups):
            raise ValueError(f"count: expected at most the leading slots with one expert each, got {count}")
        self.watched = tuple(group[0] for group in groups)
        self.watched_fixed = self.fixed(self.watched)
        self.watched_norms = torch.zeros(count, device=self.device)

    def tuned_stacks(self) -> dict[str, Tensor]:
        """Stacks ``[T, ...]`` of the tuned experts by name; with an adapter as they were before."""
        return {name: getattr(self, f"tuned_{name}") for name in self.layout.names}

    def learned_stacks(self) -> dict[str, Tensor]:
        """What is trainable, by name: the tuned stacks, or with an adapter its B's ``[T, out, rank]``."""
        return self.tuned_stacks() if self.adapter is None else super().learned_stacks()

    def merged_stacks(self) -> dict[str, Tensor]:
        """Frozen stacks ``[M, ...]`` by name."""
        return {name: getattr(self, f"merged_{name}") for name in self.layout.names}

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """What stands for an expert: its own tensors if tuned, its group's if merged; views without an adapter."""
        check_expert(expert, self.num_experts)
        slot = int(self.slot_of[expert])
        if slot < 0:
            raise ValueError(f"expert: {expert} is dropped and has no slot")
        if slot >= self.num_tuned:
            return {name: stack[slot - self.num_tuned] for name, stack in self.merged_stacks().items()}
        return self.with_learned(expert, slot, {n: stack.detach()[slot] for n, stack in self.tuned_stacks().items()})

    def grads(self, expert: int) -> dict[str, Tensor]:
        """Gradients of what is learned of a tuned expert, by name, after a backward pass."""
        slot = self.plan.tuned.index(expert)
        return {name: stack.grad[slot] for name, stack in self.learned_stacks().items() if stack.grad is not None}

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """``hidden_states [N, H]``, ``top_k_index [N, k]``, ``top_k_weights [N, k]`` -> ``[N, H]``."""
        index, weights = choices(self, hidden_states, top_k_index, top_k_weights)
        slot = torch.where(index >= 0, self.slot_of[index.clamp(min=0)], -1)
        return self.compute(hidden_states, sort_pairs(slot, weights, self.num_tuned + self.num_merged, self._joins))

    def compute(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Tuned slots, whose weights get gradients, watched ones, and merged ones, whose weights don't, apart."""
        out, first, watched, frozen = None, 0, len(self.watched), self.merged_stacks()
        kind = (self.layout, self.activation)
        parts = [StackedSlots(*kind, self.tuned_stacks(), self.method, self.tuned_fixed, self.learned_stacks())]
        if watched:
            seen = {name: stack[:watched] for name, stack in frozen.items()}
            parts.append(WatchedSlots(*kind, seen, self.watched_norms, self.watched_fixed))
        rest = {name: stack[watched:] for name, stack in frozen.items()}
        parts.append(StackedSlots(*kind, rest, self.method))
        for slots in parts:
            if slots.count:
                made = dispatch(hidden, pairs.of_slots(first, first + slots.count), slots)
                out = made if out is None else out + made
                first += slots.count
        return torch.zeros_like(hidden) if out is None else out


@torch.no_grad()
def merge(experts: nn.Module, plan: LayerPlan, group: int) -> dict[str, Tensor]:
    """Weighted sum of a group's experts, accumulated in float32 (float64 for a float64 model). Paper: equation 2."""
    members, layout = plan.groups[group], read_layout(experts)
    orders = plan.permutations[group] if plan.permutations is not None else (None,) * len(members)
    out: dict[str, Tensor] = {}
    for expert, share, order in zip(members, plan.shares(group), orders, strict=True):
        tensors = expert_tensors(experts, expert)
        if order is not None:
            tensors = permute_neurons(tensors, order, layout)
        for name, tensor in tensors.items():
            wide = tensor if tensor.dtype == torch.float64 else tensor.float()
            out[name] = out[name].add_(wide, alpha=share) if name in out else wide * share
    return {name: tensor.to(expert_tensors(experts, members[0])[name].dtype) for name, tensor in out.items()}


def customize(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    dtype: torch.dtype | None = None,
    adapter: Adapter | None = None,
    merged: Sequence[Mapping[str, Tensor]] | None = None,
) -> nn.Module:
    """Put a :class:`CompactExperts` at every MoE layer, in place, and freeze everything but the tuned slots.

    Args:
        plans: One per MoE layer.
        dtype, adapter, merged: Of :class:`CompactExperts`; ``merged`` one per MoE layer.

    Raises:
        ValueError: The plans are not for this model, or its experts were replaced before. The model is then as it was.
    """
    num_layers = len(layers(model))
    if not isinstance(plans, Sequence) or not all(isinstance(plan, LayerPlan) for plan in plans):
        kinds = [type(plan).__name__ for plan in plans] if isinstance(plans, Sequence) else type(plans).__name__
        raise ValueError(f"plans: expected a list of LayerPlan, one per MoE layer, got {kinds}")
    if len(plans) != num_layers:
        raise ValueError(f"plans: expected one per MoE layer, {num_layers}, got {len(plans)}")

    def make(layer: MoELayer) -> CompactExperts:
        plan = plans[layer.index]
        try:
            given = None if merged is None else merged[layer.index]
            compact = CompactExperts(layer.experts, plan, dtype, adapter, layer.index, given)
            if plan.dropped:
                compact.on_restore.append(mask.drop(layer, plan.dropped))
        except ValueError as error:
            raise ValueError(f"plans[{layer.index}]: {error}") from error
        return compact

    replace_all(model, make)
    return model
