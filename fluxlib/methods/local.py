"""Local fine-tuning, shared by all methods: a plan in, changes of the tuned experts out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluxlib.config import RunConfig
from fluxlib.methods.base import Batch, ExpertKey
from fluxlib.moe import layers
from fluxlib.moe.capture import capture
from fluxlib.moe.compact import CompactExperts, LayerPlan, customize, restore
from fluxlib.tasks.batches import to_device


@dataclass(frozen=True)
class Tuned:
    """Result of :func:`tune`; ``K`` steps, ``L`` MoE layers, ``E`` experts per layer."""

    deltas: dict[ExpertKey, dict[str, Tensor]]
    squared_norms: Tensor
    """``[K, L, E]`` squared gradient norm per step, NaN for experts that were not tuned."""
    tokens: Tensor
    """``[L, E]`` real tokens routed to each expert, over all steps."""
    loss: float
    """Mean training loss of the steps, each before its update."""
    num_samples: int
    num_tokens: int


@contextmanager
def customized(model: nn.Module, plans: Sequence[LayerPlan]) -> Iterator[list[CompactExperts]]:
    """The model with each layer's plan in force; afterwards the model is exactly what it was before."""
    customize(model, plans)
    try:
        yield [layer.experts for layer in layers.find(model)]  # type: ignore[misc]
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
    parameters = [p for experts in compact for p in experts.tuned_stacks().values() if p.shape[0]]
    before = [{name: p.detach().clone() for name, p in experts.tuned_stacks().items()} for experts in compact]
    optimizer = _optimizer(parameters, config)
    device = parameters[0].device
    shape = (len(compact), compact[0].num_experts)
    norms, counts = [], torch.zeros(shape, dtype=torch.long)
    losses, num_samples, num_tokens = [], 0, 0
    for step, cpu_batch in enumerate(batches):
        batch = to_device(cpu_batch, device)
        with capture(model) as seen, training_mode(model):
            loss = model(**batch).loss
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"training loss is {loss.item()} at step {step + 1} (learning_rate {config.learning_rate:g})"
            )
        loss.backward()
        norms.append(squared_gradient_norms(compact))
        counts += routed_tokens([layer.top_k_index[0] for layer in seen.layers], batch["attention_mask"], shape[1])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        num_samples += len(batch["input_ids"])
        num_tokens += int(batch["attention_mask"].sum())
    deltas = {
        (index, expert): {
            name: (p.detach()[slot] - before[index][name][slot]) for name, p in experts.tuned_stacks().items()
        }
        for index, experts in enumerate(compact)
        for slot, expert in enumerate(experts.plan.tuned)
    }
    return Tuned(deltas, torch.stack(norms), counts, sum(losses) / len(losses), num_samples, num_tokens)


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


def _optimizer(parameters: list[Tensor], config: RunConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)


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
