"""Section 4.2: how activation drifts while a federation trains, and what a profile that is one round old costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from fluxlib import merging, profiling, seeding
from fluxlib.analysis.studies.bench import Bench, Row, row
from fluxlib.analysis.studies.profiling import compare
from fluxlib.config import RunConfig, TrainingConfig
from fluxlib.devices import catalogue, clock
from fluxlib.federation.server.aggregation import ExpertMean
from fluxlib.methods.base import Work
from fluxlib.methods.local import customized, tune
from fluxlib.moe import find
from fluxlib.moe.compact import LayerPlan
from fluxlib.profiling import Profile
from fluxlib.tasks.batches import sample_batches

SETTINGS = {"a quarter tuned": 0.25, "all tuned": 1.0}


def most_used(known: Profile, fraction: float) -> Tensor:
    """bool ``[L, E]``: the most used experts, FLUX's first choice (utilities start as ``f / max f``)."""
    count = max(1, round(fraction * known.frequency.numel()))
    mask = torch.zeros(known.frequency.numel(), dtype=torch.bool)
    mask[known.frequency.flatten().topk(count).indices] = True
    return mask.view_as(known.frequency)


def at_random(known: Profile, fraction: float, generator: torch.Generator) -> Tensor:
    """bool ``[L, E]``: as many experts drawn at random."""
    count = max(1, round(fraction * known.frequency.numel()))
    mask = torch.zeros(known.frequency.numel(), dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=generator)[:count]] = True
    return mask.view_as(known.frequency)


def drift(
    benches: Iterable[Bench],
    rounds: int,
    participants: int,
    num_samples: int,
    learning_rate: float = 3e-3,
    bits: int = 4,
) -> Iterator[Row]:
    """A short federation; the first participant's profile before it and after each round.

    Two settings: each participant tunes its most used quarter and merges the rest into another quarter (FLUX), or
    everybody tunes everything (FMD), in which case nothing drifts more.

    Rows: ``drift``, the distance of round x from round 0; ``profile_age``, the distance of the few-bit profile from
    the truth of round x, ``fresh`` or made one round earlier (``stale``); ``age_overlap``, agreement on the most used
    quarter; ``stale_merge``, error of the model merged by either.
    """
    for bench in benches:
        start = {name: tensor.to("cpu", copy=True) for name, tensor in bench.model.state_dict().items()}
        for setting, fraction in SETTINGS.items():
            yield from _one_run(bench, setting, fraction, rounds, participants, num_samples, learning_rate, bits)
            bench.model.load_state_dict(start)


def _one_run(
    bench: Bench,
    setting: str,
    fraction: float,
    rounds: int,
    participants: int,
    num_samples: int,
    learning_rate: float,
    bits: int,
) -> Iterator[Row]:
    config = RunConfig(training=TrainingConfig(learning_rate=learning_rate))
    data = [
        sample_batches(part, bench.tokenizer, 16, bench.max_tokens, seeding.generator(bench.seed, "drift", i))
        for i, part in enumerate(bench.parts[:participants])
    ]
    first = bench.profile(num_samples, bits=16)
    before = bench.profile(num_samples, bits)
    for number in range(1, rounds + 1):
        mean = ExpertMean()
        for participant in range(participants):
            plans = _plans(bench, bench.local(num_samples, participant), fraction, bits)
            with customized(bench.model, plans) as compact:
                tuned = tune(bench.model, compact, list(islice(data[participant], config.training.local_steps)), config)
            mean.add(tuned.changes, tuned.tokens)
        _apply(bench, mean)
        truth, fresh = bench.profile(num_samples, bits=16), bench.profile(num_samples, bits)
        yield bench.row("drift", setting, profiling.frequency_error(truth, first), x=number)
        for age, found in (("fresh", fresh), ("stale", before)):
            measured = compare(found, truth)
            yield bench.row("profile_age", f"{age}, {setting}", measured["frequency error"], x=number)
            yield bench.row("age_overlap", f"{age}, {setting}", measured["top overlap"], x=number)
            if number == rounds and fraction < 1:
                yield bench.row("stale_merge", age, _merge_error(bench, found, most_used(truth, fraction)), x=number)
        before = fresh


def _plans(bench: Bench, local: list[dict[str, Tensor]], fraction: float, bits: int) -> list[LayerPlan]:
    """The most used experts tuned and the others merged, by a profile of the participant's own; or all tuned."""
    if fraction == 1:
        return [LayerPlan(tuned=tuple(range(layer.num_experts))) for layer in find.layers(bench.model)]
    known = profiling.profile(bench.model, local, bits)
    tuned = most_used(known, fraction)
    return merging.plan(bench.model, known, tuned, int(tuned.sum()))


def _apply(bench: Bench, mean: ExpertMean) -> None:
    moe = find.layers(bench.model)
    for (layer, expert), delta in mean.result().items():
        own = find.expert_tensors(moe[layer].experts, expert)
        find.write_expert(moe[layer].experts, expert, {name: own[name] + delta[name] for name in delta})


def _merge_error(bench: Bench, known: Profile, tuned: Tensor) -> float:
    plans = merging.plan(bench.model, known, tuned, int(tuned.sum()))
    return float(merging.output_error(bench.model, plans, bench.held_out, accumulated=True)[-1])


SAMPLES = tuple(2**power for power in range(4, 15))
"""Samples of a round: 16 to 16,384."""


def round_saving(
    model: str,
    clock_model: str,
    device: str = "l20",
    profiled_fraction: float = 1.0,
    tokens_per_sample: int = 256,
    participants: int = 10,
) -> Iterator[Row]:
    """What a round is shorter by when the profile runs beside upload and aggregation, on the device clock.

    One round of FLUX at the shapes of ``clock_model``: a quarter of the experts tuned, a quarter frozen, one pass over
    the round's samples (x) in batches of 16. Rows ``round_saving``: share of the round that has the profile in its
    critical path; ``round_seconds``: both rounds. By link and by samples.

    Args:
        profiled_fraction: samples profiled, as a share of those trained on.
    """
    shapes = clock.shapes(clock_model)
    for link in catalogue.LINKS.values():
        for samples in SAMPLES:
            work = flux_work(shapes.num_experts, samples, tokens_per_sample, round(profiled_fraction * samples))
            phases = clock.phase_seconds(work, shapes, catalogue.DEVICES[device], link, tokens_per_sample)
            server_s = clock.server_seconds([work] * participants, shapes)
            after, inline = (clock.round_seconds([phases], [first], server_s).total_s for first in (False, True))
            yield row("round_saving", link.title, 1 - after / inline, model=model, x=samples)
            yield row("round_seconds", f"{link.title}, overlapped", after, model=model, x=samples, unit="s")
            yield row("round_seconds", f"{link.title}, in the way", inline, model=model, x=samples, unit="s")


def flux_work(num_experts: int, samples: int, tokens_per_sample: int, profiled: int, batch: int = 16) -> Work:
    """One participant's round of FLUX: a quarter tuned and uploaded, as much changed elsewhere and downloaded."""
    quarter = num_experts // 4
    return Work(
        num_experts=num_experts, num_tuned=quarter, num_frozen=quarter, num_merge_sources=num_experts - quarter,
        train_steps=max(1, samples // batch), train_samples=samples, train_tokens=samples * tokens_per_sample,
        profile_samples=profiled, profile_tokens=profiled * tokens_per_sample, profile_bits=4,
        num_quantized=num_experts, probe_samples=16 * 9, probe_tokens=16 * 9 * tokens_per_sample,
        num_downloaded=quarter, num_uploaded=quarter,
    )  # fmt: skip
