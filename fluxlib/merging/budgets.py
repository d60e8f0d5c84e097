"""How many merged experts each layer may hold (eq. 1, section 5.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MIN_VARIANCE = 1e-8
"""A perfectly even layer has variance 0, which eq. 1 would divide by."""


def layer_budgets(
    frequency: Tensor, num_tuned: Sequence[int] | Tensor, num_merged: int, kind: str = "adaptive"
) -> list[int]:
    """Slots for merged experts, per layer: all are spent, and a layer with experts to merge gets one to one for each.

    Args:
        frequency: ``[L, E]`` activation frequencies; rows are normalised here.
        num_tuned: ``[L]`` experts of each layer that are not merged.
        num_merged: ``B_non``, slots of all layers together.
        kind: ``adaptive`` (eq. 1: early layers and evenly used layers get more), ``uniform`` or ``single`` (one slot
            per layer, whatever ``num_merged``).

    Raises:
        ValueError: fewer slots than layers with an expert to merge; frequencies that are negative or not
            finite; an unknown ``kind``.

    Paper: ``b_l = (L - l + 1) / v_l``, share ``floor(b_l / sum(b) * B_non)``. Deviation: minimum, maximum and
    largest remainders; v is the population variance over all experts of the layer, at least 1e-8.
    """
    shares = layer_shares(frequency, kind)
    available = frequency.shape[1] - torch.as_tensor(num_tuned).cpu().numpy().astype(np.int64)
    if len(available) != len(shares) or (available < 0).any() or (available > frequency.shape[1]).any():
        allowed = f"{len(shares)} counts in 0..{frequency.shape[1]}"
        raise ValueError(f"num_tuned must be {allowed}, got {list(num_tuned)}")
    if kind == "single":
        return np.minimum(available, 1).tolist()
    return spread(shares, available, num_merged)


def layer_shares(frequency: Tensor, kind: str) -> np.ndarray:
    """``[L]`` share of the slots each layer is entitled to before rounding; they add up to 1."""
    rows = frequency.detach().cpu().double().numpy()
    if not np.isfinite(rows).all() or (rows < 0).any():
        bad = sorted(set(np.nonzero(~np.isfinite(rows) | (rows < 0))[0].tolist()))
        raise ValueError(f"frequency must be finite and >= 0, layers {bad} are not")
    num_layers = len(rows)
    if kind in ("uniform", "single"):
        return np.full(num_layers, 1 / num_layers)
    if kind != "adaptive":
        raise ValueError(f"kind must be 'adaptive', 'uniform' or 'single', got {kind!r}")
    rows = rows / np.maximum(rows.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    weight = np.arange(num_layers, 0, -1) / np.maximum(rows.var(axis=1), MIN_VARIANCE)
    return weight / weight.sum()


def spread(shares: np.ndarray, available: np.ndarray, num_merged: int) -> list[int]:
    """Whole slots in proportion to ``shares [L]``, at least 1 and at most ``available [L]``."""
    check_enough(available, num_merged)
    total = min(num_merged, int(available.sum()))
    ideal = _fill(shares, np.minimum(available, 1), available, total)
    slots = np.floor(ideal + 1e-9).astype(int)
    by_remainder = np.argsort(-(ideal - slots), kind="stable")
    while slots.sum() < total:
        for layer in by_remainder:
            if slots[layer] < available[layer] and slots.sum() < total:
                slots[layer] += 1
    return slots.tolist()


def check_enough(available: np.ndarray, num_merged: int) -> None:
    """ValueError unless every layer with experts to merge can have a slot; ``available [L]`` counts those experts."""
    least = int((available > 0).sum())
    if num_merged < least or num_merged % 1:
        raise ValueError(
            f"num_merged must be a whole number of at least {least}, one slot for each layer with experts to merge, "
            f"got {num_merged}"
        )


def _fill(shares: np.ndarray, least: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """``clip(scale * shares, least, most)`` for the scale at which it adds up to ``total``."""
    low, high = 0.0, float(most.sum() + 1) / max(float(shares[shares > 0].min()), np.finfo(float).tiny)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * shares, least, most).sum() < total else (low, middle)
    return np.clip(low * shares, least, most)
