"""The device clock: how long a participant's work would take on its device, for the shapes of a given model.

What is modelled, per participant and phase of :data:`fluxlib.records.PHASES`:

- arithmetic and memory traffic as a roofline: the longer of the two, at the achieved rates of the device;
- training: forward through the kept slots, backward through them for the activations, weight gradients for the tokens
  that went to tuned ones (choices of a token that fall on one merged slot are computed once), and AdamW's
  traffic over tuned weights; those, their gradients and moments are in 32 bit
  (quantised experts stay in their few bits), as :mod:`fluxlib.devices.memory` plans them;
- offloading, where that state does not fit: the faster of two placements, as many experts as fit with their training
  state, or as many as fit with their weights alone (what :class:`fluxlib.moe.offloaded.OffloadedExperts` does).
  Weights and gradients of the others cross the bus and their optimizer runs on the host, both behind the device's
  arithmetic as far as that reaches (:func:`step_seconds`; ZeRO-Offload, Ren et al. 2021);
- merging and quantising: reading the full model from where the participant keeps it (host memory, or its own
  memory where that is unified and large enough), and writing the result;
- down- and upload: bytes of experts over the link, plus its latency;
- the server: reading every upload and writing the mean, in its host memory.

Not modelled: kernel launches and Python, padding, an expert that no token of a step reaches, the search for a
neuron alignment, contention between participants for the server's network, stragglers and failures.

Numbers of experts are carried over from the run as shares: a quarter of the mini model's experts tuned is a quarter
of LLaMA-MoE's; so are the shares of tokens that went to tuned experts. Tokens are the run's own, or
``samples * tokens_per_sample``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import PreTrainedModel

from fluxlib import models
from fluxlib.devices.catalogue import SERVER, Device, Link
from fluxlib.devices.dry_run import MOMENT_BYTES, TUNED_DTYPE
from fluxlib.devices.memory import RESERVE_FRAC
from fluxlib.methods.base import Work
from fluxlib.moe import find
from fluxlib.records import PHASES

WEIGHT_BYTES = 2
"""Frozen and working weights and activations: 16 bit."""
ACTIVATION_BYTES = 34
"""Per token, layer and unit of width: Korthikanti et al. 2022, table 2, without the attention scores."""
BACKWARD_SHARE = 2 / 3
"""Share of a step's arithmetic that lies in its backward pass when every expert is tuned."""


@dataclass(frozen=True)
class Shapes:
    """What the clock needs to know of a model. Parameters are counts, per expert or over the whole model."""

    name: str
    num_layers: int
    num_experts: int
    """Routed experts over all layers."""
    top_k_sum: int
    """Routed experts that one token passes through, over all layers."""
    hidden_size: int
    expert_parameters: int
    """Parameters of one routed expert."""
    other_parameters: int
    """All parameters outside routed experts."""
    embedding_parameters: int
    """Those of the input embedding, which is looked up, not multiplied (0 when it is also the output head)."""

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.other_parameters + self.num_experts * self.expert_parameters

    def dense_flops(self, tokens: float, tokens_per_sample: float) -> float:
        """Forward FLOPs outside routed experts: matrices, and causal attention over half of the positions."""
        matrices = 2.0 * (self.other_parameters - self.embedding_parameters)
        return tokens * (matrices + 2.0 * tokens_per_sample * self.hidden_size * self.num_layers)

    def expert_flops(self, tokens: float) -> float:
        """Forward FLOPs of the routed experts."""
        return tokens * 2.0 * self.top_k_sum * self.expert_parameters


@lru_cache(maxsize=8)
def shapes(name: str) -> Shapes:
    """Shapes of a model by name (see :func:`fluxlib.models.known`), from its configuration alone."""
    from transformers import AutoModelForCausalLM

    settings = models.config(name)
    with torch.device("meta"):
        return shapes_of(name, AutoModelForCausalLM.from_config(settings, dtype=torch.float32))


def shapes_of(name: str, model: PreTrainedModel) -> Shapes:
    """Shapes of a model in memory; its weights may be on the meta device."""
    moe = find.layers(model)
    experts = sum(layer.num_experts for layer in moe)
    in_experts = sum(p.numel() for layer in moe for p in layer.experts.parameters())
    total = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return Shapes(
        name=name,
        num_layers=model.config.num_hidden_layers,
        num_experts=experts,
        top_k_sum=sum(layer.top_k for layer in moe),
        hidden_size=moe[0].hidden_size,
        expert_parameters=in_experts // experts,
        other_parameters=total - in_experts,
        embedding_parameters=0 if tied else embedding.numel(),
    )


