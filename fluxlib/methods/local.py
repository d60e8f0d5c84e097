"""Local fine-tuning, shared by all methods: a plan in, changes of the tuned experts and an account of the work out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fluxlib import profiling
from fluxlib.config import RunConfig
from fluxlib.methods.base import Batch, ExpertKey, LocalData, LocalRound, Update, Work
from fluxlib.moe import find
from fluxlib.moe.adapter import Adapter, LearningExperts
from fluxlib.moe.capture import capture
from fluxlib.moe.compact import CompactExperts, LayerPlan, customize
from fluxlib.moe.product import wide_dtype
from fluxlib.moe.replace import restoring
from fluxlib.tasks.batches import IGNORED, to_device


@dataclass(frozen=True)
class Tuned:
    """Result of :func:`tune`; ``K`` steps, ``L`` MoE layers, ``E`` experts per layer."""

    changes: dict[ExpertKey, dict[str, Tensor]]
    """New minus old weights."""
    squared_norms: Tensor
    """``[K, L, E]`` squared gradient norm per step, NaN where it is not known."""
    counts: Tensor
    """``[S, L, E]`` real tokens of each sample routed to each expert, over all steps."""
    gate: Tensor
    """``[L, E]`` squared gate weights, summed over the tokens of all steps."""
    slot_tokens: int
    """(token, slot) pairs computed per pass; choices of one token that fall on one merged slot are one pair."""
    loss: float
    """Mean training loss of the steps, each before its update."""

    @property
    def tokens(self) -> Tensor:
        """``[L, E]`` real tokens routed to each expert, over all steps."""
        return self.counts.sum(dim=0)


class Learner(Protocol):
    """What :func:`run_steps` trains: where gradients lie and what a step does to them."""

    def step(self) -> Tensor:
        """One optimizer step; ``[L, E]`` squared norm of each expert's gradient, NaN where it is not known."""

    def changes(self) -> dict[ExpertKey, dict[str, Tensor]]:
        """New minus old weights of every tuned expert."""


@contextmanager
def customized(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    config: RunConfig | None = None,
    merged: Sequence[Mapping[str, Tensor]] | None = None,
) -> Iterator[list[CompactExperts]]:
    """The model with each layer's plan in force; afterwards the model is exactly what it was before.

    With ``config`` tuned slots learn what the run says: all of them, or its adapter's B's. They are in 32 bits beside
    a model of 16: its own type would round most steps away. ``merged``: of :func:`fluxlib.moe.compact.customize`.
    """
    dtype = wide_dtype(next(model.parameters()).dtype)
    with restoring(customize(model, plans, dtype, None if config is None else Adapter.of(config), merged)):
        yield [layer.experts for layer in find.layers(model)]  # type: ignore[misc]


def tune(model: nn.Module, layers: Sequence[LearningExperts], batches: Sequence[Batch], config: RunConfig) -> Tuned:
    """:func:`run_steps` on what the layers of a model learn: tuned slots of a customised one, or adapters.

    The optimizer starts afresh: experts change roles from round to round.
    """
    return run_steps(model, _StackLearner(layers, config), batches, config)


def run_steps(model: nn.Module, learner: Learner, batches: Sequence[Batch], config: RunConfig) -> Tuned:
    """Forward, backward, count, step, once per batch; in the parts and with the memory that ``config.training`` says.

    Raises:
        FloatingPointError: the loss became NaN or infinite; the round's step and loss are named.
    """
    found, device = find.layers(model), next(model.parameters()).device
    norms, losses, counts, slot_tokens = [], [], [], 0
    gate = torch.zeros((len(found), found[0].num_experts), dtype=torch.float64)
    was_training = model.training
    model.train()
    more = {"use_cache": False} if config.training.checkpointing else {}
    try:
        if config.training.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        for step, whole in enumerate(batches, start=1):
            losses.append(0.0)
            for part, share in micro_batches(whole, config.training.micro_batch):
                batch = to_device(part, device)
                with capture(model) as seen:
                    loss = model(**batch, **more).loss * share
                if not torch.isfinite(loss):
                    rate = config.training.learning_rate
                    raise FloatingPointError(f"training loss is {loss.item()} at step {step} (learning_rate {rate:g})")
                loss.backward()
                losses[-1] += loss.item()
                mask = batch["attention_mask"].bool()
                hits, _, squares = profiling.count(seen, mask, found[0].num_experts)
                counts.append(hits)
                gate += squares
                for layer, one in zip(found, seen.layers, strict=True):
                    slot_tokens += num_pairs(layer.experts, one.top_k_index[0], mask)
            norms.append(learner.step())
    finally:
        model.train(was_training)
        if config.training.checkpointing:
            model.gradient_checkpointing_disable()  # type: ignore[operator]
    return Tuned(learner.changes(), torch.stack(norms), torch.cat(counts), gate, slot_tokens, sum(losses) / len(losses))


