"""What a configuration would do, before it is run: one participant's profile and plan, its memory and its time.

A forecast, and said to be one: the plan is that of one participant in round 1, where utilities are still activation
frequencies. Time is the device clock's for a plan of the last round, when least is explored and most is sent; memory is
the planner's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxlib import methods, models, profiling, roles, seeding
from fluxlib.app.widgets.forecast import Share, expected_work, predict_memory, predict_seconds, shapes_name, what_fits
from fluxlib.config import ConfigError, RunConfig, make_config
from fluxlib.devices import catalogue, memory
from fluxlib.devices.memory import MemoryPlan
from fluxlib.federation import load_task
from fluxlib.federation.checks import check, make_budgets
from fluxlib.figures import Picture, dashboard
from fluxlib.methods import flux, fmes
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
    epsilon: float
    """Share of the budget that exploits in the last round; 1 for a method that does not explore."""
    works: dict[str, Work]
    """What the participant is expected to do in the last round, by method."""
    seconds: dict[str, dict[str, float]]
    """Device seconds of it by phase, by method."""

    @property
    def warning(self) -> str:
        """Empty, or why the device does not hold what was chosen, and what it would hold."""
        found = self.memory.get(self.config.method)
        if found is None or found.fits is not False:
            return ""
        needed = max(found.peak_bytes, found.profile_bytes)
        return (
            f"Does not fit: {found.num_tuned} tuned and {found.num_merged} merged experts of "
            f"{shapes_name(self.config)} need {needed / 2**30:.1f} GiB, {self.device.title} has "
            f"{(found.usable_bytes or 0) / 2**30:.1f} to use. {self._what_fits()}"
        )

    def _what_fits(self) -> str:
        found = what_fits(self.config, self.device)
        if found is None or not found[0]:
            return f"With batches of {self.config.training.batch_size} no budget does: take another device or method."
        merged = f" with budget.merge_frac {found[1]:.2f}" if found[1] else ""
        return f"About budget.tune_frac {found[0]:.2f}{merged} would."

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
        _epsilon(config, config.federation.rounds) if explores else 1.0,
        works,
        {name: predict_seconds(config, work, device) for name, work in works.items()},
    )


def _epsilon(config: RunConfig, round_number: int) -> float:
    return roles.epsilon_schedule(round_number - 1, config.federation.rounds, config.roles.epsilon)


def _plan(
    config: RunConfig, known: profiling.Profile, budget: Budget, round_number: int
) -> tuple[list[LayerPlan], roles.Roles]:
    """What the method does with every expert of one participant, where frequencies are all that is known."""
    state = roles.RoleState.start(known.frequency[None])
    chance = seeding.generator(config.seed, "assign", round_number)
    assigned = methods.get(config.method).assign(state, [budget], _epsilon(config, round_number), chance, config)
    part = assigned[0]
    model, _ = _model(config.model)
    if config.method == "fmes":
        nobody = torch.zeros_like(part.exploit)
        return fmes.make_plans(model, known.frequency, part.exploit), roles.Roles(part.exploit, nobody)
    if not bool(part.exploit.all()):
        return flux.make_plans(model, known, part, budget, config), part
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
