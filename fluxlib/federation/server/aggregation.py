"""Per-expert aggregation (section 6 of the paper): a mean that takes replies in one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxlib.federation.protocol.sync import Experts
from fluxlib.methods.base import ExpertKey


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

    Paper: FedAvg per expert over the participants that tuned it. Deviation: weights are routed tokens of the expert,
    not sizes of data sets.
    """

    def __init__(self) -> None:
        self._sums: dict[ExpertKey, _Sum] = {}
        self.num_updates = 0

    @torch.no_grad()
    def add(self, changes: Experts, tokens: Tensor) -> None:
        """Take in one accepted reply; ``tokens`` is ``[layers, experts]``."""
        self.num_updates += 1
        weights = tokens.tolist()
        for key, tensors in changes.items():
            weight = float(weights[key[0]][key[1]])
            found = self._sums.get(key)
            if found is None:
                self._sums[key] = _Sum(weight, 1, dict(tensors))
            else:
                _accumulate(found, weight, tensors)

    def num_tuners(self, key: ExpertKey) -> int:
        """How many replies changed this expert."""
        return self._sums[key].count

    def result(self) -> dict[ExpertKey, dict[str, Tensor]]:
        """Mean change of every expert that at least one reply tuned."""
        return {key: _mean(total) for key, total in self._sums.items()}


# Replies with no tokens weigh this much: nothing beside a real weight, everything alike among themselves.
_NO_TOKENS = 1e-6


def _accumulate(total: _Sum, weight: float, tensors: Mapping[str, Tensor]) -> None:
    if total.count == 1:
        first = max(total.weight, _NO_TOKENS)
        total.tensors = {name: tensor * first for name, tensor in total.tensors.items()}
        total.weight = first
    weight = max(weight, _NO_TOKENS)
    for name, tensor in tensors.items():
        total.tensors[name].add_(tensor, alpha=weight)
    total.weight += weight
    total.count += 1


def _mean(total: _Sum) -> dict[str, Tensor]:
    if total.count == 1:
        return total.tensors
    return {name: tensor / total.weight for name, tensor in total.tensors.items()}