def micro_batches(batch: Batch, size: int | None) -> Iterator[tuple[Batch, float]]:
    """``batch`` in parts of at most ``size`` samples (None: all), each with its share of the scored tokens.

    The mean loss of a part times its share, summed over the parts, is the mean loss of the batch; so are gradients.
    """
    scored = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
    for rows in torch.arange(len(scored)).split(size or len(scored)):
        yield {name: tensor[rows] for name, tensor in batch.items()}, float(scored[rows].sum() / scored.sum())


class _StackLearner:
    """The learned stacks of layers."""

    def __init__(self, layers: Sequence[LearningExperts], config: RunConfig) -> None:
        self.layers = layers
        parameters = [p for layer in layers for p in layer.learned_stacks().values() if p.shape[0]]
        self.optimizer = make_optimizer(parameters, config)

    def step(self) -> Tensor:
        norms = squared_gradient_norms(self.layers)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for layer in self.layers:
            layer.watched_norms.zero_()
        return norms

    def changes(self) -> dict[ExpertKey, dict[str, Tensor]]:
        """On the host, where the originals are: beside weights, gradients and moments a device has no room for more."""
        found: dict[ExpertKey, dict[str, Tensor]] = {}
        for index, layer in enumerate(self.layers):
            for slot, expert in enumerate(layer.tuned):
                now = {name: p.detach()[slot].cpu() for name, p in layer.learned_stacks().items()}
                before = find.expert_tensors(layer.original, expert) if layer.adapter is None else {}
                found[index, expert] = {
                    name: new - before[name].to(new) if before else new.clone() for name, new in now.items()
                }  # B's begin at zero
        return found


def squared_gradient_norms(layers: Sequence[LearningExperts]) -> Tensor:
    """``[L, E]`` squared norm of each tuned and each watched expert's gradient, NaN for the others."""
    norms = torch.full((len(layers), layers[0].num_experts), float("nan"))
    for row, experts in zip(norms, layers, strict=True):
        stacks = [p for p in experts.learned_stacks().values() if p.shape[0]]
        for slot, expert in enumerate(experts.watched):
            row[expert] = experts.watched_norms[slot]
        if stacks:
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in stacks]
            row[list(experts.tuned)] = sum(g.flatten(1).float().square().sum(1) for g in grads).cpu()  # type: ignore[union-attr]
    return norms


def num_pairs(experts: nn.Module, top_k_index: Tensor, attention_mask: Tensor) -> int:
    """(token, slot) pairs that a layer computes for the real tokens of ``attention_mask [B, T]``.

    Experts with a ``slot_of`` map compute a slot once per token. ``top_k_index`` is ``[N, k]``, ``N = B * T``.
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


class Stopwatch:
    """Measured seconds by phase of a round."""

    def __init__(self) -> None:
        self.phases_s: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block's wall-clock time is that of the phase ``name``."""
        start = time.perf_counter()
        yield
        self.phases_s[name] = time.perf_counter() - start


def report(
    local: LocalRound,
    tuned: Tuned,
    watch: Stopwatch,
    plans: Sequence[LayerPlan] = (),
    utilities: Tensor | None = None,
    watched: Tensor | None = None,
    **work: Any,
) -> Update:
    """The update of a round, with the account of its local steps.

    Args:
        plans: the layers that were trained; empty: every expert was in a place of its own.
        utilities: ``[L, E]``, NaN where not measured; None: none was.
        watched: bool ``[L, E]``, experts whose weight gradients were computed too, for their norms.
        work: what else was done, by the names of :class:`Work`.
    """
    exploit, (num_samples, num_tokens) = local.roles.exploit, size(local.data.train)
    account = Work(
        num_experts=exploit.numel(),
        num_tuned=int(exploit.sum()),
        num_updated=int((exploit & (tuned.tokens > 0)).sum()),
        train_steps=len(local.data.train),
        train_samples=num_samples,
        train_tokens=num_tokens,
        routed_tokens=int(tuned.tokens.sum()),
        slot_tokens=tuned.slot_tokens,
        tuned_tokens=int(tuned.tokens[exploit if watched is None else exploit | watched].sum()),
        adapter_rank=local.config.adapter.used_rank,
        **slot_account(plans) | work,
    )
    if utilities is None:
        utilities = torch.full(exploit.shape, float("nan"))
    return Update(tuned.changes, utilities, tuned.tokens, tuned.loss, num_samples, account, watch.phases_s)


def slot_account(plans: Sequence[LayerPlan]) -> dict[str, Any]:
    """What the frozen slots of a round add to :class:`Work`; a slot of one expert is a copy, nothing is read for it."""
    groups = [group for plan in plans for group in plan.groups]
    return {"num_frozen": len(groups), "num_merge_sources": sum(len(group) for group in groups if len(group) > 1)}


def profile_account(data: LocalData, num_experts: int, config: RunConfig) -> dict[str, Any]:
    """What one profile of the full model adds to :class:`Work`."""
    samples, tokens = size(data.profile)
    bits = config.profiling.bits
    return {"profile_samples": samples, "profile_tokens": tokens, "profile_bits": bits, "num_quantized": num_experts}


def size(batches: Sequence[Batch]) -> tuple[int, int]:
    """Samples, and tokens without padding."""
    return sum(len(b["input_ids"]) for b in batches), sum(int(b["attention_mask"].sum()) for b in batches)
