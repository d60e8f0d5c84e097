"""One training step on a device: arithmetic, memory traffic, and what it costs when the experts do not fit.

Arithmetic and memory traffic are a roofline: the longer of the two, at the achieved rates of the device. Experts that
do not fit wait on the host in 32 bit, with gradients and AdamW's moments there; over the bus go 16 bit, or codes.

Both forms are real in :class:`fluxlib.moe.offloaded.OffloadedExperts`. ``on_demand`` is the paper's: an expert is
copied for the forward and again for the backward pass, its gradient is copied back, the host's AdamW follows, nothing
overlaps. Deviation: ``overlapped`` is a pipeline over layers (ZeRO-Offload, Ren et al. 2021): while one computes, the
next one's experts come, gradients of the one before go back, and AdamW updates the one before that. Each pass takes its
longest stage, and one layer's share of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluxlib.config import Offloading
from fluxlib.devices.catalogue import Device
from fluxlib.devices.dry_run import MOMENT_BYTES, TUNED_DTYPE
from fluxlib.devices.memory import RESERVE_FRAC
from fluxlib.devices.shapes import Shapes
from fluxlib.methods.base import Work

WEIGHT_BYTES = 2
"""Frozen and working weights, activations, and what crosses the bus: 16 bit."""
ACTIVATION_BYTES = 34
"""Per token, layer and unit of width: Korthikanti et al. 2022, table 2, without the attention scores."""
PARTS = 16
"""Placements that are tried: this many equal parts of the experts, more or fewer of them trained on the device."""


class Load:
    """One participant's work at the clock model's shapes; counts of experts become shares of its experts."""

    def __init__(self, work: Work, shapes: Shapes, tokens_per_sample: int | None) -> None:
        self.work, self.shapes = work, shapes
        counted = work.train_tokens / work.train_samples if work.train_samples else 0.0
        self.tokens_per_sample = float(tokens_per_sample or counted)
        self._given = tokens_per_sample
        self.batch_size = work.train_samples / work.train_steps if work.train_steps else 0.0
        rank, size, routed = work.adapter_rank, shapes.expert_parameters, work.routed_tokens
        self.learned_share = shapes.learned_parameters(rank) / size
        """Parameters that learn, per parameter of a tuned expert: all, or those of an adapter's B."""
        self.gradient_share = rank * sum(shapes.expert_sides) / size if rank else 1.0
        """Arithmetic of what learns' gradient, as a share of the weight's: ``g.T @ (x @ A.T)`` for ``g.T @ x``."""
        self.step_tokens = self.batch_size * self.tokens_per_sample
        """Tokens of one batch."""
        self.tuned_share = work.tuned_tokens / routed if routed else work.num_tuned / work.num_experts
        """Share of the routed tokens that went to tuned experts; their share of the experts where none were counted."""
        self.slot_share = work.slot_tokens / routed if routed else 1.0
        """(token, slot) pairs computed, as a share of the (token, expert) choices."""
        self.updated_parameters = self.experts(work.num_updated) * size
        """Of the tuned experts that got a token: the others have no gradient and no step."""
        self.state_bits = 8 * WEIGHT_BYTES if rank else work.weight_bits
        """Bits of what learns, by which its gradient and its step are counted; an adapter's B's are not quantised."""

    def experts(self, count: float) -> float:
        """``count`` of the run's experts, or of anything counted per expert, as that share of the clock model's."""
        return count / self.work.num_experts * self.shapes.num_experts

    def tokens(self, samples: float, counted: float) -> float:
        """Tokens of ``samples``: as many each as the clock was told, else those that were ``counted``."""
        return float(samples * self._given) if self._given else float(counted)

    def frozen_slot_bytes(self, bits: int) -> float:
        """Traffic of reading one frozen expert once; below 16 bit it is unpacked: written and read again in 16 bit."""
        unpacked = 0 if bits >= 8 * WEIGHT_BYTES else 2 * WEIGHT_BYTES
        return self.shapes.expert_parameters * (bits / 8 + unpacked)

    def kept_traffic(self, bits: int) -> float:
        """Traffic of reading every kept expert once; a tuned one is cast to 16 bit before its product, or formed."""
        at_rest = _bus_bytes(bits) if self.work.adapter_rank else _rest_bytes(bits)
        tuned = self.updated_parameters * (at_rest + 2 * WEIGHT_BYTES)
        return tuned + self.experts(self.work.num_frozen) * self.frozen_slot_bytes(bits)


@dataclass(frozen=True)
class Placement:
    """Where tuned parameters lie during training, as counts; what is not resident is on the host."""

    trained: float
    """On the device with gradient and moments."""
    resident: float = 0.0
    """On the device, with working weights alone; updated on the host."""
    away: float = 0.0
    """On the host altogether."""


def placed(load: Load, device: Device, offloading: Offloading = "overlapped") -> Placement:
    """The fastest of :func:`placements`. More memory only adds to the choice, so it never makes a step longer."""
    return min(placements(load, device), key=lambda option: sum(step_seconds(load, device, option, offloading)))


