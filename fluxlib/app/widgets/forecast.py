"""What a participant would need and do, from counts alone: memory by the planner, work and time by the device clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fluxlib import models, profiling, roles
from fluxlib.config import ConfigError, RunConfig
from fluxlib.devices import catalogue, clock, memory
from fluxlib.devices.memory import MemoryPlan, Step
from fluxlib.federation.protocol.wire import bits_per_weight
from fluxlib.methods import flux, fmq
from fluxlib.methods.base import Budget, Work
from fluxlib.moe.compact import LayerPlan


def shapes_name(config: RunConfig) -> str:
    """Its name without a folder."""
    return Path(shapes_of(config)).name


def shapes_of(config: RunConfig) -> str:
    """The model that memory and time are predicted for."""
    return config.model if config.clock.model == "self" else config.clock.model


def _batch_of(config: RunConfig) -> tuple[int, int, int]:
    """Batch, tokens, bits of a step, as the planner takes them."""
    tokens = min(config.clock.tokens_per_sample or config.training.max_tokens, 512)
    bits = config.training.fmq_bits if config.method == "fmq" else config.profiling.bits
    return config.training.batch_size, tokens, min(bits, 8)


def what_fits(config: RunConfig, chosen: MemoryPlan) -> tuple[float, float] | None:
    """About the largest shares of experts, tuned and merged, that a device holds which does not hold ``chosen``.

    In proportion between ``chosen`` and the smallest plan: memory is nearly a straight line in the number of experts,
    and an exact search takes a dry run at every step. None where even the smallest plan does not fit.
    """
    shapes = clock.shapes(shapes_of(config))
    total, few = shapes.num_experts, shapes.num_layers / shapes.num_experts
    if config.method not in ("flux", "fmes") or chosen.usable_bytes is None:
        return None
    smallest = _cached_memory(shapes_of(config), config.method, (few, few), *_batch_of(config), None)
    least, most = (max(plan.peak_bytes, plan.profile_bytes) for plan in (smallest, chosen))
    part = (chosen.usable_bytes - least) / (most - least) if most > least else 0.0
    if part <= 0:
        return None
    tuned, merged = (
        (small + part * (large - small)) / total
        for small, large in ((smallest.num_tuned, chosen.num_tuned), (smallest.num_merged, chosen.num_merged))
    )
    return math.floor(100 * tuned) / 100, math.floor(100 * merged) / 100


def predict_memory(
    config: RunConfig, method: str, budget: Budget, known: profiling.Profile, device: catalogue.Device
) -> MemoryPlan:
    """The planner's answer for the same shares of the experts of the clock's model."""
    total = known.frequency.numel()
    shares = (1.0, 0.0) if method in ("fmd", "fmq") else (budget.num_tuned / total, budget.num_merged / total)
    limit = None if method != config.method else device.memory_bytes
    return _cached_memory(shapes_of(config), method, shares, *_batch_of(config), limit)


@lru_cache(maxsize=64)
def _cached_memory(
    name: str, method: str, shares: tuple[float, float], batch: int, tokens: int, bits: int, limit: int | None
) -> MemoryPlan:
    shapes = clock.shapes(name)
    num_tuned = max(1, round(shares[0] * shapes.num_experts))
    num_merged = round(shares[1] * shapes.num_experts) if method == "flux" else 0
    try:
        step = Step(batch, tokens, bits=bits)
        return memory.plan_memory(models.config(name), method, limit, num_tuned, num_merged, step)
    except ValueError as error:
        share = f"budget.tune_frac is {shares[0]:.3g}, {num_tuned} of {shapes.num_experts} experts of {Path(name).name}"
        raise ConfigError(f"{share}: {error}") from None


def predict_seconds(config: RunConfig, work: Work, device: catalogue.Device) -> dict[str, float]:
    """Phases of a later round (its profile is a round old), for one participant."""
    shapes, link = clock.shapes(shapes_of(config)), catalogue.link(config.clock.link)
    found = clock.phase_seconds(work, shapes, device, link, config.clock.tokens_per_sample)
    return {phase: seconds for phase, seconds in found.items() if seconds}


def expected_work(
    config: RunConfig,
    method: str,
    assigned: roles.Roles,
    plans: Sequence[LayerPlan],
    frequency: Tensor,
    top_k_sum: int,
    tokens_per_sample: float,
) -> Work:
    """What one participant does in a round, by count; the account that :class:`Work` gives afterwards.

    Three numbers are estimates: tokens are those of mean samples, routed as the profile says; each choice of a token is
    computed by itself (``slot_tokens``); what others changed is taken to be spread evenly over the experts, so
    downloads are rather too many where participants tune the same ones.

    Args:
        method: the one of ``config``, for which ``assigned`` and ``plans`` hold, or one that tunes every expert.
        frequency: ``[L, E]`` of the participant's profile.
        top_k_sum: experts that a token passes through, over all layers.
    """
    work = _training(config, tokens_per_sample, assigned.exploit.numel())
    if method != config.method or bool(assigned.exploit.all()):
        return _tuning_everything(config, method, work)
    exploit, explore = assigned.exploit, assigned.explore
    total, num_tuned = work.num_experts, int(exploit.sum())
    dropped = torch.zeros_like(exploit)
    for row, plan in zip(dropped, plans, strict=True):
        row[list(plan.dropped)] = True
    reached = frequency.masked_fill(dropped, 0.0)
    routed = work.train_tokens * top_k_sum
    samples = config.profiling.batches * config.training.batch_size
    keys = [(int(layer), int(expert)) for layer, expert in explore.nonzero()]
    passes = flux.forward_passes(keys, len(frequency), config) if method == "flux" else 0.0
    if passes > 1 and config.roles.explore_by == "probes":
        passes = 1 + (passes - 1) * roles.num_probed(config.roles, len(keys)) / len(keys)
    return replace(
        work,
        num_tuned=num_tuned,
        num_frozen=sum(len(plan.groups) for plan in plans),
        num_merge_sources=sum(len(group) for plan in plans for group in plan.groups if len(group) > 1),
        routed_tokens=routed,
        slot_tokens=routed,
        tuned_tokens=round(routed * float(reached[exploit].sum() / reached.sum())),
        profile_samples=samples,
        profile_tokens=round(samples * tokens_per_sample),
        profile_bits=config.profiling.bits,
        num_quantized=total,
        probe_samples=round(passes * config.training.batch_size),
        probe_tokens=round(passes * config.training.batch_size * tokens_per_sample),
        num_downloaded=math.ceil(total * (1 - (1 - num_tuned / total) ** config.federation.participants)),
        num_uploaded=num_tuned,
        download_bits=bits_per_weight(config.wire.downlink),
        upload_bits=bits_per_weight(config.wire.uplink),
    )


def _training(config: RunConfig, tokens_per_sample: float, num_experts: int) -> Work:
    samples = config.training.local_steps * config.training.batch_size
    return Work(
        num_experts=num_experts,
        train_steps=config.training.local_steps,
        train_samples=samples,
        train_tokens=round(samples * tokens_per_sample),
    )


def _tuning_everything(config: RunConfig, method: str, work: Work) -> Work:
    """The account of FMD and FMQ, and of any other budget that is everything."""
    total = work.num_experts
    down, up = bits_per_weight(config.wire.downlink), bits_per_weight(config.wire.uplink)
    work = replace(work, num_tuned=total, num_downloaded=total, num_uploaded=total, offloaded=method in ("fmd", "fmq"))
    if method != "fmq" or config.training.fmq_bits == 16:
        return replace(work, download_bits=down, upload_bits=up)
    travelling = config.training.fmq_bits + fmq.SCALE_BITS
    return replace(
        work,
        num_quantized=total,
        profile_bits=config.training.fmq_bits,
        weight_bits=config.training.fmq_bits,
        download_bits=min(travelling, down),
        upload_bits=min(travelling, up),
    )
