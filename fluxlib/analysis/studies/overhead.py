"""FLUX's own share of a round (Fig. 20): profiling, merging, probing, beside training and transfer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from fluxlib import gradients, profiling
from fluxlib.analysis.studies.bench import Row, interleaved, row
from fluxlib.analysis.studies.merging import Case
from fluxlib.analysis.studies.training import flux_work
from fluxlib.devices import catalogue, clock
from fluxlib.moe import compact

OWN = ("merge", "quantize", "profile", "probe")
"""Phases of :data:`fluxlib.records.PHASES` that only FLUX has."""


def on_the_clock(
    model: str, clock_model: str, device: str = "l20", profiled: int = 32, tokens_per_sample: int = 256
) -> Iterator[Row]:
    """Seconds of each phase at the shapes of ``clock_model``, by link and by samples trained on in a round (x).

    A quarter of the experts tuned, a quarter frozen; ``profiled`` samples profiled, 8 probes on 16 samples.
    Rows ``phase_device_s``; ``own_share_device``: merging, profiling and probing as a share of the round, all of them
    in the way (``serial``), and what is left of it with the profile beside upload and server (``overlapped``).
    """
    shapes = clock.shapes(clock_model)
    for link, samples in itertools.product(catalogue.LINKS.values(), (64, 512)):
        work = flux_work(shapes.num_experts, samples, tokens_per_sample, profiled)
        server_s = clock.server_seconds([work] * 10, shapes)
        phases = clock.phase_seconds(work, shapes, catalogue.DEVICES[device], link, tokens_per_sample)
        for phase, seconds in phases.items():
            yield row("phase_device_s", f"{link.title}: {phase}", seconds, model=model, x=samples, unit="s")
        own = sum(phases[name] for name in OWN)
        others = sum(seconds for name, seconds in phases.items() if name not in OWN) + server_s
        overlapped = clock.round_seconds([phases], [False], server_s).total_s
        shares = {"serial": own / (own + others), "overlapped": 1 - others / overlapped}
        for name, share in shares.items():
            yield row("own_share_device", f"{link.title}, {name}", share, model=model, x=samples)


def measured(cases: Iterable[Case], repeats: int, steps: int = 4, probes: int = 8) -> Iterator[Row]:
    """Measured seconds of the parts of a round here, in turns (``phase_wall_s``), and their share without any transfer.

    One round: one profile of the case's samples, one merge, ``probes`` probes, ``steps`` training steps of 16 samples.
    """
    for case in cases:
        times = interleaved(_works(case, probes), repeats)
        times["train"] = [steps * seconds for seconds in times["train"]]
        for repeat in range(repeats):
            seconds = {name: taken[repeat] for name, taken in times.items()}
            for name, value in seconds.items():
                yield case.bench.row("phase_wall_s", name, value, x=repeat, unit="s")
            own = sum(value for name, value in seconds.items() if name != "train")
            yield case.bench.row("own_share_wall", "no transfer", own / (own + seconds["train"]), x=repeat)


def _works(case: Case, probes: int) -> dict[str, Any]:
    model = case.bench.model
    unseen = (~case.tuned).nonzero().tolist()
    experts = [(layer, expert) for layer, expert in unseen[:: max(1, len(unseen) // probes)][:probes]]
    eight = {name: rows[:8] for name, rows in case.data[0].items()}

    def merge() -> None:
        compact.restore(compact.customize(model, case.plan(budgets="joint", weights="gate")), write=False)

    return {
        "profile": partial(profiling.profile, model, case.data[:2], 4),
        "merge": merge,
        "probe": partial(gradients.probe_norms, model, eight, experts),
        "train": partial(_step, case, case.plan()),
    }


def _step(case: Case, plans: list[compact.LayerPlan]) -> None:
    """One training step of the customised model; putting it together and apart is not a part of training."""
    model = case.bench.model
    compact.customize(model, plans)
    try:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
        model(**case.data[0]).loss.backward()
        optimizer.step()
    finally:
        compact.restore(model, write=False)
