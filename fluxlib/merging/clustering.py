"""Which experts of a layer are merged with one another (section 5.2): K-Means, over all layers at once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MAX_ITERATIONS = 20


def cluster(features: Sequence[Tensor], budgets: Sequence[int], method: str = "fused", seed: int = 0) -> list[Tensor]:
    """Cluster each layer's experts; no cluster spans two layers.

    Args:
        features: per layer ``[n_l, dim]``; n_l may differ, dim may not.
        budgets: clusters of each layer, 1..n_l (0 where n_l is 0).
        method: ``fused``, one K-Means over the experts of all layers at once; or ``per_layer``, scikit-learn's K-Means
            layer by layer, the reference and the slow one. Both minimise :func:`inertia`.

    Returns:
        Per layer labels ``[n_l]`` long: every label of 0..budget-1 occurs, in the order of its first expert.

    Raises:
        ValueError: a budget that is not allowed, features that are not finite (naming the layer), an unknown method.
    """
    if method not in ("fused", "per_layer"):
        raise ValueError(f"method must be 'fused' or 'per_layer', got {method!r}")
    points, real = _padded(features, budgets)
    if not real.any():
        return [torch.zeros(0, dtype=torch.long) for _ in features]
    member = (_fused if method == "fused" else _per_layer)(points, real, np.asarray(budgets), seed)
    labels = torch.from_numpy(_in_order_of_appearance(member))
    return list(labels.unbind()) if real.all() else [row[: len(own)] for row, own in zip(labels, features, strict=True)]


def inertia(features: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    """Sum over all experts of the squared distance to the mean of their cluster."""
    total = 0.0
    for points, found in zip(features, labels, strict=True):
        if len(points):
            members = torch.nn.functional.one_hot(found).T.to(points)
            means = members @ points / members.sum(dim=1, keepdim=True)
            total += float((points - means[found]).square().sum())
    return total


def _padded(features: Sequence[Tensor], budgets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Experts of all layers as ``[L, n, dim]``, 0 where a layer has fewer than n, and which are real, ``[L, n]``."""
    if len(features) != len(budgets):
        raise ValueError(f"budgets must have one entry for each of {len(features)} layers, got {len(budgets)}")
    counts = [len(rows) for rows in features]
    for layer, (k, most) in enumerate(zip(budgets, counts, strict=True)):
        if not min(most, 1) <= k <= most:
            raise ValueError(f"budgets[{layer}] must be in {min(most, 1)}..{most} (experts to merge), got {k}")
    points = pad_sequence(list(features), batch_first=True).detach().float().cpu().numpy()
    real = np.arange(points.shape[1]) < np.array(counts)[:, None]
    if not np.isfinite(points.sum()):
        layer, expert = np.argwhere(~np.isfinite(points).all(axis=2))[0].tolist()
        raise ValueError(f"features must be finite, those of layer {layer}, expert {expert} are not")
    return points, real


def _fused(points: np.ndarray, real: np.ndarray, k: np.ndarray, seed: int) -> np.ndarray:
    """One K-Means over all layers: membership bool ``[L, k_max, n]``.

    Paper: one similarity matrix of all experts and all centroids, entries between layers masked. Here only
    the blocks that the mask leaves are computed, batched and padded to the longest layer; unused centroids
    are infinitely far. Deviation: nearness is the squared distance, not the cosine: features have unit length,
    centroids do not. No centroid is ever formed: with D the squared distances between experts and m the shares of
    a cluster's members, ``|x - c|^2 = (D m)_x - m D m / 2``.
    """
    apart, num_real = _squared_distances(points, real), int(real.sum())
    unused, ones = np.arange(k.max()) >= k[:, None], np.ones(points.shape[1], np.float32)
    far = apart[np.arange(len(points))[:, None], _plus_plus(apart, real, k, np.random.default_rng(seed))]
    member = np.zeros(far.shape, bool)
    for _ in range(MAX_ITERATIONS):
        far[unused] = np.inf
        before, member = member, (far == far.min(axis=1, keepdims=True)) & real[:, None, :]
        if np.array_equal(before, member):
            break
        shares = member.astype(np.float32)
        sizes = shares @ ones
        if int(sizes.sum()) != num_real or not (sizes + unused).all():
            member = _repaired(-far, real, k)
            shares = member.astype(np.float32)
            sizes = shares @ ones
        shares /= np.maximum(sizes, 1)[:, :, None]
        far = shares @ apart
        far -= 0.5 * np.einsum("lkn,lkn->lk", far, shares)[:, :, None]
    return member


