"""What a configuration would do, before it is run: one participant's profile and plan, its memory and its time.

A forecast, and said to be one: the plan is that of one participant in round 1, where utilities are still activation
frequencies. Time is the device clock's for a plan of the last round, when least is explored and most is sent; memory is
the planner's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxlib import methods, models, profiling, roles, seeding
from fluxlib.config import ConfigError, RunConfig, make_config
from fluxlib.devices import catalogue, clock, memory
from fluxlib.devices.memory import MemoryPlan, Step
from fluxlib.federation import load_task
from fluxlib.federation.checks import check, make_budgets
from fluxlib.federation.protocol.wire import bits_per_weight
from fluxlib.figures import Picture, dashboard
from fluxlib.methods import flux, flux_plus, fmes, fmq
from fluxlib.methods.base import Budget, Work
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
    budget: Budget
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
            f"{shapes_name(self.config)} need {needed / 2**30:.1f} GiB, {self.device.title} has "
            f"{(found.usable_bytes or 0) / 2**30:.1f} to use. `fluxlib plan` says what would."
        )

    def summary(self) -> list[str]:
        """The picture in three sentences."""
        plan, seconds = self.memory.get(self.config.method), self.seconds[self.config.method]
        total = self.profile.frequency.numel()
        tuned = sum(len(plan.tuned) for plan in self.plans)
        explored = int(self.explored.sum())
        merged = [group for plan in self.plans for group in plan.groups if len(group) > 1]
        shared = f", {sum(map(len, merged))} share {len(merged)} merged slots" if merged else ""
        others = f", {explored} explored" * bool(explored) + shared
        dropped = sum(len(plan.dropped) for plan in self.plans)
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
        space = {name: _gib_by_kind(plan) for name, plan in self.memory.items()}
        notes = (
            f"{Path(self.config.model).name}, {self.config.task}, participant {self.participant}, plan of round 1",
            f"memory and time: sized as {shapes_name(self.config)} on {self.device.title} over "
            f"{self.config.clock.link}, last round",
        )
        limit = self.device.memory_bytes / 2**30
        return dashboard.overview(self.profile.frequency, self.plans, self.explored, space, limit, self.seconds, notes)


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
    if not 0 <= participant < config.federation.participants:
        raise ConfigError(f"participant is {participant}, allowed is 0 to {config.federation.participants - 1}")
    known, num_tokens = _profile(config, participant)
    budget = make_budgets(config, *known.frequency.shape)[participant]
    plans, assigned = _plan(config, known, budget, 1)
    explores = methods.get(config.method).explores
    late = _plan(config, known, budget, config.federation.rounds) if explores else (plans, assigned)
    device = catalogue.fleet(config.clock.fleet, config.federation.participants)[participant]
    compared = list(dict.fromkeys((config.method, "fmd")))
    top_k_sum = sum(layer.top_k for layer in find.layers(_model(config.model)[0]))
    share = Share(late[1], late[0], known.frequency, top_k_sum, num_tokens)
    works = {name: expected_work(config, name, share) for name in compared}
    return Preview(
        config,
        participant,
        known,
        tuple(plans),
        assigned.explore,
        budget,
        device,
        {name: predict_memory(config, name, budget, known, device) for name in compared if name in memory.METHODS},
        works,
        {name: predict_seconds(config, work, device) for name, work in works.items()},
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
    try:
        return models.load(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model is {name!r}, it cannot be loaded: {error}") from None


PROFILE_SETTINGS = (
    "model", "task", "seed", "data", "federation.participants", "profiling.bits", "training.max_tokens",
)  # fmt: skip
"""What a participant's profile depends on: anything else may change without a new one."""


def _profile(config: RunConfig, participant: int) -> tuple[profiling.Profile, float]:
    """The profile of one participant's data, and its mean number of tokens per sample."""
    kept = {name: value for name, value in config.settings().items() if name.startswith(PROFILE_SETTINGS)}
    return _cached_profile(make_config(kept), participant)


