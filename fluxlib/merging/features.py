"""What experts are compared by (section 5.2) and how their neurons are matched before averaging.

An expert has millions of parameters and a layer a few dozen experts, so nothing is ever computed in the space
of parameters: principal components come from the n x n Gram matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fluxlib.moe import find

MAX_EXACT_NEURONS = 1024
"""Widest expert whose neurons are matched exactly (cubic time); wider ones are matched greedily."""

SLICE_VALUES = 1 << 22
"""Values that are converted to float32 at a time."""


def features(experts: Tensor, dim: int = 32) -> Tensor:
    """First principal components of a layer's experts ``[n, ...]``, at unit length.

    Returns:
        ``[n, dim]`` float32, each row of length 1 (or 0 if all experts are equal); components beyond n - 1 are 0.
    """
    return from_gram(_rows_gram(experts), dim)


def gram_of(experts: nn.Module) -> Tensor:
    """``[E, E]`` scalar products of a module's experts, each flattened: ``[gate, up, down]`` (and biases).

    The order in which parameters are flattened does not matter for them, so the stacks are used as they lie.
    """
    if isinstance(experts, find.ReplacedExperts):
        kind = type(experts).__name__
        raise ValueError(f"experts must be a model's own, got a {kind}; call fluxlib.moe.compact.restore first")
    stacks = [getattr(experts, name) for name in find.read_layout(experts).names]
    return torch.stack([_rows_gram(stack) for stack in stacks]).sum(dim=0)


def from_gram(gram: Tensor, dim: int = 32) -> Tensor:
    """Features ``[n, dim]`` from the experts' scalar products ``[n, n]``: centred, PCA, unit length."""
    if dim < 1:
        raise ValueError(f"dim is {dim}, allowed is at least 1")
    if len(gram) == 0:
        return torch.zeros(0, dim)
    centred = gram.double().cpu()
    centred = centred - centred.mean(dim=0, keepdim=True)
    centred = centred - centred.mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh((centred + centred.T) / 2)
    # Directions below rounding are noise of equal experts, not features.
    values = values.where(values > 1e-6 * values.amax().clamp(min=1e-30), 0)
    top = (vectors * values.sqrt()).flip(1)[:, :dim]
    top = torch.nn.functional.pad(top, (0, dim - top.shape[1]))
    return torch.nn.functional.normalize(top, dim=1).float()


def match_neurons(anchor: Mapping[str, Tensor], other: Mapping[str, Tensor], layout: find.Layout) -> Tensor:
    """Order ``[I]`` of the other expert's neurons in which they resemble the anchor's, the heaviest expert's, most.

    Maximises the sum of scalar products of matched neurons, which minimises the distance between the two experts:
    exactly up to :data:`MAX_EXACT_NEURONS` neurons (Hungarian assignment), else best pairs first.
    """
    first, second = (find.neurons(tensors, layout).float() for tensors in (anchor, other))
    similarity = (first @ second.T).cpu().numpy()
    if len(similarity) > MAX_EXACT_NEURONS:
        return torch.from_numpy(_greedy_match(similarity))
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(similarity, maximize=True)[1])


def _rows_gram(experts: Tensor) -> Tensor:
    """Scalar products of the rows, in float32, a slice of columns at a time: 16-bit stacks are never copied whole."""
    rows = experts.detach().flatten(1)
    total = rows.new_zeros(len(rows), len(rows), dtype=torch.float32)
    for columns in rows.split(max(1, SLICE_VALUES // max(len(rows), 1)), dim=1):
        wide = columns.float()
        total += wide @ wide.T
    return total


def _greedy_match(similarity: np.ndarray) -> np.ndarray:
    """Repeatedly pair all rows and columns that prefer each other among those left."""
    left = similarity.astype(np.float32, copy=True)
    order = np.full(len(left), -1)
    while (order < 0).any():
        best_column, best_row = left.argmax(axis=1), left.argmax(axis=0)
        rows = np.nonzero((order < 0) & (best_row[best_column] == np.arange(len(left))))[0]
        order[rows] = best_column[rows]
        left[rows] = -np.inf
        left[:, order[rows]] = -np.inf
    return order
