"""What a configuration would do, before it is run: one participant's profile and plan, its memory and its time.

A forecast, and said to be one: the plan is that of one participant in round 1, where utilities are still activation
frequencies; time is the device clock's for the shares of the configuration, memory the planner's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxlib import methods, models, profiling, roles, seeding
from fluxlib.config import ConfigError, RunConfig
from fluxlib.devices import catalogue, clock, memory
from fluxlib.devices.memory_plan import MemoryPlan
from fluxlib.federation import load_task
from fluxlib.federation.budgets import make_budgets
from fluxlib.federation.options import check
from fluxlib.figures import Picture, overview
from fluxlib.methods import flux, fmes
from fluxlib.methods.base import Budget, Roles, Work
from fluxlib.moe.compact import LayerPlan
from fluxlib.tasks.batches import make_batch

MAX_SAMPLES = 32
"""Samples that are profiled for a preview: enough for a picture, and done in a moment."""


@dataclass(frozen=True)
class Preview:
    """What :func:`preview` found; ``[L, E]`` tensors are over MoE layers and experts."""

    config: RunConfig
    participant: int
    profile: profiling.Profile
    plans: tuple[LayerPlan, ...]
    explored: Tensor
    """Bool ``[L, E]``: kept as they are and probed."""
    budget: Budget
    device: catalogue.Device
    memory: dict[str, MemoryPlan]
    """By method, at the shapes of the clock's model: the chosen one and FMD."""
    seconds: dict[str, dict[str, float]]
    """Device seconds of one round by phase, by method."""

    @property
    def warning(self) -> str:
        """Empty, or why the device does not hold what was chosen."""
        found = self.memory.get(self.config.method)
        if found is None or found.fits is not False:
            return ""
        needed = max(found.peak_bytes, found.profile_bytes)
        return (
            f"{found.num_tuned} tuned and {found.num_merged} merged experts of {_shapes_name(self.config)} need "
            f"{needed / 2**30:.1f} GiB, {self.device.title} has {(found.usable_bytes or 0) / 2**30:.1f} GiB to use: "
            f"lower the budgets, or the batch ({self.config.batch_size})"
        )

    def picture(self) -> Picture:
        """Activation, plan, memory and time on one page."""
        space = {name: _gib_by_kind(plan) for name, plan in self.memory.items()}
        notes = (
            f"{Path(self.config.model).name}, {self.config.task}, participant {self.participant}, round 1",
            f"memory and time: shapes of {_shapes_name(self.config)} on {self.device.title}, {self.config.link}",
        )
        limit = self.device.memory_bytes / 2**30
        return overview(self.profile.frequency, self.plans, self.explored, space, limit, self.seconds, notes)


def _gib_by_kind(plan: MemoryPlan) -> dict[str, float]:
    """Memory on the device at the peak, with what is no expert in one."""
    kept = ("tuned experts", "gradients", "optimizer state", "activations")
    found: dict[str, float] = {}
    for row in plan.rows:
        if row.where == "device":
            frozen = row.kind.startswith(("merged experts", "experts in"))
            kind = row.kind if row.kind in kept else "frozen experts" if frozen else "other weights"
            found[kind] = found.get(kind, 0.0) + row.num_bytes / 2**30
    return found


def preview(config: RunConfig, participant: int = 0) -> Preview:
    """Look at what ``participant`` would do in round 1 of ``config``.

    Raises:
        ConfigError: an impossible name, budget or participant; the message says what is allowed.
    """
    check(config)
    if not 0 <= participant < config.participants:
        raise ConfigError(f"participant is {participant}, allowed is 0 to {config.participants - 1}")
    known, num_tokens = _profile(config, participant)
    budget = make_budgets(config, *known.frequency.shape)[participant]
    plans, assigned = _plan(config, known, budget)
    device = catalogue.fleet(config.fleet, config.participants)[participant]
    compared = list(dict.fromkeys((config.method, "fmd")))
    return Preview(
        config,
        participant,
        known,
        tuple(plans),
        assigned.explore,
        budget,
        device,
        {name: _memory(config, name, budget, known, device) for name in compared if name in memory.METHODS},
        {name: _seconds(config, name, assigned, plans, num_tokens, device) for name in compared},
    )


def _plan(config: RunConfig, known: profiling.Profile, budget: Budget) -> tuple[list[LayerPlan], Roles]:
    """What the method does with every expert of one participant in round 1."""
    state = roles.RoleState.start(known.frequency[None])
    epsilon = roles.epsilon_schedule(0, config.rounds, config.epsilon)
    chance = seeding.generator(config.seed, "assign", 1)
    assigned = methods.get(config.method).assign(state, [budget], epsilon, chance, config)
    part = Roles(assigned.exploit[0], assigned.explore[0])
    model, _ = _model(config.model)
    if config.method == "fmes":
        nobody = torch.zeros_like(part.exploit)
        return fmes.make_plans(model, known.frequency, part.exploit), Roles(part.exploit, nobody)
    if not bool(part.exploit.all()):
        return flux.make_plans(model, known, part, budget, config), part
    return [LayerPlan(tuned=tuple(range(row.numel()))) for row in part.exploit], part


