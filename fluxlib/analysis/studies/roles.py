"""Section 6: how good and how dear forward-only utilities are, and the runs that assignments are compared by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fluxlib import gradients, profiling, records, roles, seeding
from fluxlib.analysis.runs import phase_shares
from fluxlib.analysis.studies.bench import Bench, Row, interleaved, row
from fluxlib.config import RunConfig
from fluxlib.gradients.local import ExpertKey

PROBES: dict[str, dict[str, Any]] = {
    "one-sided (paper)": {"guided": False, "sides": 1},
    "two-sided": {"guided": False, "sides": 2},
    "two-sided, guided": {"guided": True, "sides": 2},
}
"""Ways to probe, as arguments of :func:`fluxlib.gradients.probe_norms`."""
FREQUENCY = "frequency alone"
"""What is known of utilities before anything is measured: tokens, which cost nothing."""
MEASURES = ("cosine_distance", "rank_correlation", "bias", "spread")
"""Of :func:`fluxlib.gradients.quality`; each is a study of its own, ``probe_<measure>``."""
OUTCOMES = (
    "final_metric",
    "final_loss",
    "mean_metric",
    "round_at_least",
    "device_s_at_least",
    "covered_frac",
    "load_cv",
)
"""What runs are compared by; the first and the times are :mod:`fluxlib.analysis.time_to_target`'s."""


def truth(bench: Bench, num_experts: int) -> tuple[dict[str, Tensor], list[ExpertKey], Tensor, Tensor]:
    """A batch of the first participant, experts that its tokens reach, their true squared norms and tokens, ``[N]``."""
    batch = bench.local(16)[0]
    tokens = profiling.profile(bench.model, [batch], bits=16, attention=False).tokens
    reached = [(int(layer), int(expert)) for layer, expert in (tokens > 0).nonzero()]
    order = torch.randperm(len(reached), generator=seeding.generator(bench.seed, "probe study"))
    keys = sorted(reached[i] for i in order[:num_experts].tolist())
    counts = torch.tensor([int(tokens[key]) for key in keys])
    return batch, keys, gradients.true_norms(bench.model, batch, keys), counts


def probe_quality(
    benches: Iterable[Bench], num_experts: int, counts: Sequence[int] = (1, 2, 4, 8), draws: int = 16
) -> Iterator[Row]:
    """Estimates against truth by number of probes, for every way to probe; and one estimate of each expert's utility.

    ``draws`` probes of each expert are made once; K of them are averaged for an estimate, ``draws // K`` times.
    """
    for bench in benches:
        batch, keys, true, tokens = truth(bench, num_experts)
        yield from _utilities(bench, "true", keys, true, tokens)
        blind = gradients.quality(torch.ones(1, len(keys)), true, tokens)  # tokens alone: equal norms
        for measure in MEASURES[:2]:
            yield bench.row(f"probe_{measure}", FREQUENCY, blind[measure], x=0)
        for name, how in PROBES.items():
            single = torch.stack([gradients.probe_norms(bench.model, batch, keys, seed=s, **how) for s in range(draws)])
            yield from _utilities(bench, name, keys, single[0], tokens)
            for count in counts:
                mean = single[: draws // count * count].view(-1, count, len(keys)).mean(dim=1)
                found = gradients.quality(mean, true, tokens)
                for measure in (*MEASURES, "bias_error") if draws >= 2 * count else MEASURES:
                    yield bench.row(f"probe_{measure}", name, found[measure], x=count)
                passes = gradients.probe_cost(bench.model, keys, count, how["sides"]) / len(keys)
                yield bench.row("probe_passes", name, passes, x=count, unit="forward passes per expert")


def _utilities(bench: Bench, setting: str, keys: list[ExpertKey], norms: Tensor, tokens: Tensor) -> Iterator[Row]:
    """Eq. 3 with one batch."""
    for (layer, expert), value in zip(keys, roles.utility(norms[None], tokens).tolist(), strict=True):
        yield bench.row("utility", setting, value, layer=layer, expert=expert)


def probe_seconds(benches: Iterable[Bench], num_experts: int, repeats: int) -> Iterator[Row]:
    """Measured seconds per expert: one probe each, beside one backward pass for all of them and, as the paper has it,
    two forward passes of the whole model each."""
    for bench in benches:
        batch, keys, _, _ = truth(bench, num_experts)
        works: dict[str, Callable[[], Any]] = {
            "one probe per pass": partial(gradients.probe_norms, bench.model, batch, keys),
            "backward pass for all": partial(gradients.true_norms, bench.model, batch, keys),
            "two whole passes each": partial(_two_passes, bench, batch),
        }
        for name, times in interleaved(works, repeats).items():
            experts = 1 if name == "two whole passes each" else len(keys)
            for x, seconds in enumerate(times):
                yield bench.row("probe_seconds", name, seconds / experts, x=x, unit="s per expert")


@torch.no_grad()
def _two_passes(bench: Bench, batch: Mapping[str, Tensor]) -> None:
    for _ in range(2):
        bench.model(**batch, use_cache=False)


def outcome_rows(outcome: pd.DataFrame, group: str, model: str, task: str) -> Iterator[Row]:
    """What runs came to, one row of ``outcome`` each, as rows of study ``<group>_<column>`` (:data:`OUTCOMES`)."""
    for run in outcome.to_dict("records"):
        for column in OUTCOMES:
            unit = "s" if column == "device_s_at_least" else ""
            more = {"model": model, "task": task, "seed": run["seed"], "unit": unit}
            yield row(f"{group}_{column}", run["setting"], run[column], **more)


def share_rows(participants: pd.DataFrame, model: str, task: str) -> Iterator[Row]:
    """Share of a participant's round that probing takes, by clock and seed, from the second round on."""
    for seed, rows in participants.groupby("seed"):
        shares = phase_shares(rows).set_index(["phase", "clock"])["share"]["probe"]
        for clock, name in (("device", "device clock"), ("wall", "measured here, no link")):
            yield row("probe_share", name, shares[clock], model=model, task=task, seed=int(str(seed)))


def read_runs(
    folder: Path, model: str, task: str, seeds: Sequence[int], variants: Mapping[str, str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables ``rounds`` and ``participants`` of some of FLUX's runs, with the columns ``setting`` and ``seed``.

    ``variants``: what a variant is called in the figures, and its name in the run's id ("" for the plain run).
    """
    found: list[tuple[pd.DataFrame, ...]] = []
    for (setting, variant), seed in itertools.product(variants.items(), seeds):
        file = RunConfig(variant=variant, model=model, task=task, seed=seed).run_id + ".parquet"
        both = (records.read(table, folder / table / file) for table in ("rounds", "participants"))
        found.append(tuple(one.assign(setting=setting, seed=seed) for one in both))
    rounds, participants = (pd.concat(frames, ignore_index=True) for frames in zip(*found, strict=True))
    return rounds, participants
