"""Local fine-tuning, shared by all methods: a plan in, changes of the tuned experts out.

- :func:`tune` -- local steps on the tuned slots of a customised model,
- :func:`run_steps` -- the same loop for any :class:`Learner`: what a method may do otherwise is the step itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fluxlib import profiling
from fluxlib.config import RunConfig
from fluxlib.methods.base import Batch, ExpertKey, LocalData, LocalRound, Update, Work
from fluxlib.moe import find
from fluxlib.moe.capture import capture
from fluxlib.moe.compact import CompactExperts, LayerPlan, customize, restore
from fluxlib.tasks.batches import to_device


@dataclass(frozen=True)
class Tuned:
    """Result of :func:`tune`; ``K`` steps, ``L`` MoE layers, ``E`` experts per layer."""

    changes: dict[ExpertKey, dict[str, Tensor]]
    squared_norms: Tensor
    """``[K, L, E]`` squared gradient norm per step, NaN for experts that were not tuned."""
    tokens: Tensor
    """``[L, E]`` real tokens routed to each expert, over all steps."""
    loss: float
    """Mean training loss of the steps, each before its update."""
    num_samples: int
    num_tokens: int
    slot_tokens: int
    """(token, slot) pairs computed per pass; choices of one token that fall on one merged slot are one pair."""


class Learner(Protocol):
    """What :func:`run_steps` trains: where gradients lie and what a step does to them."""

    def squared_norms(self) -> Tensor:
        """``[L, E]`` squared norm of each tuned expert's gradient, NaN for the others."""

    def step(self) -> None:
        """One optimizer step; no gradient is left."""

    def changes(self) -> dict[ExpertKey, dict[str, Tensor]]:
        """New minus old weights of every tuned expert."""


@contextmanager
def customized(model: nn.Module, plans: Sequence[LayerPlan]) -> Iterator[list[CompactExperts]]:
    """The model with each layer's plan in force; afterwards the model is exactly what it was before."""
    customize(model, plans)
    try:
        yield [layer.experts for layer in find.layers(model)]  # type: ignore[misc]
    finally:
        restore(model, write=False)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and the like are on inside the block; afterwards the model is in the mode it was in."""
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)


def tune(model: nn.Module, compact: Sequence[CompactExperts], batches: Sequence[Batch], config: RunConfig) -> Tuned:
    """One optimizer step per batch on the tuned slots of a customised model.

    The optimizer starts afresh (experts change roles from round to round). Changes are new minus old weights.

    Raises:
        FloatingPointError: the loss became NaN or infinite; the round's step and loss are named.
    """
    return run_steps(model, _CompactLearner(compact, config), batches, config)


def run_steps(model: nn.Module, learner: Learner, batches: Sequence[Batch], config: RunConfig) -> Tuned:
    """The loop of :func:`tune`: forward, backward, count, step, once per batch.

    Raises:
        FloatingPointError: the loss became NaN or infinite; the round's step and loss are named.
    """
    found = find.layers(model)
    experts, num_experts = [layer.experts for layer in found], found[0].num_experts
    device = next(model.parameters()).device
    norms, counts = [], torch.zeros((len(experts), num_experts), dtype=torch.long)
    losses, num_samples, num_tokens, slot_tokens = [], 0, 0, 0
    for step, cpu_batch in enumerate(batches):
        batch = to_device(cpu_batch, device)
        with capture(model) as seen, training_mode(model):
            loss = model(**batch).loss
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"training loss is {loss.item()} at step {step + 1} (learning_rate {config.training.learning_rate:g})"
            )
        loss.backward()
        norms.append(learner.squared_norms())
        chosen = [layer.top_k_index[0] for layer in seen.layers]
        counts += routed_tokens(chosen, batch["attention_mask"], num_experts)
        slot_tokens += sum(num_pairs(*pair, batch["attention_mask"]) for pair in zip(experts, chosen, strict=True))
        learner.step()
        losses.append(loss.item())
        num_samples += len(batch["input_ids"])
        num_tokens += int(batch["attention_mask"].sum())
    mean = sum(losses) / len(losses)
    return Tuned(learner.changes(), torch.stack(norms), counts, mean, num_samples, num_tokens, slot_tokens)


class _CompactLearner:
    """Tuned slots of customised layers."""

    def __init__(self, compact: Sequence[CompactExperts], config: RunConfig) -> None:
        self.compact = compact
        self.before = [{name: p.detach().clone() for name, p in layer.tuned_stacks().items()} for layer in compact]
        parameters = [p for layer in compact for p in layer.tuned_stacks().values() if p.shape[0]]
        self.optimizer = make_optimizer(parameters, config)

    def squared_norms(self) -> Tensor:
        return squared_gradient_norms(self.compact)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def changes(self) -> dict[ExpertKey, dict[str, Tensor]]:
        return {
            (index, expert): {
                name: (p.detach()[slot] - self.before[index][name][slot]) for name, p in layer.tuned_stacks().items()
            }
            for index, layer in enumerate(self.compact)
            for slot, expert in enumerate(layer.plan.tuned)
        }


def squared_gradient_norms(compact: Sequence[CompactExperts]) -> Tensor:
    """``[L, E]`` squared norm of each tuned expert's gradient, NaN for the others."""
    norms = torch.full((len(compact), compact[0].num_experts), float("nan"))
    for index, experts in enumerate(compact):
        stacks = [p for p in experts.tuned_stacks().values() if p.shape[0]]
        if stacks:
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in stacks]
            total = sum(g.flatten(1).float().square().sum(1) for g in grads)
            norms[index, list(experts.plan.tuned)] = total.cpu()  # type: ignore[union-attr]
    return norms


