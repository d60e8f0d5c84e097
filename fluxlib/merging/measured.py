"""Where an error hurts, and budgets from it: one layer is merged at a time and the model's output is looked at.

Equation 1 guesses with a variance and a depth how much a slot is worth in each layer. :func:`error_curves` measures
it, :func:`budgets_by_error` spends the slots accordingly (beyond the paper). :func:`growth` shows how the error of one
layer travels (Fig. 3b and 8).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fluxlib.merging.error import output_error
from fluxlib.merging.plan import plan
from fluxlib.moe.compact import LayerPlan
from fluxlib.profiling import Profile


def one_layer(plans: Sequence[LayerPlan], layer: int) -> list[LayerPlan]:
    """The plans with every other layer left as it is."""
    kept = [LayerPlan(tuned=tuple(sorted(p.experts))) for p in plans]
    return [*kept[:layer], plans[layer], *kept[layer + 1 :]]


def growth(model: nn.Module, plans: Sequence[LayerPlan], batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """``[L, L]``: error of the hidden state after layer j when layer i alone is merged (row i; 0 before it)."""
    batches = list(batches)
    return torch.stack(
        [output_error(model, one_layer(plans, layer), batches, accumulated=True) for layer in range(len(plans))]
    )


def error_curves(
    model: nn.Module,
    profile: Profile,
    tuned: Tensor,
    batches: Iterable[dict[str, Tensor]],
    **options: Any,
) -> list[dict[int, float]]:
    """Squared error of the model's output by the slots of one layer, all other layers left as they are.

    One forward pass per layer and per number of slots that is tried: 1, 2, 4, ... and as many as there are experts to
    merge, which costs no error.

    Args:
        tuned: bool ``[L, E]``, experts that are not merged.
        options: of :func:`fluxlib.merging.plan`: weights, align, grams ...

    Returns:
        Per layer, slots to squared relative error; empty where there is nothing to merge.
    """
    batches, (num_layers, num_experts) = list(batches), tuned.shape
    available = num_experts - tuned.sum(dim=1)
    curves: list[dict[int, float]] = [{int(n): 0.0} if n else {} for n in available]
    slots = 1
    while slots < int(available.max()):
        budgets = available.clamp(max=slots).tolist()
        plans = plan(model, profile, tuned, int(sum(budgets)), budgets=budgets, **options)
        for layer in range(num_layers):
            if slots < available[layer]:
                error = output_error(model, one_layer(plans, layer), batches, accumulated=True)[-1]
                curves[layer][slots] = float(error) ** 2
        slots *= 2
    return curves


def budgets_by_error(curves: Sequence[dict[int, float]], num_merged: int) -> list[int]:
    """Slots per layer that make the sum of squared errors small.

    Each layer's curve is taken at its lower convex hull, and the next slot goes where it saves most.

    Args:
        curves: from :func:`error_curves`.
        num_merged: ``B_non``, slots of all layers together.

    Raises:
        ValueError: fewer slots than layers with experts to merge.
    """
    budgets = [1 if curve else 0 for curve in curves]
    if num_merged < sum(budgets):
        raise ValueError(
            f"num_merged must be at least {sum(budgets)}, one slot for each layer with experts to merge, "
            f"got {num_merged}"
        )
    savings = [_savings(curve) for curve in curves]
    waiting = [(-saved[0], layer) for layer, saved in enumerate(savings) if saved]
    heapq.heapify(waiting)
    for _ in range(num_merged - sum(budgets)):
        if not waiting:
            break
        _, layer = heapq.heappop(waiting)
        budgets[layer] += 1
        if budgets[layer] - 1 < len(savings[layer]):
            heapq.heappush(waiting, (-savings[layer][budgets[layer] - 1], layer))
    return budgets


def _savings(curve: dict[int, float]) -> list[float]:
    """What the second, third ... slot saves: steps of the lower convex hull, so never rising."""
    hull: list[tuple[int, float]] = []
    for point in sorted(curve.items()):
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    if len(hull) < 2:
        return []
    slots, errors = zip(*hull, strict=True)
    return (-np.diff(np.interp(np.arange(slots[0], slots[-1] + 1), slots, errors))).tolist()


def _slope(first: tuple[int, float], second: tuple[int, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])
