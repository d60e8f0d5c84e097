"""Low-rank adapters of experts: a weight is ``W_base + B @ A``, A is fixed and the same for all, B is learned.

``A [rank, in]`` is drawn from the run's seed, for every expert's tensor another one, so it never travels. ``B [out,
rank]`` starts at zero. With A in common a mean of what participants learned is exact: ``mean(B_p) A = mean(B_p A)``
(FFA-LoRA, Sun et al. 2024). FedAvg of two learned factors is not: ``mean(B_p) mean(A_p)`` also has the products of one
participant's B with another's A, and is not ``mean(B_p A_p)``. LoRA's factor ``alpha / rank`` is in A here. Biases have
no adapter and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluxlib import seeding
from fluxlib.config import RunConfig

from .expert import Activation
from .find import ExpertKey, Layout, ReplacedExperts, expert_tensors, read_layout, write_expert
from .product import wide_dtype


@dataclass(frozen=True)
class Adapter:
    """The adapters of a run; an expert is named by ``(layer, expert)``, its tensors as in its layout."""

    rank: int
    alpha: float
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> Adapter | None:
        """That of a run; None where whole experts are tuned."""
        chosen = config.adapter
        return cls(chosen.rank, chosen.alpha, config.seed) if chosen.used_rank else None

    def fixed(self, key: ExpertKey, tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
        """``A * alpha / rank`` ``[rank, in]`` of each adapted tensor of an expert, in at least float32."""
        made = {}
        for name, tensor in _adapted(tensors).items():
            width = tensor.shape[0 if layout.is_transposed else 1]
            chance = seeding.generator(self.seed, "adapter", *key, name)
            drawn = torch.empty(self.rank, width).uniform_(-(width**-0.5), width**-0.5, generator=chance)
            made[name] = (drawn * (self.alpha / self.rank)).to(tensor.device, wide_dtype(tensor.dtype))
        return made

    def fixed_stacks(self, layer: int, experts: nn.Module, chosen: Iterable[int]) -> dict[str, Tensor]:
        """:meth:`fixed` of the ``chosen`` ones of a layer's original ``experts`` ``[n, rank, in]``; at least one."""
        layout = read_layout(experts)
        found = [self.fixed((layer, expert), expert_tensors(experts, expert), layout) for expert in chosen]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    def start(self, tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
        """``B [out, rank]`` of each adapted tensor before anything is learned: zero, in at least float32."""
        side = 1 if layout.is_transposed else 0
        return {
            name: torch.zeros(tensor.shape[side], self.rank, dtype=wide_dtype(tensor.dtype), device=tensor.device)
            for name, tensor in _adapted(tensors).items()
        }

    def added(
        self, key: ExpertKey, tensors: Mapping[str, Tensor], learned: Mapping[str, Tensor], layout: Layout
    ) -> dict[str, Tensor]:
        """An expert's ``tensors`` with what was ``learned`` on top; server and participants both come here."""
        made, fixed = dict(tensors), self.fixed(key, tensors, layout)
        for name, up in learned.items():
            made[name] = add_product(tensors[name], up.to(fixed[name]), fixed[name], layout)
        return made


class LearningExperts(ReplacedExperts):
    """Base of experts that are tuned: their weights learn, or with an adapter its B's.

    Args:
        tuned: Experts that learn, in the order of their stacks; None: all.
        adapter: Weights stay as they are and its B's learn, in at least float32; None: the weights learn.
        layer: Number of the layer, by which ``adapter`` knows its experts.

    Attributes:
        watched: Experts that do not learn, and whose gradients are measured.
        watched_norms: ``[W]`` squared norm of each watched expert's gradient, added up until it is set to zero.
        lora: B ``[T, out, rank]`` by stack name, where the layer computes; only with an adapter.
        tuned_fixed: :meth:`fixed` of the tuned experts.
    """

    tuned_fixed: dict[str, Tensor] | None

    def __init__(self, original: nn.Module, tuned: Sequence[int] | None, adapter: Adapter | None, layer: int) -> None:
        super().__init__(original)
        self.activation = Activation(original)
        self.post_norm = self.activation.post_norm
        self.tuned, self.adapter, self.layer = range(self.num_experts) if tuned is None else tuned, adapter, layer
        self.watched, self.watched_norms = tuple[int, ...](), torch.zeros(0, device=self.device)
        if adapter is not None:
            start = adapter.start(expert_tensors(original, 0), self.layout).items()
            stacks = {name: up.repeat(len(self.tuned), 1, 1).to(self.device) for name, up in start}
            self.lora = nn.ParameterDict(stacks)

    def fixed(self, experts: Sequence[int]) -> dict[str, Tensor] | None:
        """The adapter's A of some experts ``[n, rank, in]``, by name; None without an adapter, or without experts."""
        if self.adapter is None or not experts:
            return None
        found = self.adapter.fixed_stacks(self.layer, self.original, experts)
        return {name: stack.to(self.device) for name, stack in found.items()}

    def learned_stacks(self) -> dict[str, Tensor]:
        """What is trainable, by name: the adapter's B's ``[T, out, rank]``."""
        return dict(self.lora.items())

    def with_learned(self, expert: int, slot: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A tuned expert's ``tensors`` with what the B's in its slot learned, if there are any, on top."""
        if self.adapter is None:
            return tensors
        learned = {name: up.detach()[slot] for name, up in self.lora.items()}
        return self.adapter.added((self.layer, expert), tensors, learned, self.layout)

    def write_back(self) -> None:
        """Write the tuned experts into the original."""
        for expert in self.tuned:
            write_expert(self.original, expert, self.expert_tensors(expert))


def add_product(base: Tensor, up: Tensor, fixed: Tensor, layout: Layout) -> Tensor:
    """``W + B @ A`` in the tensor's layout, of one expert or of stacks of them."""
    change = up @ fixed
    return base + (change.mT if layout.is_transposed else change)


def sides(experts: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of an expert's matrices, summed; ``rank`` times that are the parameters of A and B."""
    shapes = [tensor.shape for tensor in _adapted(expert_tensors(experts, 0)).values()]
    first, second = (sum(shape[side] for shape in shapes) for side in (0, 1))
    return (first, second) if read_layout(experts).is_transposed else (second, first)


def _adapted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.dim() > 1}