def phase_seconds(
    work: Work,
    shapes: Shapes,
    device: Device,
    link: Link,
    tokens_per_sample: int | None = None,
) -> dict[str, float]:
    """Seconds of each phase of one participant's round, one entry per name in :data:`fluxlib.records.PHASES`.

    Args:
        work: what was done, in units that do not depend on the device.
        shapes: the model whose sizes are charged; shares of ``work.num_experts`` become shares of its experts.
        tokens_per_sample: counts samples as this many tokens each; None: the tokens that were counted.

    ``pcie`` is what offloading adds to ``train``: the part of the bus traffic, or of the optimizer's work on the
    host, that no arithmetic hides.
    """
    load = _Load(work, shapes, tokens_per_sample)
    on_link = shapes.expert_parameters / 8  # bytes per bit of an expert's weights
    merged = load.experts(work.num_merge_sources) * shapes.expert_parameters * WEIGHT_BYTES
    quantized = load.experts(work.num_quantized) * shapes.expert_parameters
    step, offload = step_seconds(load, device)
    down, up = (load.experts(n) for n in (work.num_downloaded, work.num_uploaded))
    return {
        "download": _transfer(down * work.download_bits * on_link, link.down_bytes_per_s, link),
        "merge": max(merged / _held_rate(shapes, device), 3 * merged / device.memory_rate),
        "quantize": max(
            quantized * WEIGHT_BYTES / _held_rate(shapes, device),
            quantized * (WEIGHT_BYTES + work.profile_bits / 8) / device.memory_rate,
        ),
        "profile": forward_seconds(load, work.profile_samples, work.profile_tokens, work.profile_bits, device),
        "train": work.train_steps * step,
        "probe": forward_seconds(load, work.probe_samples, work.probe_tokens, 8 * WEIGHT_BYTES, device, kept=True),
        "pcie": work.train_steps * offload,
        "upload": _transfer(up * work.upload_bits * on_link, link.up_bytes_per_s, link),
    }


class _Load:
    """One participant's work at the clock model's shapes."""

    def __init__(self, work: Work, shapes: Shapes, tokens_per_sample: int | None) -> None:
        self.work, self.shapes = work, shapes
        counted = work.train_tokens / work.train_samples if work.train_samples else 0.0
        self.tokens_per_sample = float(tokens_per_sample or counted)
        self._given = tokens_per_sample
        self.batch_size = work.train_samples / work.train_steps if work.train_steps else 0.0

    def experts(self, count: int) -> float:
        """``count`` of the run's experts as that share of the clock model's."""
        return count / self.work.num_experts * self.shapes.num_experts

    def tokens(self, samples: int, counted: int) -> float:
        return float(samples * self._given) if self._given else float(counted)

    @property
    def step_tokens(self) -> float:
        return self.batch_size * self.tokens_per_sample

    @property
    def tuned_share(self) -> float:
        """Share of the routed tokens that went to tuned experts; their share of the experts where none were counted."""
        work = self.work
        return work.tuned_tokens / work.routed_tokens if work.routed_tokens else work.num_tuned / work.num_experts

    @property
    def slot_share(self) -> float:
        """(token, slot) pairs computed, as a share of the (token, expert) choices."""
        return self.work.slot_tokens / self.work.routed_tokens if self.work.routed_tokens else 1.0

    @property
    def tuned_parameters(self) -> float:
        return self.experts(self.work.num_tuned) * self.shapes.expert_parameters


@dataclass(frozen=True)
class Placement:
    """Where tuned parameters lie during training, as counts; what is not resident is on the host."""

    trained: float
    """On the device with gradient and moments."""
    resident: float = 0.0
    """On the device, with weights alone; updated on the host."""
    away: float = 0.0
    """On the host altogether."""


