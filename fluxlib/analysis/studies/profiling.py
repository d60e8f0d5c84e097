"""Section 4: how uneven activation is, and what few bits and few samples cost in accuracy and time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from fluxlib import profiling
from fluxlib.analysis.studies.bench import Bench, Row, interleaved
from fluxlib.profiling import Profile

MEASURES = ("frequency error", "rank correlation", "top overlap")
TOP_FRACTION = 0.25
"""The budget whose most used experts two profiles should agree on."""


def activation(benches: Iterable[Bench], num_samples: int) -> Iterator[Row]:
    """Frequency and attention of every expert at full precision (Fig. 2 and 9)."""
    for bench in benches:
        found = bench.profile(num_samples, bits=16)
        for study, values in (("activation", found.frequency), ("attention", found.attention)):
            for layer, expert in found.tokens.new_ones(found.tokens.shape).nonzero().tolist():
                value = float(values[layer, expert])
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
    """The three error measures by name, see :data:`MEASURES`."""
    values = (
        profiling.frequency_error(estimate, truth),
        profiling.rank_correlation(estimate, truth),
        profiling.top_overlap(estimate, truth, max(1, round(TOP_FRACTION * truth.frequency.numel()))),
    )
    return dict(zip(MEASURES, values, strict=True))
