"""Section 5: what merging costs, by where slots go, what is merged with what, and how much of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fluxlib import merging, seeding
from fluxlib.analysis.studies.bench import Bench, Row, interleaved, row
from fluxlib.analysis.studies.training import at_random, most_used
from fluxlib.config import MergingConfig
from fluxlib.moe import compact, find
from fluxlib.moe.compact import LayerPlan
from fluxlib.profiling import Profile

SHAPES = {"32 x 16 experts": (32, 16, 4), "27 x 64 experts": (27, 64, 16)}
"""Layers, experts per layer and slots per layer of LLaMA-MoE and DeepSeek-MoE."""

WEIGHTS = {
    "mean": "uniform", "frequency": "frequency", "attention x frequency": "attention_frequency", "squared gate": "gate",
}  # fmt: skip
BUDGETS = ("single", "uniform", "adaptive", "joint")


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
        """The comparison; where a layer has fewer than top-k tuned experts its most used others stay too."""
        order = (self.known.frequency + 2 * self.tuned).argsort(dim=1, descending=True)
        top_k = find.layers(self.bench.model)[0].top_k
        return merging.discard(self.known, self.tuned | torch.zeros_like(self.tuned).scatter(1, order[:, :top_k], True))

    def errors(self, plans: list[LayerPlan]) -> tuple[float, float]:
        """Error of the model's last hidden state, and of a layer alone (mean), on held-out samples."""
        model, held_out = self.bench.model, self.bench.held_out
        through = merging.output_error(model, plans, held_out, accumulated=True)[-1]
        return float(through), float(merging.output_error(model, plans, held_out).mean())


def cases(
    benches: Iterable[Bench], num_samples: int, tuned_by: str, tune_fraction: float, merge_fraction: float
) -> list[Case]:
    """One case per bench.

    Args:
        num_samples: local samples that are profiled (4 bits) and on which options are measured.
        tuned_by: ``frequency``: the most used experts stay (FLUX's first choice); ``random``.

    Raises:
        ValueError: another ``tuned_by``.
    """
    if tuned_by not in ("frequency", "random"):
        raise ValueError(f"tuned_by must be 'frequency' or 'random', got {tuned_by!r}")
    found = []
    for bench in benches:
        known = bench.profile(num_samples)
        chance = seeding.generator(bench.seed, "tuned")
        tuned = most_used(known, tune_fraction) if tuned_by == "frequency" else at_random(known, tune_fraction, chance)
        slots = max(len(known.frequency), round(merge_fraction * known.frequency.numel()))
        found.append(Case(bench, known, tuned, slots, bench.local(num_samples)))
    return found


def variants(known: Iterable[Case]) -> Iterator[Row]:
    """Error of every variant: ``error`` of the model, ``layer_error`` of a layer alone, on held-out samples.

    Of some also ``divergence``, of the predictions from those of the full model, and ``loss``. Before any training a
    loss says little of what was lost: where the base is sure of something wrong, any damage helps.

    The same case for all of them; what is not named is the paper's: adaptive budgets, fused clustering of weights,
    attention x frequency.
    """
    for case in known:
        truth, loss = _predictions(case)
        yield case.bench.row("loss", "full model", loss, unit="nats/token")
        for setting, plans in _variants(case):
            through, alone = case.errors(plans)
            yield case.bench.row("error", setting, through)
            yield case.bench.row("layer_error", setting, alone)
            if setting in ("discarded", "single", "uniform", "adaptive", "joint + squared gate"):
                found, loss = _predictions(case, plans)
                apart = (truth.exp() * (truth - found)).sum(dim=1).mean()
                yield case.bench.row("divergence", setting, float(apart), unit="nats/token")
                yield case.bench.row("loss", setting, loss, unit="nats/token")
            if setting in BUDGETS:
                for layer, plan in enumerate(plans):
                    yield case.bench.row("budgets", setting, len(plan.groups), layer=layer)


def _variants(case: Case) -> Iterator[tuple[str, list[LayerPlan]]]:
    rules: dict[str, dict[str, Any]] = {
        **{kind: {"budgets": kind} for kind in BUDGETS},
        **{f"weights: {name}": {"weights": kind} for name, kind in WEIGHTS.items()},
        "aligned": {"align_neurons": True},
        "uniform + squared gate": {"budgets": "uniform", "weights": "gate"},
        "joint + squared gate": {"budgets": "joint", "weights": "gate"},
        "joint + squared gate + aligned": {"budgets": "joint", "weights": "gate", "align_neurons": True},
    }
    yield "discarded", case.discard()
    for setting, given in rules.items():
        yield setting, case.plan(**given)


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
    for seed in seeds:
        for shape, (num_layers, num_experts, slots) in SHAPES.items():
            points = [merging.features(layer) for layer in synthetic(num_layers, num_experts, seed)]
            budgets = [slots] * num_layers
            for method, times in interleaved(
                {name: partial(merging.cluster, points, budgets, name) for name in ("per_layer", "fused")}, repeats
            ).items():
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


@torch.no_grad()
def _predictions(case: Case, plans: list[LayerPlan] | None = None) -> tuple[Tensor, float]:
    """Log-probabilities ``[N, vocabulary]`` at the scored tokens of the held-out samples, and the mean loss.

    Of the model, or of the one that is customised by ``plans``.
    """
    model, found, losses = case.bench.model, [], []
    if plans is not None:
        compact.customize(model, plans)
    try:
        for batch in case.bench.held_out:
            out = model(**batch)
            scored = batch["labels"][:, 1:] >= 0
            found.append(out.logits[:, :-1][scored].float().log_softmax(dim=-1))
            losses.append(float(out.loss))
    finally:
        if plans is not None:
            compact.restore(model, write=False)
    return torch.cat(found), sum(losses) / len(losses)