def routed_tokens(top_k_index: Sequence[Tensor], attention_mask: Tensor, num_experts: int) -> Tensor:
    """``[L, E]`` number of real tokens routed to each expert.

    Args:
        top_k_index: one ``[N, k]`` per layer, ``N = B * T``.
        attention_mask: ``[B, T]``, 1 for real tokens.
    """
    real = attention_mask.reshape(-1).bool()
    return torch.stack([torch.bincount(index[real].reshape(-1), minlength=num_experts) for index in top_k_index]).cpu()


def num_pairs(experts: nn.Module, top_k_index: Tensor, attention_mask: Tensor) -> int:
    """(token, slot) pairs that a layer computes for the real tokens.

    Args:
        experts: the layer's experts; those with a ``slot_of`` map compute a slot once per token.
        top_k_index: ``[N, k]``, ``N = B * T``.
        attention_mask: ``[B, T]``, 1 for real tokens.
    """
    chosen = top_k_index[attention_mask.reshape(-1).bool()]
    slot_of = getattr(experts, "slot_of", None)
    if slot_of is None:
        return chosen.numel()
    slots = slot_of[chosen].sort(dim=1).values
    return len(slots) + int((slots[:, 1:] != slots[:, :-1]).sum())


def make_optimizer(parameters: Sequence[Tensor], config: RunConfig) -> torch.optim.Optimizer:
    """The run's optimizer, without weight decay."""
    if config.training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.training.learning_rate)
    return torch.optim.AdamW(parameters, lr=config.training.learning_rate, weight_decay=0.0, fused=True)


def profile(model: nn.Module, data: LocalData, config: RunConfig) -> profiling.Profile:
    """Section 4: activation on the participant's own data, seen through quantised experts."""
    return profiling.profile(model, data.profile, bits=config.profiling.bits)


def report(local: LocalRound, tuned: Tuned, watch: Stopwatch, utilities: Tensor | None = None, **work: Any) -> Update:
    """The update of a round, with the account of its local steps.

    Args:
        utilities: ``[L, E]``, NaN where not measured; None: none was.
        work: what else was done, by the names of :class:`Work`.
    """
    exploit = local.roles.exploit
    account = Work(
        num_experts=exploit.numel(),
        num_tuned=int(exploit.sum()),
        train_steps=len(local.data.train),
        train_samples=tuned.num_samples,
        train_tokens=tuned.num_tokens,
        routed_tokens=int(tuned.tokens.sum()),
        slot_tokens=tuned.slot_tokens,
        tuned_tokens=int(tuned.tokens[exploit].sum()),
        **work,
    )
    if utilities is None:
        utilities = torch.full(exploit.shape, float("nan"))
    return Update(tuned.changes, utilities, tuned.tokens, tuned.loss, tuned.num_samples, account, watch.phases_s)


def profile_account(data: LocalData, num_experts: int, config: RunConfig) -> dict[str, Any]:
    """What one profile of the full model adds to :class:`Work`."""
    return {
        "profile_samples": sum(len(batch["input_ids"]) for batch in data.profile),
        "profile_tokens": sum(int(batch["attention_mask"].sum()) for batch in data.profile),
        "profile_bits": config.profiling.bits,
        "num_quantized": num_experts,
    }


class Stopwatch:
    """Measured seconds by phase of a round."""

    def __init__(self) -> None:
        self.phases_s: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock time to the phase ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases_s[name] = self.phases_s.get(name, 0.0) + time.perf_counter() - start