def _plus_plus(apart: np.ndarray, real: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++ in all layers at once: the experts ``[L, k_max]`` that start as centroids.

    One search draws for all layers: the cumulated distances of a layer come after those of the layer before.
    """
    (num_layers, n, _), most, counts = apart.shape, int(k.max()), real.sum(axis=1)
    trials, rows = 2 + int(np.log(max(most, 1))), np.arange(num_layers)
    distance = apart.reshape(num_layers * n, n)
    chosen = np.zeros((most, num_layers), np.int64)
    chosen[0] = rows * n + (rng.random(num_layers) * counts).astype(np.int64)
    nearest, ones, upto = distance[chosen[0]], np.ones(n, np.float32), np.triu(np.ones((n, n), np.float32))
    # In float64, so that small distances keep their share far from 0.
    offset = rows[:, None] * (2.0 * n * float(apart.max()))
    draws = rng.random((most, num_layers, trials), dtype=np.float32)
    last, first_trial = np.repeat(rows * n + np.maximum(counts - 1, 0), trials), rows * trials
    for step in range(1, most):
        edges = nearest @ upto
        wanted = draws[step] * edges[:, -1:] + offset
        candidates = np.minimum((edges + offset).ravel().searchsorted(wanted.ravel(), side="right"), last)
        after = np.minimum(nearest[:, None], distance[candidates].reshape(num_layers, trials, n))
        best = first_trial + (after @ ones).argmin(axis=1)
        chosen[step] = candidates[best]
        nearest = after.reshape(-1, n)[best]
    return chosen.T - rows[:, None] * n


def _squared_distances(points: np.ndarray, real: np.ndarray) -> np.ndarray:
    """``[L, n, n]`` between the experts of a layer, 0 to padding so that it is never drawn.

    One product: ``(-2 x, |x|^2, 1) (y, 1, |y|^2)``, with 0 instead of 1 for padding.
    """
    (num_layers, n, dim), square = points.shape, np.square(points) @ np.ones(points.shape[2], np.float32)
    left, right = np.empty((2, num_layers, n, dim + 2), np.float32)
    np.multiply(points, -2, out=left[:, :, :-2])
    left[:, :, -2], left[:, :, -1] = square, real
    right[:, :, :-2], right[:, :, -2], right[:, :, -1] = points, real, square
    out = left @ right.transpose(0, 2, 1)
    return np.maximum(out, 0, out=out)


def _repaired(similarity: np.ndarray, real: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Membership where an expert had two equally near centroids, or a centroid no expert."""
    labels, served = similarity.argmax(axis=1), similarity.max(axis=1)
    for layer in range(len(labels)):
        labels[layer] = _fill_empty(labels[layer], served[layer], real[layer], k[layer])
    return (labels[:, None, :] == np.arange(similarity.shape[1])[:, None]) & real[:, None, :]


def _fill_empty(labels: np.ndarray, served: np.ndarray, real: np.ndarray, k: int) -> np.ndarray:
    """Each empty cluster gets the worst-served expert among those that are not alone."""
    labels = labels.copy()
    for empty in range(k):
        sizes = np.bincount(labels[real], minlength=k)
        if sizes[empty] == 0:
            candidates = real & (sizes[np.where(real, labels, 0)] > 1)
            labels[np.where(candidates, served, np.inf).argmin()] = empty
    return labels


def _per_layer(points: np.ndarray, real: np.ndarray, k: np.ndarray, seed: int) -> np.ndarray:
    """Reference: scikit-learn's K-Means, one layer after the other; membership as in :func:`_fused`."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    member = np.zeros((len(points), k.max(), points.shape[1]), bool)
    for layer in k.nonzero()[0]:
        rows = points[layer, real[layer]]
        with warnings.catch_warnings():
            # Equal experts: fewer distinct points than clusters, repaired below.
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = KMeans(k[layer], n_init=1, max_iter=MAX_ITERATIONS, random_state=seed).fit(rows)
        served = -np.square(rows - found.cluster_centers_[found.labels_]).sum(axis=1)
        labels = _fill_empty(found.labels_.astype(np.int64), served, np.ones(len(rows), bool), k[layer])
        member[layer, labels, np.arange(len(rows))] = True
    return member


def _in_order_of_appearance(member: np.ndarray) -> np.ndarray:
    """Labels ``[L, n]`` from membership ``[L, k, n]``, clusters numbered by their first expert."""
    num_layers, most, n = member.shape
    first = np.where(member.any(axis=2), member.argmax(axis=2), n)
    rank = np.empty((num_layers, most), np.float32)
    np.put_along_axis(rank, first.argsort(axis=1), np.arange(most, dtype=np.float32)[None], axis=1)
    return (rank[:, None] @ member.astype(np.float32))[:, 0].astype(np.int64)
