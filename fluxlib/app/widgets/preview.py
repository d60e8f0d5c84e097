"""What a configuration would do, before it is run: one participant's profile and plan, its memory and its time.

A forecast, and said to be one: the plan is that of one participant in round 1, where utilities are still activation
frequencies. Time is the device clock's for a plan of the last round, when least is explored and most is sent; memory is
the planner's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxlib import methods, models, profiling, roles, seeding
from fluxlib.config import RunConfig, make_config
from fluxlib.devices import catalogue, clock, memory
from fluxlib.devices.memory import MemoryPlan, Step
from fluxlib.federation import load_task
from fluxlib.federation.checks import check, make_budgets
from fluxlib.federation.protocol.wire import bits_per_weight
from fluxlib.figures import Picture, dashboard
from fluxlib.io import ConfigError, reading
from fluxlib.methods import flux, flux_plus, fmes, fmq
from fluxlib.methods.base import Budget, Work
from fluxlib.methods.local import slot_account
from fluxlib.moe import find
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
    device: catalogue.Device
    memory: dict[str, MemoryPlan]
    """By method, at the shapes of the clock's model: the chosen one and FMD."""
    works: dict[str, Work]
    """What the participant is expected to do in the last round, by method."""
    seconds: dict[str, dict[str, float]]
    """Device seconds of it by phase, by method."""

    @property
    def warning(self) -> str:
        """Empty, or why the device does not hold what was chosen."""
        found = self.memory.get(self.config.method)
        if found is None or found.fits is not False:
            return ""
        needed = max(found.peak_bytes, found.profile_bytes)
        return (
            f"Does not fit: {found.num_tuned} tuned and {found.num_merged} merged experts of "
            f"{Path(self.config.sized_as).name} need {needed / 2**30:.1f} GiB, {self.device.title} has "
            f"{(found.usable_bytes or 0) / 2**30:.1f} to use. `fluxlib plan` says what would."
        )

    def summary(self) -> list[str]:
        """The picture in three sentences."""
        plan, seconds = self.memory.get(self.config.method), self.seconds[self.config.method]
        total, tuned = self.profile.frequency.numel(), sum(len(plan.tuned) for plan in self.plans)
        explored, dropped = int(self.explored.sum()), sum(len(plan.dropped) for plan in self.plans)
        merged = [group for plan in self.plans for group in plan.groups if len(group) > 1]
        others = f", {explored} explored" * bool(explored)
        others += f", {sum(map(len, merged))} share {len(merged)} merged slots" * bool(merged)
        others += f", {dropped} dropped" * bool(dropped)
        said = [f"Participant {self.participant} in round 1: {tuned} of {total} experts tuned{others}."]
        if plan is not None and plan.usable_bytes:
            needed = max(plan.peak_bytes, plan.profile_bytes)
            said.append(f"Memory: {needed / 2**30:.3g} of {plan.usable_bytes / 2**30:.3g} GiB usable on "
                        f"{self.device.title}.")  # fmt: skip
        own, full = sum(seconds.values()), sum(self.seconds["fmd"].values())
        moved = sum(seconds.get(phase, 0.0) for phase in ("download", "upload"))
        beside = f"; FMD takes {full / own:.1f} times as long" if self.config.method != "fmd" else ""
        said.append(f"Last round: {own:.3g} s on the device clock, {moved / own:.0%} of it transfer{beside}.")
        return said

    def picture(self) -> Picture:
        """Activation, plan, memory and time on one page."""
        config, device = self.config, self.device
        space = {name: _gib_by_kind(plan) for name, plan in self.memory.items()}
        whose = f"{Path(config.model).name}, {config.task}, participant {self.participant}, plan of round 1"
        sized = f"{Path(config.sized_as).name} on {device.title} over {config.clock.link}, last round"
        notes, limit = (whose, f"memory and time: sized as {sized}"), device.memory_bytes / 2**30
        return dashboard.overview(self.profile.frequency, self.plans, self.explored, space, limit, self.seconds, notes)


def _gib_by_kind(plan: MemoryPlan) -> dict[str, float]:
    """Memory on the device at the peak, with what is no expert in one."""
    kept = ("tuned experts", "gradients", "optimizer state", "activations")
    found: dict[str, float] = {}
    for row in (row for row in plan.rows if row.where == "device"):
        frozen = row.kind.startswith(("merged experts", "experts in"))
        kind = row.kind if row.kind in kept else "frozen experts" if frozen else "other weights"
        found[kind] = found.get(kind, 0.0) + row.num_bytes / 2**30
    return found