def step_seconds(load: _Load, device: Device) -> tuple[float, float]:
    """One optimizer step on the device, and what offloading adds to it, in the faster of the placements.

    Arithmetic: forward, activation gradients (the same again), and weight gradients for the routed tokens that went to
    tuned experts. Memory: every kept weight read twice,
    weight gradients written, activations written and read. The optimizer follows and overlaps with nothing.
    """
    return _step(load, device, _fastest(load, device))


def _fastest(load: _Load, device: Device) -> Placement:
    return min(placements(load, device), key=lambda option: sum(_step(load, device, option)))


def _step(load: _Load, device: Device, option: Placement) -> tuple[float, float]:
    """:func:`step_seconds` for one placement."""
    shapes, work = load.shapes, load.work
    tokens = load.step_tokens
    dense = shapes.dense_flops(tokens, load.tokens_per_sample)
    routed = shapes.expert_flops(tokens)
    flops = 2 * (dense + load.slot_share * routed) + load.tuned_share * routed
    weights = shapes.other_parameters * WEIGHT_BYTES + _kept_traffic(load, work.weight_bits)
    activations = ACTIVATION_BYTES * tokens * shapes.num_layers * shapes.hidden_size
    traffic = 2 * weights + load.tuned_parameters * _gradient_bytes(work.weight_bits) + 2 * activations
    computing = max(flops / device.flops_per_s, traffic / device.memory_rate)
    step = computing + option.trained * _update_traffic(work.weight_bits) / device.memory_rate
    return step, offload_seconds(load, device, option, hidden_s=step)


def placements(load: _Load, device: Device) -> list[Placement]:
    """The ways in which the tuned experts can lie in the memory that a reserve, other weights and activations leave.

    Everything with its training state where that fits (or where the method does not offload); else as much of it as
    fits, or as many experts as fit with their weights alone.
    """
    bits, every = load.work.weight_bits, load.tuned_parameters
    left = device.memory_bytes * (1 - RESERVE_FRAC) - _base_bytes(load)
    trained = max(0.0, left) / _trained_bytes(bits)
    if not load.work.offloaded or trained >= every:
        return [Placement(every)]
    resident = min(every, max(0.0, left) / _rest_bytes(bits))
    return [Placement(trained, away=every - trained), Placement(0.0, resident, every - resident)]


def placed(work: Work, shapes: Shapes, device: Device, tokens_per_sample: int | None = None) -> Placement:
    """Where tuned experts lie during a step: the placement that :func:`step_seconds` counts with."""
    return _fastest(_Load(work, shapes, tokens_per_sample), device)


def device_bytes(work: Work, shapes: Shapes, device: Device, tokens_per_sample: int | None = None) -> int:
    """Memory of a training step on the device, by the rule that the clock places experts with.

    In closed form, for every round of a run: :mod:`fluxlib.devices.memory` is exact and takes a dry run. What is
    offloaded fills the usable memory at most; what does not offload may exceed it.
    """
    load = _Load(work, shapes, tokens_per_sample)
    needed = _base_bytes(load) + load.tuned_parameters * _trained_bytes(work.weight_bits)
    needed += load.experts(work.num_frozen) * shapes.expert_parameters * WEIGHT_BYTES
    usable = device.memory_bytes * (1 - RESERVE_FRAC)
    return round(min(needed, max(usable, _base_bytes(load))) if work.offloaded else needed)


def _base_bytes(load: _Load) -> float:
    """All weights outside routed experts, and the activations of a step."""
    shapes = load.shapes
    activations = ACTIVATION_BYTES * load.step_tokens * shapes.num_layers * shapes.hidden_size
    return shapes.other_parameters * WEIGHT_BYTES + activations


def _trained_bytes(bits: int) -> float:
    """A tuned parameter on the device: weight, gradient and moments."""
    return _rest_bytes(bits) + _gradient_bytes(bits) + MOMENT_BYTES


def offload_seconds(load: _Load, device: Device, placed: Placement, hidden_s: float) -> float:
    """What offloading adds to a step whose own time on the device is ``hidden_s``.

    An expert that the host updates comes over the bus once if it is resident, and for the forward and again for the
    backward pass if it is not; its gradient goes back. The two directions overlap with each other and with the
    arithmetic. The optimizer streams the state on the host while the backward pass of earlier layers goes on.
    """
    bits, updated = load.work.weight_bits, placed.resident + placed.away
    down, up = (updated + placed.away) * _rest_bytes(bits), updated * _gradient_bytes(bits)
    bus = max(down, up) / device.bus_rate
    host = updated * _update_traffic(bits) / device.host_rate
    return max(0.0, bus - hidden_s, host - BACKWARD_SHARE * hidden_s)


