"""Robust aggregation per expert: what replaces the mean where some participants may lie.

Each expert is aggregated over those who tuned it, so what a rule can bear depends on how many that were: with one
tuner no rule can tell a lie from the truth, with two medians and trimmed means are the mean. How often an expert has
enough tuners follows from budgets and roles, and is the price of different experts on each participant.
Flower's robust strategies (``FedMedian``, ``FedTrimmedAvg``, ``Krum``, ``MultiKrum``, ``Bulyan``) take replies
with the same arrays only, and refuse these.

All replies of a round are kept until the round is over: unlike the mean, memory grows with the participants of a round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fluxlib.config import RunConfig
from fluxlib.federation.protocol.sync import Experts
from fluxlib.federation.server.aggregation import ExpertMean
from fluxlib.methods.base import ExpertKey

KINDS = ("trimmed_mean", "median", "krum")


class Aggregate(Protocol):
    """What takes in the accepted replies of a round, one at a time, and gives one change per expert."""

    def add(self, changes: Experts, tokens: Tensor) -> None:
        """Take in one accepted reply; ``tokens`` is ``[layers, experts]``."""

    def num_tuners(self, key: ExpertKey) -> int:
        """How many replies changed this expert."""

    def result(self) -> dict[ExpertKey, dict[str, Tensor]]:
        """The combined change of every expert that at least one reply tuned."""


def make_aggregate(config: RunConfig) -> Aggregate:
    """The aggregate of one round that ``config.aggregation`` names."""
    if config.aggregation.rule == "mean":
        return ExpertMean()
    return RobustAggregate(config.aggregation.rule, config.aggregation.trim_frac)


class RobustAggregate:
    """Changes of each expert, combined by a rule that some bad ones cannot move far.

    Every reply counts alike: a weight that a participant reports of itself would be the first thing to lie about.

    Args:
        kind: one of :data:`KINDS`; see :func:`trimmed_mean`, :func:`krum`.
        trim_fraction: share of an expert's tuners that may be bad.
    """

    def __init__(self, kind: str, trim_fraction: float) -> None:
        if kind not in KINDS:
            raise ValueError(f"aggregation is {kind!r}, allowed are {', '.join(KINDS)}")
        self.kind = kind
        self.trim_fraction = trim_fraction
        self._changes: dict[ExpertKey, list[dict[str, Tensor]]] = {}
        self.num_updates = 0

    def add(self, changes: Experts, tokens: Tensor) -> None:
        """Take in one accepted reply; ``tokens`` is not used."""
        self.num_updates += 1
        for key, tensors in changes.items():
            self._changes.setdefault(key, []).append(dict(tensors))

    def num_tuners(self, key: ExpertKey) -> int:
        """How many replies changed this expert."""
        return len(self._changes[key])

    @torch.no_grad()
    def result(self) -> dict[ExpertKey, dict[str, Tensor]]:
        """The combined change of every expert that at least one reply tuned."""
        return {key: self._combine(changes) for key, changes in self._changes.items()}

    def _combine(self, changes: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        if len(changes) == 1:
            return changes[0]
        bad = math.ceil(self.trim_fraction * len(changes) - 1e-9)
        if self.kind == "krum":
            return krum(changes, bad)
        bad = (len(changes) - 1) // 2 if self.kind == "median" else min(bad, (len(changes) - 1) // 2)
        return {name: trimmed_mean(torch.stack([c[name].float() for c in changes]), bad) for name in changes[0]}


def trimmed_mean(values: Tensor, num_cut: int) -> Tensor:
    """Mean over the first dimension without the ``num_cut`` smallest and largest of each coordinate.

    Half of the values cut at each end leaves the median. Yin et al. 2018.
    """
    ordered = values.sort(dim=0).values
    return ordered[num_cut : len(values) - num_cut].mean(dim=0)


def krum(changes: Sequence[dict[str, Tensor]], num_bad: int) -> dict[str, Tensor]:
    """The one change that is nearest to its ``n - num_bad - 2`` nearest others (at least one). Blanchard et al. 2017.

    Its guarantee needs ``n >= 2 * num_bad + 3`` tuners of the expert; with fewer this is a choice without one.
    """
    flat = torch.stack([torch.cat([change[name].float().flatten() for name in sorted(change)]) for change in changes])
    distances = torch.cdist(flat[None], flat[None], compute_mode="donot_use_mm_for_euclid_dist")[0].square()
    near = max(1, len(changes) - num_bad - 2)
    scores = distances.sort(dim=1).values[:, 1 : near + 1].sum(dim=1)
    return changes[int(scores.argmin())]