def preview(config: RunConfig, participant: int = 0) -> Preview:
    """Look at what ``participant`` would do in round 1 of ``config``; ConfigError: an impossible name or number."""
    check(config)
    if not 0 <= participant < config.federation.participants:
        raise ConfigError(f"participant is {participant}, allowed is 0 to {config.federation.participants - 1}")
    kept = {name: value for name, value in config.settings().items() if name.startswith(PROFILE_SETTINGS)}
    known, num_tokens = _profile(make_config(kept), participant)
    budget = make_budgets(config, *known.frequency.shape)[participant]
    plans, assigned = _plan(config, known, budget, 1)
    explores = methods.get(config.method).explores
    late = _plan(config, known, budget, config.federation.rounds) if explores else (plans, assigned)
    device = catalogue.fleet(config.clock.fleet, config.federation.participants)[participant]
    compared = list(dict.fromkeys((config.method, "fmd")))
    works = {name: expected_work(config, name, late[1], late[0], known.frequency, num_tokens) for name in compared}
    shapes, link, whose = clock.shapes(config.sized_as), catalogue.link(config.clock.link), config.clock
    seconds = {
        name: clock.phase_seconds(work, shapes, device, link, whose.tokens_per_sample, whose.offloading)
        for name, work in works.items()
    }
    return Preview(
        config,
        participant,
        known,
        tuple(plans),
        assigned.explore,
        device,
        {name: predict_memory(config, name, budget, known, device) for name in compared if name in memory.METHODS},
        works,
        {name: {phase: each for phase, each in phases.items() if each} for name, phases in seconds.items()},
    )


def _plan(
    config: RunConfig, known: profiling.Profile, budget: Budget, round_number: int
) -> tuple[list[LayerPlan], roles.Roles]:
    """What the method does with every expert of one participant, where frequencies are all that is known."""
    state = roles.RoleState.start(known.frequency[None])
    chance = seeding.generator(config.seed, "assign", round_number)
    epsilon = roles.epsilon_schedule(round_number - 1, config.federation.rounds, config.roles.epsilon)
    assigned = methods.get(config.method).assign(state, [budget], epsilon, chance, config)
    part = assigned[0]
    model, _ = _model(config.model)
    if config.method == "fmes":
        nobody = torch.zeros_like(part.exploit)
        return fmes.make_plans(model, known.frequency, part.exploit), roles.Roles(part.exploit, nobody)
    if not bool(part.exploit.all()):
        rules = flux_plus.MERGING if config.method == "flux_plus" else config.merging
        return flux.make_plans(model, known, part, budget, rules, config.seed), part
    return [LayerPlan(tuned=tuple(range(row.numel()))) for row in part.exploit], part


@lru_cache(maxsize=2)
def _model(name: str) -> tuple[Any, Any]:
    with reading(f"model is {name!r}, it cannot be loaded"):
        return models.load(name)


PROFILE_SETTINGS = (
    "model", "task", "seed", "data", "federation.participants", "profiling.bits", "training.max_tokens",
)  # fmt: skip
"""What a participant's profile depends on: anything else may change without a new one."""


