"""Section 5: what merging costs, by where slots go, what is merged, and how much of each; FLUX's share of a round."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fluxlib import gradients, merging, profiling, seeding
from fluxlib.analysis.runs import OWN_PHASES
from fluxlib.analysis.studies.bench import Bench, Row, interleaved, row, tuned_experts, typical_round
from fluxlib.config import MergingConfig
from fluxlib.devices import catalogue, clock
from fluxlib.methods import fmes
from fluxlib.methods.local import customized
from fluxlib.moe.compact import LayerPlan
from fluxlib.profiling import Profile

SHAPES = {"32 x 16 experts": (32, 16, 4), "27 x 64 experts": (27, 64, 16)}
"""Layers, experts per layer and slots per layer of LLaMA-MoE and DeepSeek-MoE."""
STEPS, PROBES, PROBED_SAMPLES = 4, 8, 8
"""Of the round that is measured here."""
JOINT: dict[str, Any] = {"budgets": "joint", "weights": "gate"}
VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {"budgets": kind} for kind in ("single", "uniform", "adaptive", "joint")},
    "weights: mean": {"weights": "uniform"},
    "weights: frequency": {"weights": "frequency"},
    "weights: attention x frequency": {"weights": "attention_frequency"},
    "weights: squared gate": {"weights": "gate"},
    "aligned": {"align_neurons": True},
    "uniform + squared gate": {"budgets": "uniform", "weights": "gate"},
    "joint + squared gate": JOINT,
    "joint + squared gate + aligned": {**JOINT, "align_neurons": True},
}
"""Settings of :class:`fluxlib.config.MergingConfig`; what is not named is the paper's."""


@dataclass(frozen=True)
class Case:
    """A bench with a profile, the experts that stay as they are, and the slots for the others."""

    bench: Bench
    known: Profile
    tuned: Tensor
    num_merged: int
    data: list[dict[str, Tensor]]

    def plan(self, **rules: Any) -> list[LayerPlan]:
        """Of :func:`fluxlib.merging.plan`, by the paper's rules but for those named."""
        return merging.plan(self.bench.model, self.known, self.tuned, self.num_merged, MergingConfig(**rules))

    def discard(self) -> list[LayerPlan]:
        """The comparison, as FMES has it."""
        return fmes.make_plans(self.bench.model, self.known.frequency, self.tuned)

    def errors(self, plans: list[LayerPlan]) -> tuple[float, float]:
        """Error of the model's last hidden state, and of a layer alone (mean), on held-out samples."""
        model, held_out = self.bench.model, self.bench.held_out
        through = merging.output_error(model, plans, held_out, accumulated=True)[-1]
        return float(through), float(merging.output_error(model, plans, held_out).mean())


def cases(
    benches: Iterable[Bench], num_samples: int, tuned_by: str, tune_fraction: float, merge_fraction: float
) -> list[Case]:
    """One case per bench, of ``num_samples`` local samples that are profiled (4 bits).

    ``tuned_by``: ``frequency``: the most used experts stay (FLUX's first choice); ``random``; else ValueError.
    """
    if tuned_by not in ("frequency", "random"):
        raise ValueError(f"tuned_by must be 'frequency' or 'random', got {tuned_by!r}")
    found = []
    for bench in benches:
        known = bench.profile(num_samples)
        chance = seeding.generator(bench.seed, "tuned") if tuned_by == "random" else None
        tuned = tuned_experts(known, tune_fraction, chance)
        slots = max(len(known.frequency), round(merge_fraction * known.frequency.numel()))
        found.append(Case(bench, known, tuned, slots, bench.local(num_samples)))
    return found


def variants(known: Iterable[Case], settings: Iterable[str] = ("discarded", *VARIANTS)) -> Iterator[Row]:
    """Error of dropping and of :data:`VARIANTS` on held-out samples: ``error``, or ``layer_error`` of a layer alone.

    Of some also ``divergence``, of the predictions from those of the full model, and ``loss``. Before any training a
    loss says little of what was lost: where the base is sure of something wrong, any damage helps.
    """
    for case in known:
        truth, loss = _predictions(case.bench)
        yield case.bench.row("loss", "full model", loss, unit="nats/token")
        for setting in settings:
            chosen = case.discard() if setting == "discarded" else case.plan(**VARIANTS[setting])
            through, alone = case.errors(chosen)
            yield case.bench.row("error", setting, through)
            yield case.bench.row("layer_error", setting, alone)
            if setting in ("discarded", "single", "uniform", "adaptive", "joint + squared gate"):
                with customized(case.bench.model, chosen):
                    found, loss = _predictions(case.bench)
                apart = (truth.exp() * (truth - found)).sum(dim=1).mean()
                yield case.bench.row("divergence", setting, float(apart), unit="nats/token")
                yield case.bench.row("loss", setting, loss, unit="nats/token")
            if setting in ("single", "uniform", "adaptive", "joint"):
                for layer, plan in enumerate(chosen):
                    yield case.bench.row("budgets", setting, len(plan.groups), layer=layer)


@torch.no_grad()
def _predictions(bench: Bench) -> tuple[Tensor, float]:
    """Log-probabilities ``[N, vocabulary]`` at the scored tokens of the held-out samples, and the mean loss."""
    found, losses = [], []
    for batch in bench.held_out:
        out = bench.model(**batch)
        scored = batch["labels"][:, 1:] >= 0
        found.append(out.logits[:, :-1][scored].float().log_softmax(dim=-1))
        losses.append(float(out.loss))
    return torch.cat(found), sum(losses) / len(losses)