@lru_cache(maxsize=32)
def _cached_profile(config: RunConfig, participant: int) -> tuple[profiling.Profile, float]:
    model, tokenizer = _model(config.model)
    task, parts = load_task(config)
    examples = [task.train[index] for index in parts[participant][:MAX_SAMPLES]]
    try:
        batch = make_batch(examples, tokenizer, config.training.max_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    found = profiling.profile(model, [batch], bits=config.profiling.bits)
    return found, found.num_tokens / len(examples)


def shapes_name(config: RunConfig) -> str:
    """Its name without a folder."""
    return Path(shapes_of(config)).name


def shapes_of(config: RunConfig) -> str:
    """The model that memory and time are predicted for."""
    return config.model if config.clock.model == "self" else config.clock.model


def predict_memory(
    config: RunConfig, method: str, budget: Budget, known: profiling.Profile, device: catalogue.Device
) -> MemoryPlan:
    """The planner's answer for the same shares of the experts of the clock's model.

    Raises:
        ConfigError: the model does not have as many or as few experts.
    """
    name, total = shapes_of(config), clock.shapes(shapes_of(config)).num_experts
    share = 1.0 if method in ("fmd", "fmq") else budget.num_tuned / known.frequency.numel()
    num_tuned = max(1, round(share * total))
    num_merged = round(budget.num_merged / known.frequency.numel() * total) if method in ("flux", "flux_plus") else 0
    limit = device.memory_bytes if method == config.method else None
    try:
        return _planned(name, method, limit, num_tuned, num_merged, _step(config))
    except ValueError as error:
        said = f"budget.tune_frac is {share:.3g}, {num_tuned} of {total} experts of {Path(name).name}"
        raise ConfigError(f"{said}: {error}") from None


def _step(config: RunConfig) -> Step:
    tokens = min(config.clock.tokens_per_sample or config.training.max_tokens, 512)
    bits = config.training.fmq_bits if config.method == "fmq" else config.profiling.bits
    return Step(config.training.batch_size, tokens, bits=min(bits, 8), rank=config.adapter.used_rank)


@lru_cache(maxsize=64)
def _planned(
    name: str, method: str, memory_bytes: int | None, num_tuned: int | None, num_merged: int | None, step: Step
) -> MemoryPlan:
    return memory.plan_memory(models.config(name), method, memory_bytes, num_tuned, num_merged, step)


def predict_seconds(config: RunConfig, work: Work, device: catalogue.Device) -> dict[str, float]:
    """Phases of a later round (its profile is a round old), for one participant."""
    shapes, link = clock.shapes(shapes_of(config)), catalogue.link(config.clock.link)
    found = clock.phase_seconds(work, shapes, device, link, config.clock.tokens_per_sample, config.clock.offloading)
    return {phase: seconds for phase, seconds in found.items() if seconds}


@dataclass(frozen=True)
class Share:
    """A participant's part in a round, before it is done.

    Attributes:
        assigned: its roles, ``[L, E]`` each.
        plans: one per MoE layer.
        frequency: ``[L, E]`` of its profile.
        top_k_sum: experts that a token passes through, over all layers.
        tokens_per_sample: mean of its data.
    """

    assigned: roles.Roles
    plans: Sequence[LayerPlan]
    frequency: Tensor
    top_k_sum: int
    tokens_per_sample: float


def expected_work(config: RunConfig, method: str, share: Share) -> Work:
    """What one participant does in a round, by count; the account that :class:`Work` gives afterwards.

    Four numbers are estimates: tokens are those of mean samples, routed as the profile says; an expert that got no
    token there gets none; each choice of a token is computed by itself (``slot_tokens``); what others changed is taken
    to be spread evenly over the experts, so downloads are rather too many where participants tune the same ones.

    Args:
        method: the one of ``config``, for which ``share`` holds, or one that tunes every expert.
    """
    exploit, explore, tokens_per_sample = share.assigned.exploit, share.assigned.explore, share.tokens_per_sample
    samples = config.training.local_steps * config.training.batch_size
    work = Work(
        num_experts=exploit.numel(),
        train_steps=config.training.local_steps,
        train_samples=samples,
        train_tokens=round(samples * tokens_per_sample),
        adapter_rank=config.adapter.used_rank,
        download_bits=bits_per_weight(config.wire.downlink),
        upload_bits=bits_per_weight(config.wire.uplink),
    )
    if method != config.method or bool(exploit.all()):
        return _tuning_everything(config, method, work, int((share.frequency > 0).sum()))
    total, num_updated = work.num_experts, int((exploit & (share.frequency > 0)).sum())
    dropped = torch.zeros_like(exploit)
    for row, plan in zip(dropped, share.plans, strict=True):
        row[list(plan.dropped)] = True
    reached = share.frequency.masked_fill(dropped, 0.0)
    routed = work.train_tokens * share.top_k_sum
    looks, changed = method != "flux_plus", _changed(config, total, num_updated)
    samples = config.profiling.batches * config.training.batch_size * looks
    keys = [(int(layer), int(expert)) for layer, expert in explore.nonzero()]
    once, each = flux.forward_passes(keys, len(share.frequency), config) if method == "flux" else (0.0, 0.0)
    probed = roles.num_probed(config.roles, len(keys)) / max(1, len(keys))  # the others of them are not
    once, each = (n * config.training.batch_size for n in (once, each * probed))
    return replace(
        work,
        num_tuned=int(exploit.sum()),
        num_updated=num_updated,
        num_frozen=sum(len(plan.groups) for plan in share.plans),
        num_merge_sources=sum(len(group) for plan in share.plans for group in plan.groups if len(group) > 1),
        routed_tokens=routed,
        slot_tokens=routed,
        tuned_tokens=round(routed * float(reached[exploit if looks else exploit | explore].sum() / reached.sum())),
        profile_samples=samples,
        profile_tokens=round(samples * tokens_per_sample),
        profile_bits=config.profiling.bits,
        num_quantized=total * looks,
        probe_samples=round(once),
        probe_tokens=round(once * tokens_per_sample),
        expert_probe_samples=round(each),
        expert_probe_tokens=round(each * tokens_per_sample),
        hidden_profile=method == "flux" and config.profiling.stale,
        num_downloaded=changed if looks else round(changed * int(exploit.sum()) / total),
        num_uploaded=num_updated,
    )


def _changed(config: RunConfig, total: int, num_changed: int) -> int:
    """Experts that change somewhere when each participant changes ``num_changed``, whichever."""
    return math.ceil(total * (1 - (1 - num_changed / total) ** config.federation.participants))


def _tuning_everything(config: RunConfig, method: str, work: Work, num_used: int) -> Work:
    """The account of FMD and FMQ, and of any other budget that is everything; ``num_used`` experts get tokens."""
    total, bits = work.num_experts, config.training.fmq_bits
    work = replace(
        work,
        num_tuned=total,
        num_updated=num_used,
        num_downloaded=_changed(config, total, num_used),
        num_uploaded=num_used,
        offloaded=method in ("fmd", "fmq"),
    )
    if method != "fmq" or bits == 16:
        return work
    down, up = (min(bits + fmq.SCALE_BITS, own) for own in (work.download_bits, work.upload_bits))
    return replace(work, num_quantized=total, profile_bits=bits, weight_bits=bits, download_bits=down, upload_bits=up)
