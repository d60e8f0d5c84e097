"""Per-expert aggregation (section 6 of the paper): a mean that takes replies in one at a time, and robust rules.

Paper: FedAvg per expert over the participants that tuned it. Deviation: weights are routed tokens of the expert, not
sizes of data sets.

Robust rules are for operators who do not know who takes part: one participant that lies moves a mean as far as it
likes. What a rule can bear depends on how many tuned an expert: with one tuner no rule can tell a lie from the truth,
with two medians and trimmed means are the mean. Flower's robust strategies (``FedMedian``, ``FedTrimmedAvg``, ``Krum``,
``Bulyan``) refuse replies with different arrays, as these are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxlib.federation.protocol.wire import Experts
from fluxlib.methods.base import ExpertKey

NO_TOKENS = 1e-6
"""Weight of a reply without tokens: nothing beside a real weight, everything alike among themselves."""


@dataclass
class _Sum:
    weight: float
    count: int
    tensors: dict[str, Tensor]


class ExpertMean:
    """Mean of changes per expert, weighted by tokens, over the replies that changed it.

    A single reply's change is kept as it came and not multiplied by a weight of one, so it comes back bit for bit.
    An expert that received no tokens anywhere counts every reply that tuned it alike. Order of :meth:`add` decides
    the last bits, so replies are added in order of participants.
    """

    def __init__(self) -> None:
        self._sums: dict[ExpertKey, _Sum] = {}

    @torch.no_grad()
    def add(self, changes: Experts, tokens: Tensor) -> None:
        """Take in one accepted reply; ``tokens`` is ``[layers, experts]``."""
        weights = tokens.tolist()
        for key, tensors in changes.items():
            weight = max(float(weights[key[0]][key[1]]), NO_TOKENS)
            total = self._sums.get(key)
            if total is None:
                self._sums[key] = _Sum(weight, 1, dict(tensors))
                continue
            if total.count == 1:
                total.tensors = {name: tensor * total.weight for name, tensor in total.tensors.items()}
            for name, tensor in tensors.items():
                total.tensors[name].add_(tensor, alpha=weight)
            total.weight += weight
            total.count += 1

    def result(self) -> dict[ExpertKey, dict[str, Tensor]]:
        """Mean change of every expert that at least one reply tuned."""
        return {
            key: total.tensors if total.count == 1 else {n: t / total.weight for n, t in total.tensors.items()}
            for key, total in self._sums.items()
        }


class RobustAggregate:
    """Changes of each expert, combined by a rule that a share ``trim_frac`` of bad ones cannot move far.

    Every reply counts alike: a weight that a participant reports of itself would be the first thing to lie about.
    Unlike with the mean, memory grows with the participants of a round.
    """

    def __init__(self, rule: str, trim_frac: float) -> None:
        self.rule, self.trim_frac = rule, trim_frac
        self._changes: dict[ExpertKey, list[dict[str, Tensor]]] = {}

    def add(self, changes: Experts, tokens: Tensor) -> None:
        """Take in one accepted reply; ``tokens`` is not used."""
        for key, tensors in changes.items():
            self._changes.setdefault(key, []).append(dict(tensors))

    @torch.no_grad()
    def result(self) -> dict[ExpertKey, dict[str, Tensor]]:
        """The combined change of every expert that at least one reply tuned."""
        return {
            key: {name: self._combine([change[name] for change in changes]) for name in changes[0]}
            for key, changes in self._changes.items()
        }

    def _combine(self, tensors: list[Tensor]) -> Tensor:
        if len(tensors) == 1:
            return tensors[0]
        half = (len(tensors) - 1) // 2
        bad = math.ceil(self.trim_frac * len(tensors) - 1e-9)
        return trimmed_mean(torch.stack(tensors).float(), half if self.rule == "median" else min(bad, half))


@torch.no_grad()
def clip(changes: Experts, bound: float | None) -> Experts:
    """One participant's whole change, as one vector scaled to a norm of at most ``bound``; None: as it came."""
    tensors = [tensor.float() for change in changes.values() for tensor in change.values()]
    if bound is None or not tensors:
        return changes
    norm = float(torch.stack(torch._foreach_norm(tensors)).norm())
    if norm <= bound:
        return changes
    return {key: {name: t * (bound / norm) for name, t in change.items()} for key, change in changes.items()}


def trimmed_mean(values: Tensor, num_cut: int) -> Tensor:
    """Mean over the first dimension without the ``num_cut`` smallest and largest of each coordinate.

    Half of the values cut at each end leaves the median. Yin et al. 2018.
    """
    ordered = values.sort(dim=0).values
    return ordered[num_cut : len(values) - num_cut].mean(dim=0)
