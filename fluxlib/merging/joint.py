"""Budgets and clusters from one objective (beyond the paper).

Replacing expert e by a merged one costs about ``q_e |W_e - W_c|^2``: q_e says how strongly the tokens weigh e (squared
gate weights, from the profile), and the best merged expert is the q-weighted mean. :func:`joint_clusters` merges the
cheapest pair of clusters, wherever in the model it is, until the slots suffice. How many slots a layer gets is
then a result, and depends neither on a variance nor on a depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fluxlib.merging.budgets import check_enough

LEAST_IMPORTANCE = 1e-6
"""Of the mean importance: experts that are never used still join those they resemble."""


def joint_clusters(grams: Sequence[Tensor], importance: Sequence[Tensor], num_slots: int) -> list[Tensor]:
    """Ward's clustering of all layers at once, importance-weighted and cut at one height for the whole model.

    Args:
        grams: per layer ``[n_l, n_l]``, scalar products of the experts to merge, as a share of the layer's total.
        importance: per layer ``[n_l]``, not negative.
        num_slots: clusters of all layers together; ValueError: fewer than layers with experts.

    Returns:
        Per layer labels ``[n_l]`` long, in the order of the first expert; every layer with experts has a cluster.
    """
    counts = np.array([len(gram) for gram in grams])
    check_enough(counts, num_slots)
    costs, pairs = _ward(*_padded(grams, importance))
    # Within a layer Ward's costs never fall, so the cheapest merges of all layers are the first ones of each.
    num_merges = max(0, int(counts.sum()) - num_slots)
    chosen = np.zeros(costs.size, bool)
    chosen[np.argsort(costs, axis=None, kind="stable")[:num_merges]] = True
    merges = chosen.reshape(costs.shape).sum(axis=1)
    return [_labels(count, pairs[layer, : merges[layer]]) for layer, count in enumerate(counts)]


def _padded(grams: Sequence[Tensor], importance: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Cost of merging each pair of experts ``[L, n, n]``, infinite for none, and their importance ``[L, n]``."""
    longest = max(len(gram) for gram in grams)
    cost, weight = np.full((len(grams), longest, longest), np.inf), np.ones((len(grams), longest))
    for layer, (gram, given) in enumerate(zip(grams, importance, strict=True)):
        n = len(gram)
        if n:
            products, q = gram.detach().cpu().double().numpy(), given.detach().cpu().double().numpy()
            q = np.maximum(q, max(LEAST_IMPORTANCE * q.mean(), np.finfo(float).tiny))
            square = np.diagonal(products)
            distance = np.maximum(square[:, None] + square - 2 * products, 0)
            cost[layer, :n, :n] = distance * (q[:, None] * q / (q[:, None] + q))
            weight[layer, :n] = q
    cost[:, np.arange(longest), np.arange(longest)] = np.inf
    return cost, weight


def _ward(cost: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One merge per step in every layer: costs ``[L, n - 1]`` (infinite: none left) and pairs ``[L, n - 1, 2]``."""
    num_layers, n = weight.shape
    rows, weight = np.arange(num_layers), weight.copy()
    costs, pairs = np.full((num_layers, max(n - 1, 0)), np.inf), np.zeros((num_layers, max(n - 1, 0), 2), np.int64)
    for step in range(n - 1):
        flat = cost.reshape(num_layers, -1)
        best = flat.argmin(axis=1)
        one, other = np.minimum(best // n, best % n), np.maximum(best // n, best % n)
        price = flat[rows, best]
        costs[:, step], pairs[:, step, 0], pairs[:, step, 1] = price, one, other
        q_one, q_other = weight[rows, one, None], weight[rows, other, None]
        total = weight + q_one + q_other
        # Lance and Williams: cost of merging each cluster with the union.
        with np.errstate(invalid="ignore"):
            union = (
                (weight + q_one) * cost[rows, one] + (weight + q_other) * cost[rows, other] - weight * price[:, None]
            )
        union = np.where(np.isnan(union), np.inf, union / total)
        union[rows, one] = np.inf
        cost[rows, one], cost[rows, :, one] = union, union
        cost[rows, other], cost[rows, :, other] = np.inf, np.inf
        weight[rows, one] += weight[rows, other]
    return costs, pairs


def _labels(count: int, merges: np.ndarray) -> Tensor:
    """Clusters after some merges, numbered by their first expert."""
    label = np.arange(count)
    for one, other in merges.tolist():
        label[label == other] = one
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    return torch.from_numpy(first.argsort().argsort()[inverse].astype(np.int64))