@lru_cache(maxsize=2)
def _model(name: str) -> tuple[Any, Any]:
    try:
        return models.load(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model is {name!r}, it cannot be loaded: {error}") from None


PROFILE_FIELDS = (
    "model", "task", "seed", "task_size", "participants", "partition", "alpha", "equal_sizes", "profile_bits",
    "max_tokens",
)  # fmt: skip
"""What a participant's profile depends on: anything else may change without a new one."""


def _profile(config: RunConfig, participant: int) -> tuple[profiling.Profile, float]:
    values = tuple(getattr(config, name) for name in PROFILE_FIELDS)
    return _cached_profile(values, participant)


@lru_cache(maxsize=32)
def _cached_profile(values: tuple[Any, ...], participant: int) -> tuple[profiling.Profile, float]:
    """The profile of one participant's data, and its mean number of tokens per sample."""
    config = RunConfig(**dict(zip(PROFILE_FIELDS, values, strict=True)))
    model, tokenizer = _model(config.model)
    task, parts = load_task(config)
    examples = [task.train[index] for index in parts[participant][:MAX_SAMPLES]]
    try:
        batch = make_batch(examples, tokenizer, config.max_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    found = profiling.profile(model, [batch], bits=config.profile_bits)
    return found, found.num_tokens / len(examples)


def _shapes_name(config: RunConfig) -> str:
    return Path(config.model).name if config.clock_model == "self" else config.clock_model


def _memory(
    config: RunConfig, method: str, budget: Budget, known: profiling.Profile, device: catalogue.Device
) -> MemoryPlan:
    """The planner's answer for the same shares of the experts of the clock's model."""
    name = config.model if config.clock_model == "self" else config.clock_model
    total = known.frequency.numel()
    shares = (1.0, 0.0) if method in ("fmd", "fmq") else (budget.num_tuned / total, budget.num_merged / total)
    tokens = min(config.clock_tokens_per_sample or config.max_tokens, 512)
    limit = None if method != config.method else device.memory_bytes
    return _cached_memory(name, method, shares, config.batch_size, tokens, config.profile_bits, limit)


@lru_cache(maxsize=64)
def _cached_memory(
    name: str, method: str, shares: tuple[float, float], batch: int, tokens: int, bits: int, limit: int | None
) -> MemoryPlan:
    shapes = clock.shapes(name)
    num_tuned = max(1, round(shares[0] * shapes.num_experts))
    num_merged = round(shares[1] * shapes.num_experts) if method == "flux" else 0
    try:
        return memory.plan_memory(
            models.config(name), method, limit, num_tuned, num_merged, batch=batch, tokens=tokens,
            bits=bits if bits in (2, 3, 4, 8) else 8, name=name,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _seconds(
    config: RunConfig,
    method: str,
    assigned: Roles,
    plans: list[LayerPlan],
    tokens_per_sample: float,
    device: catalogue.Device,
) -> dict[str, float]:
    """Phases of a later round (its profile is a round old), for one participant."""
    work = _expected_work(config, method, assigned, plans, tokens_per_sample)
    name = config.model if config.clock_model == "self" else config.clock_model
    found = clock.phase_seconds(
        work, clock.shapes(name), device, catalogue.link(config.link), config.clock_tokens_per_sample
    )
    return {phase: seconds for phase, seconds in found.items() if seconds}


def _expected_work(
    config: RunConfig, method: str, assigned: Roles, plans: list[LayerPlan], tokens_per_sample: float
) -> Work:
    """What one participant does in a round, by count; what others changed is taken to be spread evenly."""
    total = assigned.exploit.numel()
    exploit = total if method in ("fmd", "fmq") else int(assigned.exploit.sum())
    samples = config.local_steps * config.batch_size
    profiles = method in ("flux", "fmes")
    profile_samples = config.profile_batches * config.batch_size if profiles else 0
    probed = min(int(assigned.explore.sum()), config.probes_per_round or total) if method == "flux" else 0
    passes = (1 + config.num_probes * probed) if probed else 0  # a probe runs half of the layers, twice
    changed = total * (1 - (1 - exploit / total) ** config.participants)
    frozen = sum(len(plan.groups) for plan in plans) if method == config.method and method != "fmd" else 0
    sources = sum(len(group) for plan in plans for group in plan.groups if len(group) > 1) if frozen else 0
    return Work(
        num_experts=total,
        num_tuned=exploit,
        num_frozen=frozen,
        num_merge_sources=sources,
        train_steps=config.local_steps,
        train_samples=samples,
        train_tokens=round(samples * tokens_per_sample),
        profile_samples=profile_samples,
        profile_tokens=round(profile_samples * tokens_per_sample),
        profile_bits=config.profile_bits,
        num_quantized=total if profiles else 0,
        probe_samples=passes * config.batch_size,
        probe_tokens=round(passes * config.batch_size * tokens_per_sample),
        weight_bits=config.fmq_bits if method == "fmq" else 16,
        offloaded=method == "fmd",
        num_downloaded=math.ceil(changed),
        num_uploaded=exploit,
    )
