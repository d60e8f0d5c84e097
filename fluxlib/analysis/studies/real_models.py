"""The public models on the catalogue's devices (notebook 07): what a participant must hold, where a round's time goes.

Nothing is trained and no weight is read. Memory comes from the planner (:mod:`fluxlib.devices.memory`), time from the
device clock (:mod:`fluxlib.devices.clock`), for one typical round of each method.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from fluxlib import models
from fluxlib.analysis.studies.bench import Row, row, typical_round
from fluxlib.devices import catalogue, clock, step
from fluxlib.devices.memory import Step, plan_memory
from fluxlib.methods.base import Work

METHODS = ("flux", "fmd", "fmq", "fmes")
FMQ_WIRE_BITS = 4.25


def works(
    num_experts: int,
    participants: int = 10,
    samples: int = 64,
    tokens_per_sample: int = 256,
    wire_bits: float = 16.0,
) -> dict[str, Work]:
    """One participant's round by method, a quarter of the experts being its budget, 32 samples profiled.

    ``wire_bits`` per weight travel in both directions; FMQ's weights have no more than 4 anyway.

    Participants are taken to choose independently, so that nearly every expert has changed somewhere and must be
    downloaded: the worst case for the methods that tune a part. Routed tokens are spread evenly over experts.
    """
    flux = typical_round(num_experts, samples, tokens_per_sample, profiled=32)
    changed = round(num_experts * (1 - (1 - flux.num_tuned / num_experts) ** participants))
    training = Work(
        num_experts=num_experts, train_steps=flux.train_steps, train_samples=flux.train_samples,
        train_tokens=flux.train_tokens, download_bits=wire_bits, upload_bits=wire_bits,
    )  # fmt: skip
    counts: dict[str, Any] = dict.fromkeys(("num_tuned", "num_updated", "num_downloaded", "num_uploaded"), num_experts)
    everything = replace(training, offloaded=True, **counts)
    return {
        "flux": replace(flux, num_downloaded=changed, download_bits=wire_bits, upload_bits=wire_bits),
        "fmd": everything,
        "fmq": replace(
            everything, weight_bits=4, num_quantized=num_experts, profile_bits=4,
            download_bits=FMQ_WIRE_BITS, upload_bits=FMQ_WIRE_BITS,
        ),
        "fmes": replace(
            training, num_tuned=flux.num_tuned, num_updated=flux.num_tuned, num_quantized=num_experts,
            num_downloaded=changed,
            num_uploaded=flux.num_uploaded, routed_tokens=1, slot_tokens=1, tuned_tokens=1,
            profile_samples=flux.profile_samples, profile_tokens=flux.profile_tokens, profile_bits=4,
        ),
    }  # fmt: skip


def rounds(
    model: str, devices: Iterable[str], participants: int = 10, samples: int = 64, tokens_per_sample: int = 256
) -> Iterator[Row]:
    """Rows ``real_phase`` (seconds, ``method, device, link, wire, phase``) and ``real_round`` (without the phase).

    All participants have the same device; x of ``real_round`` is the link's upload rate in bits per second. Wire is
    ``16 bit`` (FMQ: its codes) or ``4 bit`` for all.
    """
    shapes = clock.shapes(model)
    settings = {
        (wire, name): work
        for wire, bits in (("16 bit", 16.0), ("4 bit", FMQ_WIRE_BITS))
        for name, work in works(shapes.num_experts, participants, samples, tokens_per_sample, bits).items()
    }
    every = itertools.product(settings.items(), list(devices), catalogue.LINKS.values())
    for ((wire, name), work), device, link in every:
        phases = clock.phase_seconds(work, shapes, catalogue.DEVICES[device], link, tokens_per_sample)
        server_s = clock.server_seconds([work] * participants, shapes)
        where = f"{name}, {device}, {link.name}, {wire}"
        for phase, seconds in (phases | {"server": server_s}).items():
            yield row("real_phase", f"{where}, {phase}", seconds, model=model, unit="s")
        total = clock.round_seconds([clock.ParticipantSeconds(phases, None, work.hidden_profile)], server_s)
        yield row("real_round", where, total, model=model, x=8 * link.up_bytes_per_s, unit="s")


def resident(model: str, devices: Iterable[str], samples: int = 64, tokens_per_sample: int = 256) -> Iterator[Row]:
    """Rows ``real_resident``: share of FMD's expert uses that find the weights on the device.

    Experts are used in order forward and in reverse order backward, so an LRU set of C of N experts serves C of the N
    uses of each pass (:class:`fluxlib.moe.offloaded.DeviceSet` counts the same).
    """
    shapes = clock.shapes(model)
    work = works(shapes.num_experts, 10, samples, tokens_per_sample)["fmd"]
    for device in devices:
        placed = step.placed(step.Load(work, shapes, tokens_per_sample), catalogue.DEVICES[device])
        share = (placed.trained + placed.resident) / (placed.trained + placed.resident + placed.away)
        yield row("real_resident", device, share, model=model)


def memory(model: str, tokens: int = 256) -> Iterator[Row]:
    """Rows ``real_memory`` (bytes, ``method, kind``): the planner's peak of a training step, nothing offloaded.

    A quarter of the experts tuned by FLUX and FMES, as many merged by FLUX; all of them tuned by FMD and FMQ.
    """
    config = models.config(model)
    for method in METHODS:
        plan = plan_memory(config, method, step=Step(tokens=tokens))
        for kind in plan.rows:
            if kind.where == "device":
                yield row("real_memory", f"{method}, {kind.kind}", kind.num_bytes, model=model, unit="B")
        yield row("real_peak", method, plan.peak_bytes, model=model, unit="B")


def fitting(model: str, devices: Iterable[str], tokens: int = 256) -> Iterator[Row]:
    """Rows ``real_fits`` (``device, B_tune`` and ``device, B_non``): what FLUX may hold there; 0 where not one fits."""
    config = models.config(model)
    for device in devices:
        try:
            plan = plan_memory(config, "flux", int(catalogue.DEVICES[device].memory_bytes), step=Step(tokens=tokens))
            found = {"B_tune": plan.num_tuned, "B_non": plan.num_merged}
        except ValueError:
            found = {"B_tune": 0, "B_non": 0}
        for kind, count in found.items():
            yield row("real_fits", f"{device}, {kind}", count, model=model)
