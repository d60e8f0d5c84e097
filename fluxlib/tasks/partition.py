"""Who holds what: training samples dealt to participants, and the histogram of what each was dealt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from fluxlib.tasks.base import Example

Scheme = Literal["dirichlet", "iid", "label"]


def partition(
    examples: Sequence[Example],
    num_participants: int,
    generator: torch.Generator,
    scheme: Scheme = "dirichlet",
    alpha: float = 0.5,
    equal_sizes: bool = True,
) -> list[list[int]]:
    """Indices of the examples that each participant holds; every example goes to one at most.

    ValueError: fewer examples than participants.

    Args:
        scheme: ``iid`` deals at random; ``label`` gives each participant whole labels (labels are dealt round robin,
            and shared where there are fewer labels than participants); ``dirichlet`` draws each participant's mix
            of labels.
        alpha: concentration of the Dirichlet; small values make participants differ.
        equal_sizes: Dirichlet only: participants hold equally many samples and differ in their mix. Otherwise each
            label is cut by a Dirichlet over participants, and sizes differ too.
    """
    if len(examples) < num_participants:
        raise ValueError(
            f"num_participants is {num_participants}, allowed is at most the number of samples, {len(examples)}"
        )
    chance = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    pools = _pools(examples, chance)
    if scheme == "iid":
        order = chance.permutation(len(examples))
        return [part.tolist() for part in np.array_split(order, num_participants)]
    if scheme == "label":
        return _by_label(pools, num_participants)
    if equal_sizes:
        return _equal_dirichlet(pools, len(examples) // num_participants, num_participants, alpha, chance)
    return _ragged_dirichlet(pools, num_participants, alpha, chance)


def histogram(examples: Sequence[Example], parts: Sequence[Sequence[int]]) -> list[dict[str, int]]:
    """Number of samples by label, for each participant."""
    return [dict(sorted(Counter(examples[i].label for i in part).items())) for part in parts]


def _pools(examples: Sequence[Example], chance: np.random.Generator) -> list[list[int]]:
    """Shuffled sample indices of each label, labels in sorted order."""
    by_label: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_label.setdefault(example.label, []).append(index)
    return [chance.permutation(by_label[label]).tolist() for label in sorted(by_label)]


def _by_label(pools: list[list[int]], num_participants: int) -> list[list[int]]:
    parts: list[list[int]] = [[] for _ in range(num_participants)]
    for index, pool in enumerate(pools):
        holders = range(index % num_participants, num_participants, len(pools))
        for holder, share in zip(holders, np.array_split(pool, len(holders)), strict=True):
            parts[holder] += share.tolist()
    return parts


def _equal_dirichlet(
    pools: list[list[int]], size: int, num_participants: int, alpha: float, chance: np.random.Generator
) -> list[list[int]]:
    """Each participant draws label after label from its own mix, among the labels that are not used up."""
    share = np.array([len(pool) for pool in pools]) / sum(map(len, pools))
    mixes = chance.dirichlet(np.maximum(alpha * len(pools) * share, 1e-3), num_participants)
    left = [list(pool) for pool in pools]
    parts: list[list[int]] = [[] for _ in range(num_participants)]
    for participant in chance.permutation(num_participants):
        for _ in range(size):
            stock = np.array([len(pool) > 0 for pool in left])
            weight = mixes[participant] * stock
            weight = weight / weight.sum() if weight.sum() > 1e-12 else stock / stock.sum()
            parts[participant].append(left[chance.choice(len(left), p=weight)].pop())
    return parts


def _ragged_dirichlet(
    pools: list[list[int]], num_participants: int, alpha: float, chance: np.random.Generator
) -> list[list[int]]:
    parts: list[list[int]] = [[] for _ in range(num_participants)]
    for pool in pools:
        shares = chance.dirichlet(np.full(num_participants, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(pool)).astype(int)
        for participant, share in enumerate(np.split(np.array(pool, dtype=int), cuts)):
            parts[participant] += share.tolist()
    while empty := [i for i, part in enumerate(parts) if not part]:
        parts[empty[0]].append(max(parts, key=len).pop())
    return parts
