"""The device clock: how long a participant's work would take on its device, for the shapes of a given model.

``docs/clock.md`` has one table, method by phase: what is charged, from what, with the formula. Training, and what
offloading adds to it, is in :mod:`fluxlib.devices.step`.

One rule for all methods: everything follows one another, except a profile for the next round of which nothing is in
the reply (``Work.hidden_profile``): it runs beside upload and server (:class:`ParticipantSeconds`).

Whatever the run counts per expert is carried over as a share: a quarter of the mini model's experts tuned is a quarter
of LLaMA-MoE's, an eighth of them probed is an eighth of LLaMA-MoE's; so are the shares of tokens that went to tuned
experts. Tokens are the run's own, or ``samples * tokens_per_sample``.

Not modelled: kernel launches and Python, padding, an expert that no token of a step (but one of the round) reaches,
drawing directions, loading tuned experts once a round, the search for a neuron alignment, contention between
participants for the server's network, stragglers and failures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluxlib.config import Offloading
from fluxlib.devices.catalogue import SERVER, Device, Link
from fluxlib.devices.memory import RESERVE_FRAC
from fluxlib.devices.shapes import Shapes as Shapes
from fluxlib.devices.shapes import shapes as shapes
from fluxlib.devices.shapes import shapes_of as shapes_of
from fluxlib.devices.step import WEIGHT_BYTES, Load, placed, step_seconds
from fluxlib.devices.step import device_bytes as device_bytes
from fluxlib.methods.base import Work
from fluxlib.records import PHASES

PROFILE = ("quantize", "profile")


@dataclass(frozen=True)
class ParticipantSeconds:
    """One participant's round: seconds by phase, and of a profile made before it (round 1 only)."""

    main: dict[str, float]
    first: dict[str, float] | None = None
    hidden_profile: bool = False

    def all(self) -> dict[str, float]:
        """Seconds by phase, both profiles together."""
        return {name: value + (self.first or {}).get(name, 0.0) for name, value in self.main.items()}


def participant_seconds(
    work: Work,
    first: Work | None,
    shapes: Shapes,
    device: Device,
    link: Link,
    tokens_per_sample: int | None,
    offloading: Offloading = "overlapped",
) -> ParticipantSeconds:
    """One participant's round; ``first`` is the work of a profile made before the round, if any."""
    main = phase_seconds(work, shapes, device, link, tokens_per_sample, offloading)
    before = phase_seconds(first, shapes, device, link, tokens_per_sample) if first else None
    return ParticipantSeconds(main, before and {name: before[name] for name in PROFILE}, work.hidden_profile)


def phase_seconds(
    work: Work,
    shapes: Shapes,
    device: Device,
    link: Link,
    tokens_per_sample: int | None = None,
    offloading: Offloading = "overlapped",
) -> dict[str, float]:
    """Seconds of each phase of one participant's round, one entry per name in :data:`fluxlib.records.PHASES`.

    Args:
        work: what was done, in units that do not depend on the device.
        shapes: the model whose sizes are charged; shares of ``work.num_experts`` become shares of its experts.
        tokens_per_sample: counts samples as this many tokens each; None: the tokens that were counted.
        offloading: how experts come that do not fit; ``pcie`` is what that adds to ``train``.
    """
    load = Load(work, shapes, tokens_per_sample)
    on_link = shapes.learned_parameters(work.adapter_rank) / 8  # bytes per bit of what travels of an expert
    merged = load.experts(work.num_merge_sources) * shapes.expert_parameters * WEIGHT_BYTES
    quantized = load.experts(work.num_quantized) * shapes.expert_parameters
    step, offload = step_seconds(load, device, placed(load, device, offloading), offloading)
    down, up = (load.experts(n) for n in (work.num_downloaded, work.num_uploaded))
    probed = work.probe_samples + load.experts(work.expert_probe_samples)
    probed_tokens = work.probe_tokens + load.experts(work.expert_probe_tokens)
    seconds = {
        "download": _transfer(down * work.download_bits * on_link, link.down_bytes_per_s, link),
        "merge": max(merged / _held_rate(shapes, device), 3 * merged / device.memory_rate),
        "quantize": max(
            quantized * WEIGHT_BYTES / _held_rate(shapes, device),
            quantized * (WEIGHT_BYTES + work.profile_bits / 8) / device.memory_rate,
        ),
        "profile": forward_seconds(load, work.profile_samples, work.profile_tokens, work.profile_bits, device),
        "train": work.train_steps * step,
        "probe": forward_seconds(load, probed, probed_tokens, 8 * WEIGHT_BYTES, device, kept=True),
        "pcie": work.train_steps * offload,
        "upload": _transfer(up * work.upload_bits * on_link, link.up_bytes_per_s, link),
    }
    return {name: seconds[name] for name in PHASES}


def forward_seconds(
    load: Load, samples: float, counted_tokens: float, bits: int, device: Device, kept: bool = False
) -> float:
    """Forward passes over ``samples`` in batches of the training's size, experts held in ``bits``.

    ``kept``: through the customised model (tuned and merged slots); otherwise through all experts.
    """
    if not samples:
        return 0.0
    shapes = load.shapes
    tokens = load.tokens(samples, counted_tokens)
    passes = samples / load.batch_size if load.batch_size else 1.0
    flops = shapes.dense_flops(tokens, tokens / samples) + shapes.expert_flops(tokens)
    experts = load.kept_traffic(bits) if kept else shapes.num_experts * load.frozen_slot_bytes(bits)
    weights = shapes.other_parameters * WEIGHT_BYTES + experts
    return max(flops / device.flops_per_s, passes * weights / device.memory_rate)


def _held_rate(shapes: Shapes, device: Device) -> float:
    """Bytes/s at which a participant reads the full 16-bit model that it holds."""
    fits = shapes.parameters * WEIGHT_BYTES <= device.memory_bytes * (1 - RESERVE_FRAC)
    return max(device.memory_rate, device.bus_rate) if device.unified and fits else device.bus_rate


def _transfer(num_bytes: float, rate: float, link: Link) -> float:
    """Seconds of one message; nothing is sent when there is nothing to say."""
    return num_bytes / rate + link.latency_s if num_bytes else 0.0


def server_seconds(works: Sequence[Work], shapes: Shapes, device: Device = SERVER) -> float:
    """The server's part, in its host memory: every upload read, every mean read and written."""
    uploaded = sum(work.num_uploaded / work.num_experts for work in works) * shapes.num_experts
    changed = max((work.num_uploaded / work.num_experts for work in works), default=0.0) * shapes.num_experts
    learned = shapes.learned_parameters(max((work.adapter_rank for work in works), default=0))
    return (uploaded + 2 * changed) * learned * WEIGHT_BYTES / device.host_rate


def round_seconds(participants: Sequence[ParticipantSeconds], server_s: float) -> float:
    """When the round is over: the server has aggregated and every profile is done; ValueError: nobody took part.

    One phase follows another, but a hidden profile begins with the upload and is in nobody's way.
    """
    if not participants:
        raise ValueError("participants is empty: a round needs at least one")
    ends = []
    for one in participants:
        hidden_s = sum(one.main[name] for name in PROFILE) if one.hidden_profile else 0.0
        uploaded_s = sum(one.all().values()) - hidden_s
        ends += [uploaded_s + server_s, uploaded_s + max(0.0, hidden_s - one.main["upload"])]
    return max(ends)