@lru_cache(maxsize=32)
def _profile(config: RunConfig, participant: int) -> tuple[profiling.Profile, float]:
    """The profile of one participant's data, and its mean number of tokens per sample."""
    model, tokenizer = _model(config.model)
    task, parts = load_task(config)
    examples = [task.train[index] for index in parts[participant][:MAX_SAMPLES]]
    try:
        batch = make_batch(examples, tokenizer, config.training.max_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    found = profiling.profile(model, [batch], bits=config.profiling.bits)
    return found, found.num_tokens / len(examples)


def predict_memory(
    config: RunConfig, method: str, budget: Budget, known: profiling.Profile, device: catalogue.Device
) -> MemoryPlan:
    """The planner's answer for the same shares of the experts of the clock's model; ConfigError: it has not as many."""
    name, total = config.sized_as, clock.shapes(config.sized_as).num_experts
    share = 1.0 if method in ("fmd", "fmq") else budget.num_tuned / known.frequency.numel()
    num_tuned = max(1, round(share * total))
    num_merged = round(budget.num_merged / known.frequency.numel() * total) if method in ("flux", "flux_plus") else 0
    tokens = min(config.clock.tokens_per_sample or config.training.max_tokens, 512)
    bits = config.training.fmq_bits if config.method == "fmq" else config.profiling.bits
    step = Step(config.training.batch_size, tokens, bits=min(bits, 8), rank=config.adapter.used_rank)
    limit = int(device.memory_bytes) if method == config.method else None
    try:
        return memory.plan_memory(models.config(name), method, limit, num_tuned, num_merged, step)
    except ValueError as error:
        said = f"budget.tune_frac is {share:.3g}, {num_tuned} of {total} experts of {Path(name).name}"
        raise ConfigError(f"{said}: {error}") from None


def expected_work(
    config: RunConfig,
    method: str,
    assigned: roles.Roles,
    plans: Sequence[LayerPlan],
    frequency: Tensor,
    tokens_per_sample: float,
) -> Work:
    """What one participant does in a round, by count; the account that :class:`Work` gives afterwards.

    Four numbers are estimates: tokens are those of mean samples, routed as the profile (``frequency``, ``[L, E]``)
    says; an expert that got no token there gets none; each choice of a token is computed by itself (``slot_tokens``);
    what others changed is spread evenly over the experts: too many downloads where participants tune the same ones.

    ``method`` is the one of ``config``, whose roles and plans these are, or one that tunes every expert.
    """
    exploit, explore = assigned.exploit, assigned.explore
    if method != config.method:
        exploit, explore, plans = torch.ones_like(exploit), torch.zeros_like(explore), ()
    total, steps, batch_size = exploit.numel(), config.training.local_steps, config.training.batch_size
    samples = steps * batch_size
    looks = methods.get(method).profiles and method != "flux_plus"  # FLUX+ sees its training's own passes
    profiled = config.profiling.batches * batch_size * looks
    reached = frequency.clone()
    for row, plan in zip(reached, plans, strict=False):
        row[list(plan.dropped)] = 0.0
    routed = round(samples * tokens_per_sample) * sum(layer.top_k for layer in find.layers(_model(config.model)[0]))
    with_gradient = exploit | explore if method == "flux_plus" else exploit
    keys = explore.nonzero().tolist()
    once, each = flux.forward_passes(keys, len(frequency), config) if method == "flux" else (0.0, 0.0)
    probed = batch_size * once, batch_size * each * roles.num_probed(config.roles, len(keys)) / max(1, len(keys))
    num_tuned, num_updated = int(exploit.sum()), int((exploit & (frequency > 0)).sum())
    # Each participant changes as many, whichever; FLUX+ gets those that it tunes, and the others later.
    changed = math.ceil(total * (1 - (1 - num_updated / total) ** config.federation.participants))
    slots = slot_account(plans)
    if method == "flux_plus":  # its slots stay for some rounds
        slots["num_merge_sources"] //= flux_plus.MAX_STALENESS
    few_bits = config.training.fmq_bits if method == "fmq" and config.training.fmq_bits < 16 else None
    on_link = few_bits + fmq.SCALE_BITS if few_bits else math.inf
    return Work(
        num_experts=total,
        num_tuned=num_tuned,
        num_updated=num_updated,
        **slots,
        train_steps=steps,
        train_samples=samples,
        train_tokens=round(samples * tokens_per_sample),
        routed_tokens=routed,
        slot_tokens=routed,
        tuned_tokens=round(routed * float(reached[with_gradient].sum() / reached.sum())),
        profile_samples=profiled,
        profile_tokens=round(profiled * tokens_per_sample),
        profile_bits=few_bits or (config.profiling.bits if looks else 16),
        num_quantized=total if looks or few_bits else 0,
        probe_samples=round(probed[0]),
        probe_tokens=round(probed[0] * tokens_per_sample),
        expert_probe_samples=round(probed[1]),
        expert_probe_tokens=round(probed[1] * tokens_per_sample),
        adapter_rank=config.adapter.used_rank,
        weight_bits=few_bits or 16,
        offloaded=method in ("fmd", "fmq"),
        num_downloaded=round(changed * num_tuned / total) if method == "flux_plus" else changed,
        num_uploaded=num_updated,
        download_bits=min(on_link, bits_per_weight(config.wire.downlink)),
        upload_bits=min(on_link, bits_per_weight(config.wire.uplink)),
        hidden_profile=method == "flux" and config.profiling.stale,
    )