def placements(load: Load, device: Device) -> list[Placement]:
    """The ways in which tuned experts can lie in the memory that is left.

    With their training state: none, or as many parts as fit; of the others as many as fit with their weights alone.
    A method that does not offload has everything on the device, whether it fits or not.
    """
    bits, every, each = load.work.weight_bits, load.updated_parameters, trained_bytes(load)
    if not load.work.offloaded:
        return [Placement(every)]
    left = max(0.0, device.memory_bytes * (1 - RESERVE_FRAC) - base_bytes(load))
    found = []
    for trained in (every * part / PARTS for part in range(PARTS + 1)):
        if trained * each <= left:
            resident = min(every - trained, (left - trained * each) / _bus_bytes(bits))
            found.append(Placement(trained, resident, every - trained - resident))
    return found


def step_seconds(load: Load, device: Device, option: Placement, offloading: Offloading) -> tuple[float, float]:
    """One optimizer step on the device, and what offloading adds to it, in one placement.

    Arithmetic: forward, activation gradients (the same again), and weight gradients for the routed tokens that went to
    tuned experts. Memory: every kept weight read twice, weight gradients written, activations written and read. The
    optimizer of what is trained on the device follows and overlaps with nothing. With an adapter every tuned weight is
    formed in both passes, and gradients and optimizer are B's; weights that are on the device stay there.
    """
    work, shapes, bits, tokens = load.work, load.shapes, load.work.weight_bits, load.step_tokens
    learned, routed = load.learned_share, shapes.expert_flops(tokens)
    formed = 2.0 * work.adapter_rank * load.updated_parameters
    ahead = shapes.dense_flops(tokens, load.tokens_per_sample) + load.slot_share * routed + formed
    flops = 2 * ahead + load.tuned_share * routed * load.gradient_share
    weights = shapes.other_parameters * WEIGHT_BYTES + load.kept_traffic(bits)
    activations = ACTIVATION_BYTES * tokens * shapes.num_layers * shapes.hidden_size
    traffic = 2 * weights + load.updated_parameters * learned * _gradient_bytes(load.state_bits) + 2 * activations
    computing = max(flops / device.flops_per_s, traffic / device.memory_rate)
    on_device = computing + option.trained * learned * _update_traffic(load.state_bits) / device.memory_rate
    updated = option.resident + option.away
    if not updated or not flops:
        return on_device, 0.0
    forward = computing * ahead / flops
    came = option.resident * learned + option.away
    come, again = (count * _bus_bytes(bits) / device.bus_rate for count in (came, option.away))
    changed = updated * learned
    back, host = changed * WEIGHT_BYTES / device.bus_rate, changed * _update_traffic(load.state_bits) / device.host_rate
    if offloading == "on_demand":
        return on_device, come + again + back + host
    passes = (forward, come), (computing - forward, again, back, host)
    return on_device, sum(_pipeline(stages, shapes.num_layers) for stages in passes) - computing


def _pipeline(stages: tuple[float, ...], num_layers: int) -> float:
    """Seconds of a pass whose stages take that long in total and go through the layers one behind the other."""
    return sum(stages) / num_layers + (num_layers - 1) / num_layers * max(stages)


def device_bytes(work: Work, shapes: Shapes, device: Device, tokens_per_sample: int | None = None) -> int:
    """Memory of a training step on the device, by the rule that experts are placed with.

    In closed form, for every round of a run: :mod:`fluxlib.devices.memory` is exact and takes a dry run. What is
    offloaded fills the usable memory at most; what does not offload may exceed it.
    """
    load = Load(work, shapes, tokens_per_sample)
    needed = base_bytes(load) + load.experts(work.num_tuned) * shapes.expert_parameters * trained_bytes(load)
    needed += load.experts(work.num_frozen) * shapes.expert_parameters * WEIGHT_BYTES
    usable = device.memory_bytes * (1 - RESERVE_FRAC)
    return round(min(needed, max(usable, base_bytes(load))) if work.offloaded else needed)


def base_bytes(load: Load) -> float:
    """All weights outside routed experts, and the activations of a step."""
    shapes = load.shapes
    activations = ACTIVATION_BYTES * load.step_tokens * shapes.num_layers * shapes.hidden_size
    return shapes.other_parameters * WEIGHT_BYTES + activations


def trained_bytes(load: Load) -> float:
    """A tuned parameter on the device: weight, gradient and moments; with an adapter these of B beside its weight."""
    bits = load.state_bits
    learned = _rest_bytes(bits) + _gradient_bytes(bits) + MOMENT_BYTES
    return _bus_bytes(load.work.weight_bits) + load.learned_share * learned if load.work.adapter_rank else learned


def _rest_bytes(bits: int) -> float:
    """A tuned parameter's weight at rest: 32 bit, or the few bits that it is quantised to."""
    return bits / 8 if bits < 8 * WEIGHT_BYTES else TUNED_DTYPE.itemsize


def _bus_bytes(bits: int) -> float:
    """The same as it crosses the bus and lies on the device when its state is on the host."""
    return min(bits / 8, WEIGHT_BYTES)


def _gradient_bytes(bits: int) -> int:
    """A tuned parameter's gradient: 32 bit, or that of the unpacked weight."""
    return WEIGHT_BYTES if bits < 8 * WEIGHT_BYTES else TUNED_DTYPE.itemsize


def _update_traffic(bits: int) -> float:
    """AdamW, per parameter and step: weight and moments are read and written, the gradient is read.

    On the host the gradient has 16 bit and a working copy of the weight is written: as many bytes.
    """
    return 2 * (_rest_bytes(bits) + MOMENT_BYTES) + _gradient_bytes(bits)