def growth(known: Iterable[Case]) -> Iterator[Row]:
    """How an error travels: ``growth`` with one layer merged (x) after every layer, ``accumulated`` with all merged."""
    for case in known:
        plans = case.plan(budgets="uniform")
        for merged, after in enumerate(merging.growth(case.bench.model, plans, case.bench.held_out).tolist()):
            for layer, error in enumerate(after):
                if layer >= merged:
                    yield case.bench.row("growth", "one layer merged", error, x=merged, layer=layer)
        for setting, chosen in (("merged", plans), ("discarded", case.discard())):
            errors = merging.output_error(case.bench.model, chosen, case.bench.held_out, accumulated=True)
            for layer, error in enumerate(errors.tolist()):
                yield case.bench.row("accumulated", setting, error, layer=layer)


def clustering(model: str, seeds: Iterable[int], repeats: int) -> Iterator[Row]:
    """Measured seconds and inertia of both clustering methods at real numbers of experts, in turns."""
    for seed, (shape, (num_layers, num_experts, slots)) in itertools.product(seeds, SHAPES.items()):
        points = [merging.features(layer) for layer in synthetic(num_layers, num_experts, seed)]
        budgets = [slots] * num_layers
        works = {name: partial(merging.cluster, points, budgets, name) for name in ("per_layer", "fused")}
        for method, times in interleaved(works, repeats).items():
            name = f"{shape}, {method.replace('_', ' ')}"
            for x, seconds in enumerate(times):
                yield row("clustering_seconds", name, seconds, model=model, seed=seed, x=x, unit="s")
            for x in range(10):
                found = merging.inertia(points, merging.cluster(points, budgets, method, seed=x))
                yield row("clustering_inertia", name, found, model=model, seed=seed, x=x)


def synthetic(num_layers: int, num_experts: int, seed: int, width: int = 512) -> list[Tensor]:
    """Random experts ``[n, width]`` per layer, around a quarter as many centres, as far from them as they are apart."""
    chance = seeding.generator(seed, "experts")
    centres = torch.randn(num_layers, max(2, num_experts // 4), width, generator=chance)
    nearest = torch.randint(0, centres.shape[1], (num_layers, num_experts), generator=chance)
    noise = torch.randn(num_layers, num_experts, width, generator=chance)
    return list(centres.gather(1, nearest[:, :, None].expand(-1, -1, width)) + noise)


def own_share_on_the_clock(model: str, clock_model: str) -> Iterator[Row]:
    """Seconds of each phase at the shapes of ``clock_model`` on L20s, by link and by samples trained on (x); Fig. 20.

    A quarter of the experts tuned, a quarter frozen; 32 samples of 256 tokens profiled, 8 probes on 16 samples. Rows
    ``phase_device_s``; ``own_share_device``: merging, profiling and probing as a share of the round, all of them in the
    way (``serial``), and what is left of it with the profile beside upload and server (``overlapped``).
    """
    shapes, tokens = clock.shapes(clock_model), 256
    for link, samples in itertools.product(catalogue.LINKS.values(), (64, 512)):
        work = typical_round(shapes.num_experts, samples, tokens, profiled=32)
        server_s = clock.server_seconds([work] * 10, shapes)
        phases = clock.phase_seconds(work, shapes, catalogue.DEVICES["l20"], link, tokens)
        for phase, seconds in phases.items():
            yield row("phase_device_s", f"{link.title}: {phase}", seconds, model=model, x=samples, unit="s")
        own = sum(phases[name] for name in OWN_PHASES)
        others = sum(seconds for name, seconds in phases.items() if name not in OWN_PHASES) + server_s
        overlapped = clock.round_seconds([clock.ParticipantSeconds(phases, None, True)], server_s)
        for name, share in {"serial": own / (own + others), "overlapped": 1 - others / overlapped}.items():
            yield row("own_share_device", f"{link.title}, {name}", share, model=model, x=samples)


def own_share_measured(cases: Iterable[Case], repeats: int) -> Iterator[Row]:
    """Measured seconds of the parts of a round here, in turns (``phase_wall_s``), and their share without any transfer.

    One round: a profile of the case's samples, a merge, :data:`PROBES` probes, :data:`STEPS` steps of 16 samples.
    """
    for case in cases:
        times = interleaved(_phases(case), repeats)
        times["train"] = [STEPS * seconds for seconds in times["train"]]
        for repeat in range(repeats):
            seconds = {name: taken[repeat] for name, taken in times.items()}
            for name, value in seconds.items():
                yield case.bench.row("phase_wall_s", name, value, x=repeat, unit="s")
            own = sum(value for name, value in seconds.items() if name != "train")
            yield case.bench.row("own_share_wall", "no transfer", own / (own + seconds["train"]), x=repeat)


def _phases(case: Case) -> dict[str, Callable[[], Any]]:
    """What a participant does in a round, phase by phase; ``train`` is one step."""
    model, plans = case.bench.model, case.plan()
    unseen = (~case.tuned).nonzero().tolist()
    experts = [(layer, expert) for layer, expert in unseen[:: max(1, len(unseen) // PROBES)][:PROBES]]
    eight = {name: rows[:PROBED_SAMPLES] for name, rows in case.data[0].items()}

    def merge() -> None:
        with customized(model, case.plan(**JOINT)):
            pass

    def step() -> None:
        with customized(model, plans):
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
            model(**case.data[0]).loss.backward()
            optimizer.step()

    return {
        "profile": partial(profiling.profile, model, case.data[:2], 4),
        "merge": merge,
        "probe": partial(gradients.probe_norms, model, eight, experts),
        "train": step,
    }