def _rest_bytes(bits: int) -> float:
    """A tuned parameter's weight at rest: 32 bit, or the few bits that it is quantised to."""
    return bits / 8 if bits < 8 * WEIGHT_BYTES else TUNED_DTYPE.itemsize


def _gradient_bytes(bits: int) -> int:
    """A tuned parameter's gradient: 32 bit, or that of the unpacked weight."""
    return WEIGHT_BYTES if bits < 8 * WEIGHT_BYTES else TUNED_DTYPE.itemsize


def _update_traffic(bits: int) -> float:
    """AdamW, per parameter and step: weight and moments are read and written, the gradient is read."""
    return 2 * (_rest_bytes(bits) + MOMENT_BYTES) + _gradient_bytes(bits)


def _kept_traffic(load: _Load, bits: int) -> float:
    """Traffic of reading every kept expert once; a tuned one is cast to 16 bit before its product."""
    tuned = _rest_bytes(bits) + 2 * WEIGHT_BYTES
    return load.tuned_parameters * tuned + load.experts(load.work.num_frozen) * _slot_bytes(load, bits)


def _slot_bytes(load: _Load, bits: int) -> float:
    """Traffic of reading one frozen expert once; below 16 bit it is unpacked: written and read again in 16 bit."""
    unpacked = 0 if bits >= 8 * WEIGHT_BYTES else 2 * WEIGHT_BYTES
    return load.shapes.expert_parameters * (bits / 8 + unpacked)


def forward_seconds(
    load: _Load, samples: int, counted_tokens: int, bits: int, device: Device, kept: bool = False
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
    experts = _kept_traffic(load, bits) if kept else shapes.num_experts * _slot_bytes(load, bits)
    weights = shapes.other_parameters * WEIGHT_BYTES + experts
    return max(flops / device.flops_per_s, passes * weights / device.memory_rate)


def _held_rate(shapes: Shapes, device: Device) -> float:
    """Bytes/s at which a participant reads the full 16-bit model that it holds."""
    fits = shapes.parameters * WEIGHT_BYTES <= device.memory_bytes * (1 - RESERVE_FRAC)
    return device.memory_rate if device.unified and fits else device.bus_rate


def _transfer(num_bytes: float, rate: float, link: Link) -> float:
    """Seconds of one message; nothing is sent when there is nothing to say."""
    return num_bytes / rate + link.latency_s if num_bytes else 0.0


@dataclass(frozen=True)
class RoundTime:
    """A round on the device clock, and the server's part of it."""

    total_s: float
    server_s: float


def server_seconds(works: Sequence[Work], shapes: Shapes, device: Device = SERVER) -> float:
    """The server's part, in its host memory: every upload read, every mean read and written."""
    uploaded = sum(work.num_uploaded / work.num_experts for work in works) * shapes.num_experts
    changed = max((work.num_uploaded / work.num_experts for work in works), default=0.0) * shapes.num_experts
    return (uploaded + 2 * changed) * shapes.expert_parameters * WEIGHT_BYTES / device.host_rate


def round_seconds(phases: Sequence[dict[str, float]], first_profile: Sequence[bool], server_s: float) -> RoundTime:
    """When the round is over: the server has aggregated and every profile for the next round is done.

    A participant's phases follow one another. A stale profile needs nothing of this round's result: it starts when
    the participant's arithmetic ends and runs beside its upload and the server. A first profile stands before
    training (``first_profile``).

    Raises:
        ValueError: no participants.
    """
    if not phases:
        raise ValueError("phases is empty: a round needs at least one participant")
    uploaded, profiled = [], []
    for seconds, first in zip(phases, first_profile, strict=True):
        profile = seconds["quantize"] + seconds["profile"]
        busy = sum(seconds[name] for name in PHASES if name not in ("quantize", "profile", "upload"))
        busy += profile if first else 0.0
        uploaded.append(busy + seconds["upload"])
        profiled.append(busy + (0.0 if first else profile))
    return RoundTime(max(max(uploaded) + server_s, max(profiled)), server_s)
