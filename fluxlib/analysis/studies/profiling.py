"""Section 4: uneven activation, few bits and few samples, drift while a federation trains, a profile one round old."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

from fluxlib import merging, profiling, seeding
from fluxlib.analysis.studies.bench import BATCH, Bench, Row, interleaved, row, tuned_experts, typical_round
from fluxlib.config import make_config
from fluxlib.devices import catalogue, clock
from fluxlib.federation.server.aggregation import ExpertMean
from fluxlib.methods.local import customized, tune
from fluxlib.moe import find
from fluxlib.moe.compact import LayerPlan
from fluxlib.profiling import Profile
from fluxlib.tasks.batches import sample_batches

TOP_FRACTION = 0.25
"""The budget whose most used experts two profiles should agree on."""
SETTINGS = {"a quarter tuned": 0.25, "all tuned": 1.0}
SAMPLES = tuple(2**power for power in range(4, 15))
"""Samples of a round: 16 to 16,384."""


def activation(benches: Iterable[Bench], num_samples: int) -> Iterator[Row]:
    """Frequency and attention of every expert at full precision (Fig. 2 and 9)."""
    for bench in benches:
        found = bench.profile(num_samples, bits=16)
        for study, values in (("activation", found.frequency), ("attention", found.attention)):
            for layer, shares in enumerate(values.tolist()):
                for expert, value in enumerate(shares):
                    yield bench.row(study, "16 bit", value, layer=layer, expert=expert)


def by_bits(benches: Iterable[Bench], num_samples: int, bits: Sequence[int] = (2, 3, 4, 8)) -> Iterator[Row]:
    """Profiles of few bits against the one at full precision, same samples."""
    for bench in benches:
        truth = bench.profile(num_samples, bits=16)
        for width in bits:
            for measure, value in compare(bench.profile(num_samples, width), truth).items():
                yield bench.row("profile_error", measure, value, x=width)


def by_samples(benches: Iterable[Bench], counts: Sequence[int], truth_samples: int) -> Iterator[Row]:
    """Profiles of few samples against one of many at full precision; and what the few say of themselves."""
    for bench in benches:
        truth = bench.profile(truth_samples, bits=16)
        for count in counts:
            seen = {bits: bench.profile(count, bits) for bits in (4, 16)}
            for bits, found in seen.items():
                yield bench.row("sample_size", f"{bits} bit", profiling.frequency_error(found, truth), x=count)
            yield bench.row("sample_size", "estimated", seen[16].sampling_error, x=count)


def cost(benches: Iterable[Bench], num_samples: int, repeats: int) -> Iterator[Row]:
    """Measured seconds of a profile by bits, with and without attention."""
    for bench in benches:
        data = bench.local(num_samples)
        works = {f"{bits} bit": partial(profiling.profile, bench.model, data, bits) for bits in (2, 3, 4, 8, 16)}
        works["4 bit, no attention"] = partial(profiling.profile, bench.model, data, 4, attention=False)
        for setting, times in interleaved(works, repeats).items():
            for x, seconds in enumerate(times):
                yield bench.row("profile_seconds", setting, seconds, x=x, unit="s")


def compare(estimate: Profile, truth: Profile) -> dict[str, float]:
    """Three measures of how far two profiles agree."""
    top = max(1, round(TOP_FRACTION * truth.frequency.numel()))
    return {
        "frequency error": profiling.frequency_error(estimate, truth),
        "rank correlation": profiling.rank_correlation(estimate, truth),
        "top overlap": profiling.top_overlap(estimate, truth, top),
    }


def drift(
    benches: Iterable[Bench], rounds: int, participants: int, num_samples: int, learning_rate: float = 3e-3
) -> Iterator[Row]:
    """A short federation; the first participant's profile before it and after each round.

    Two settings: each participant tunes its most used quarter and merges the rest into another quarter (FLUX), or
    everybody tunes everything (FMD), in which case nothing drifts more.

    Rows: ``drift``, the distance of round x from round 0; ``profile_age``, the distance of the 4-bit profile from the
    truth of round x, ``fresh`` or made one round earlier (``stale``); ``age_overlap``, agreement on the most used
    quarter; ``stale_merge``, error of the model merged by either.
    """
    for bench in benches:
        start = {name: tensor.to("cpu", copy=True) for name, tensor in bench.model.state_dict().items()}
        for setting, fraction in SETTINGS.items():
            first, before = bench.profile(num_samples, bits=16), bench.profile(num_samples)
            training = _train(bench, fraction, participants, num_samples, learning_rate)
            for number in range(1, rounds + 1):
                next(training)
                truth, fresh = bench.profile(num_samples, bits=16), bench.profile(num_samples)
                yield bench.row("drift", setting, profiling.frequency_error(truth, first), x=number)
                for age, found in (("fresh", fresh), ("stale", before)):
                    measured = compare(found, truth)
                    yield bench.row("profile_age", f"{age}, {setting}", measured["frequency error"], x=number)
                    yield bench.row("age_overlap", f"{age}, {setting}", measured["top overlap"], x=number)
                    if number == rounds and fraction < 1:
                        yield bench.row("stale_merge", age, _merge_error(bench, found, truth, fraction), x=number)
                before = fresh
            bench.model.load_state_dict(start)


def _train(bench: Bench, fraction: float, participants: int, num_samples: int, learning_rate: float) -> Iterator[None]:
    """Train ``bench.model``, a round at a time: local steps of each participant, then the mean of their changes."""
    config = make_config({"training.learning_rate": learning_rate})
    data = [
        sample_batches(part, bench.tokenizer, BATCH, bench.max_tokens, seeding.generator(bench.seed, "drift", i))
        for i, part in enumerate(bench.parts[:participants])
    ]
    moe = find.layers(bench.model)
    while True:
        mean = ExpertMean()
        for participant, own in enumerate(data):
            plans = [LayerPlan(tuned=tuple(range(layer.num_experts))) for layer in moe]
            if fraction < 1:
                known = profiling.profile(bench.model, bench.local(num_samples, participant), 4)
                tuned = tuned_experts(known, fraction)
                plans = merging.plan(bench.model, known, tuned, int(tuned.sum()))
            with customized(bench.model, plans) as compact:
                done = tune(bench.model, compact, list(islice(own, config.training.local_steps)), config)
            mean.add(done.changes, done.tokens)
        for (layer, expert), change in mean.result().items():
            weights = find.expert_tensors(moe[layer].experts, expert)
            find.write_expert(moe[layer].experts, expert, {name: weights[name] + change[name] for name in change})
        yield


def _merge_error(bench: Bench, known: Profile, truth: Profile, fraction: float) -> float:
    """Error of the model merged by a profile, the experts that are truly the most used ones left as they are."""
    tuned = tuned_experts(truth, fraction)
    plans = merging.plan(bench.model, known, tuned, int(tuned.sum()))
    return float(merging.output_error(bench.model, plans, bench.held_out, accumulated=True)[-1])


def round_saving(model: str, clock_model: str, profiled_fraction: float = 1.0) -> Iterator[Row]:
    """What a round is shorter by when the profile runs beside upload and aggregation, on the device clock.

    One round of FLUX with ten participants on L20s at the shapes of ``clock_model``, 256 tokens a sample: a quarter of
    the experts tuned, a quarter frozen, one pass over the round's samples (x) in batches of 16. Rows ``round_saving``:
    share of the round that has the profile in its critical path; ``round_seconds``: both rounds. By link and samples.
    ``profiled_fraction`` of the samples trained on are profiled.
    """
    shapes, device, tokens = clock.shapes(clock_model), catalogue.DEVICES["l20"], 256
    for link in catalogue.LINKS.values():
        for samples in SAMPLES:
            work = typical_round(shapes.num_experts, samples, tokens, round(profiled_fraction * samples))
            phases = clock.phase_seconds(work, shapes, device, link, tokens)
            server_s = clock.server_seconds([work] * 10, shapes)
            after, inline = (
                clock.round_seconds([clock.ParticipantSeconds(phases, None, hidden)], server_s)
                for hidden in (True, False)
            )
            yield row("round_saving", link.title, 1 - after / inline, model=model, x=samples)
            yield row("round_seconds", f"{link.title}, overlapped", after, model=model, x=samples, unit="s")
            yield row("round_seconds", f"{link.title}, in the way", inline, model=model, x=samples, unit="s")
