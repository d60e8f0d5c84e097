"""What a participant would need and do, from counts alone: memory by the planner, work and time by the device clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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


def what_fits(config: RunConfig, device: catalogue.Device) -> tuple[float, float] | None:
    """The largest shares of experts, tuned and merged, that ``device`` holds; None: not even the smallest."""
    if config.method not in ("flux", "fmes"):
        return None
    try:
        found = _planned(shapes_of(config), config.method, device.memory_bytes, None, None, _step(config))
    except ValueError:
        return None
    total = clock.shapes(shapes_of(config)).num_experts
    return math.floor(100 * found.num_tuned / total) / 100, math.floor(100 * found.num_merged / total) / 100


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
    num_merged = round(budget.num_merged / known.frequency.numel() * total) if method == "flux" else 0
    limit = device.memory_bytes if method == config.method else None
    try:
        return _planned(name, method, limit, num_tuned, num_merged, _step(config))
    except ValueError as error:
        said = f"budget.tune_frac is {share:.3g}, {num_tuned} of {total} experts of {Path(name).name}"
        raise ConfigError(f"{said}: {error}") from None


def _step(config: RunConfig) -> Step:
    tokens = min(config.clock.tokens_per_sample or config.training.max_tokens, 512)
    bits = config.training.fmq_bits if config.method == "fmq" else config.profiling.bits
    return Step(config.training.batch_size, tokens, bits=min(bits, 8))


@lru_cache(maxsize=64)
def _planned(
    name: str, method: str, memory_bytes: int | None, num_tuned: int | None, num_merged: int | None, step: Step
) -> MemoryPlan:
    return memory.plan_memory(models.config(name), method, memory_bytes, num_tuned, num_merged, step)


def predict_seconds(config: RunConfig, work: Work, device: catalogue.Device) -> dict[str, float]:
    """Phases of a later round (its profile is a round old), for one participant."""
    shapes, link = clock.shapes(shapes_of(config)), catalogue.link(config.clock.link)
    found = clock.phase_seconds(work, shapes, device, link, config.clock.tokens_per_sample)
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

    Three numbers are estimates: tokens are those of mean samples, routed as the profile says; each choice of a token is
    computed by itself (``slot_tokens``); what others changed is taken to be spread evenly over the experts, so
    downloads are rather too many where participants tune the same ones.

    Args:
        method: the one of ``config``, for which ``share`` holds, or one that tunes every expert.
    """
    exploit, explore, tokens_per_sample = share.assigned.exploit, share.assigned.explore, share.tokens_per_sample
    work = _training(config, tokens_per_sample, exploit.numel())
    if method != config.method or bool(exploit.all()):
        return _tuning_everything(config, method, work)
    total, num_tuned = work.num_experts, int(exploit.sum())
    dropped = torch.zeros_like(exploit)
    for row, plan in zip(dropped, share.plans, strict=True):
        row[list(plan.dropped)] = True
    reached = share.frequency.masked_fill(dropped, 0.0)
    routed = work.train_tokens * share.top_k_sum
    samples = config.profiling.batches * config.training.batch_size
    keys = [(int(layer), int(expert)) for layer, expert in explore.nonzero()]
    passes = flux.forward_passes(keys, len(share.frequency), config) if method == "flux" else 0.0
    if passes > 1 and config.roles.explore_by == "probes":
        passes = 1 + (passes - 1) * roles.num_probed(config.roles, len(keys)) / len(keys)
    return replace(
        work,
        num_tuned=num_tuned,
        num_frozen=sum(len(plan.groups) for plan in share.plans),
        num_merge_sources=sum(len(group) for plan in share.plans for group in plan.groups if len(group) > 1),
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
