"""What an expert is worth to a participant (eq. 3), and the exploitation share of a round."""

from __future__ import annotations

import torch
from torch import Tensor


def utility(squared_norms: Tensor, tokens: Tensor) -> Tensor:
    """Eq. 3: ``|D| * sqrt(mean_k ||g_k||^2)``.

    Args:
        squared_norms: ``[K, ...]`` squared gradient norm per mini-batch k (or per sample, the same for all experts),
            NaN = not measured. An unbiased estimate may be negative; the mean is cut at 0 before the root.
        tokens: ``[...]`` tokens routed to the expert, ``|D|``.

    Returns:
        ``[...]``, NaN where no batch measured the expert.

    Deviation: the paper prints a sum of gradients under the root, a vector; squared norms are what makes it
    Oort's statistical utility. With few batches or probes the root of an estimate lies below the root of its mean
    (Jensen): for one unguided probe by a factor of sqrt(2 / pi) = 0.80.
    """
    if squared_norms.shape[1:] != tokens.shape:
        raise ValueError(f"squared_norms must be [K, {tuple(tokens.shape)}], got {tuple(squared_norms.shape)}")
    return tokens * squared_norms.nanmean(dim=0).clamp(min=0).sqrt()


def first_utilities(frequency: Tensor) -> Tensor:
    """``f / max f`` per participant, ``[P, L, E]`` (or ``[L, E]``) in 0..1; ValueError: not finite, or negative."""
    flat = frequency.reshape(-1, frequency.shape[-2] * frequency.shape[-1])
    bad = ~(torch.isfinite(flat) & (flat >= 0)).all(dim=1)
    if bad.any():
        raise ValueError(f"frequency must be finite and >= 0, participants {bad.nonzero().flatten().tolist()} are not")
    top = flat.amax(dim=1, keepdim=True)
    return (flat / top.clamp(min=torch.finfo(flat.dtype).tiny)).reshape(frequency.shape)


def epsilon_schedule(round_index: int, num_rounds: int, kind: str | float = "dynamic") -> float:
    """Exploitation share of round ``round_index`` (0-based).

    Args:
        kind: ``dynamic``: 0.3 to 0.8, linear over the first third; ``paper``: ``min(0.8, 0.3 + t / num_rounds)``, the
            form that the paper gives; a number in 0..1: fixed.

    Paper: epsilon is the EXPLOITATION share and rises; its constants are not given (0.3 and 0.7 are compared).
    Deviation: ``dynamic`` is at its end after a third of the rounds.
    """
    if isinstance(kind, int | float) and 0 <= kind <= 1:
        return float(kind)
    if kind == "dynamic":
        return 0.3 + 0.5 * min(1.0, round_index / max(num_rounds / 3, 1))
    if kind == "paper":
        return min(0.8, 0.3 + round_index / max(num_rounds, 1))
    raise ValueError(f"epsilon must be 'dynamic', 'paper' or a number in 0..1, got {kind!r}")
