"""How good estimated squared norms are: error, bias and spread, and whether they put experts in the right order."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxlib.profiling import spearman


def quality(estimated: Tensor, true: Tensor, tokens: Tensor, floor: float = 3e-8) -> dict[str, float]:
    """Compare several estimates of the same squared norms ``|g|^2`` with the true ones.

    Args:
        estimated: ``[R, N]`` squared norms, R independent repeats (other directions) over N experts.
        true: ``[N]`` squared norms from backpropagation; experts with 0 are left out.
        tokens: ``[N]`` tokens routed to each expert: utility is ``tokens * sqrt(norm)``.
        floor: bias and spread leave out experts of a smaller true norm: a loss near 1 in 32 bit is rounded by 1e-7;
            over two steps of 1e-3 that is 5e-5, whose square is 2.5e-9 (one-sided: 1e-8). Below, a difference of losses
            shows rounding, and its ratio to the truth would outweigh all others. NaN if none is left.

    Returns:
        ``cosine_distance`` (``1 - cos``) between the vectors of utilities (eq. 3), what the paper puts at 0.29, and
        their ``rank_correlation`` (Spearman's). ``bias``: mean of estimate over truth, minus 1, with its standard
        error ``bias_error`` over the repeats, infinite for one. ``spread``: standard deviation of estimate over truth;
        one unguided probe has ``sqrt(2)``, for p is normal.

    Raises:
        ValueError: shapes that do not fit, or no expert with a gradient.
    """
    if estimated.dim() != 2 or true.shape != estimated.shape[1:] or tokens.shape != true.shape:
        shapes = f"{tuple(estimated.shape)}, {tuple(true.shape)} and {tuple(tokens.shape)}"
        raise ValueError(f"estimated, true and tokens must be [R, N], [N] and [N], got {shapes}")
    used = true > 0
    if not used.any():
        raise ValueError("true: no expert has a gradient")
    norms, truth, weight = (value[..., used].double() for value in (estimated, true, tokens))
    utilities, best = weight * norms.clamp(min=0).sqrt(), weight * truth.sqrt()
    seen = truth >= floor
    ratio = norms[:, seen] / truth[seen]
    means = ratio.mean(dim=1)
    cosine = torch.nn.functional.cosine_similarity(utilities, best[None], dim=1)
    return {
        "cosine_distance": float(1 - cosine.mean()),
        "rank_correlation": float(spearman(utilities, best[None]).mean()),
        "bias": float(ratio.mean() - 1),
        "bias_error": float(means.std() / len(means) ** 0.5) if len(means) > 1 else float("inf"),
        "spread": float((ratio - 1).square().mean().sqrt()),
    }
