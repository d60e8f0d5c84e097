"""Gradient norms of experts from forward passes alone (section 6 of the paper).

The directional derivative ``p = (L(W + sigma z) - L(W - sigma z)) / 2 sigma`` of a random direction z with
``E[z z'] = I`` has ``E[p^2] = |g|^2``: the square of one number estimates the squared norm of millions, in
the same unit as backpropagation. (The norm of a rebuilt gradient ``p z`` would be too large by the root of the number
of parameters.) Deviation: the paper prints one side, ``L(W + sigma z) - L(W)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fluxlib import seeding
from fluxlib.gradients.local import ExpertCall, by_layer, calls, combined, dot
from fluxlib.gradients.patching import CachedForward, quiet, scored_tokens
from fluxlib.moe import find
from fluxlib.moe.expert import Matrices
from fluxlib.moe.find import ExpertKey, MoELayer

SIGMA = 1e-3


def probe_norms(
    model: nn.Module,
    batch: dict[str, Tensor],
    experts: Sequence[ExpertKey],
    num_probes: int = 1,
    seed: int = 0,
    *,
    guided: bool = True,
    sides: int = 2,
    sigma: float = SIGMA,
) -> Tensor:
    """Estimated squared gradient norm of each expert, without backpropagation; no weight is ever written.

    Args:
        model: original or customised; an expert must not be merged with others.
        batch: ``input_ids``, ``attention_mask``, ``labels``, each ``[B, T]``.
        num_probes: random directions per expert.
        seed: directions are drawn from it, the layer, the expert and the number of the probe.
        guided: leave less to chance by a guess of the gradient, the one that comes straight down the residual stream
            from the head. Deviation: the paper's are plain random directions.
        sides: 2, or 1 as the paper prints it: ``(L(W + sigma z) - L(W)) / sigma``.
        sigma: length of a step in each weight. 1e-3 suits float32; a 16-bit model rounds such a step away.

    Returns:
        ``[len(experts)]`` float32 on the CPU, unbiased up to sigma^2 (one-sided: sigma); 0 where no token goes.

    Raises:
        ValueError: an unknown or merged expert, a batch without a scored token, or sides other than 1 or 2.
    """
    if sides not in (1, 2) or num_probes < 1:
        raise ValueError(f"sides must be 1 or 2 and num_probes at least 1, got {sides} and {num_probes}")
    norms = torch.zeros(len(experts))
    groups = by_layer(model, experts)
    if not groups:
        return norms
    steps = (sigma, -sigma)[:sides]
    with quiet(model), torch.no_grad():
        cached = CachedForward(model, batch, [layer for layer, _ in groups])
        stream = cached.stream_gradient() if guided else None
        for layer, places in groups:
            for expert, call in calls(layer, cached.arguments[layer.index], list(places), cached.mask).items():
                guess = None if stream is None else call.gradients(stream)
                found = []
                for number in range(num_probes):
                    chance = seeding.generator(seed, layer.index, expert, number)
                    direction = draw(call.learned, chance)
                    if guess is not None:
                        direction = _guided(direction, guess, chance)
                    found.append(_slope(cached, layer, call, direction, steps).square())
                norms[places[expert]] = torch.stack(found).mean().float().cpu()
    return norms


def probe_cost(model: nn.Module, experts: Sequence[ExpertKey], num_probes: int = 1, sides: int = 2) -> float:
    """Forward passes of the whole model and batch that :func:`probe_norms` is worth, at most.

    One pass to begin with, then the layers above the expert's, for the samples that reach it.
    """
    above = 0.0
    for layer, places in by_layer(model, experts):
        stack, place = find.decoder_layers(model, layer)
        above += (1 - (place + 1) / len(stack)) * sum(map(len, places.values()))
    return 1 + sides * num_probes * above if experts else 0.0


def _slope(
    cached: CachedForward, layer: MoELayer, call: ExpertCall, direction: Matrices, steps: Sequence[float]
) -> Tensor:
    """Directional derivative of the batch's loss, from the samples that reach the expert; both sides in one pass."""
    counts = scored_tokens(cached.labels)
    hit = torch.zeros(len(counts), dtype=torch.bool, device=call.rows.device)
    hit[call.samples] = True
    samples = (hit & (counts > 0).to(hit.device)).nonzero().flatten()
    if not len(samples):
        return torch.zeros(())
    base = call.output()
    outputs = [_moved(cached, layer, call, samples, call.output(direction, step) - base) for step in steps]
    losses = cached.losses(layer, samples.repeat(len(steps)), torch.cat(outputs, dim=-3))
    ahead, *back = losses.view(len(steps), -1)
    slopes = (ahead - (back[0] if back else cached.base[samples])) / (steps[0] * len(steps))
    return slopes.sum() / counts.sum()


def _moved(cached: CachedForward, layer: MoELayer, call: ExpertCall, samples: Tensor, moved: Tensor) -> Tensor:
    """The layer's output for the samples ``[..., R, T, H]``, changed where the expert's tokens are."""
    batch, length = cached.labels.shape
    base = cached.output_of(layer, samples)
    place = torch.zeros(batch, dtype=torch.long, device=samples.device)
    place[samples] = torch.arange(len(samples), device=samples.device)
    keep = torch.isin(call.samples, samples)
    stack, token = call.rows[keep] // (batch * length), call.rows[keep] % length
    rows = (stack * len(samples) + place[call.samples[keep]]) * length + token
    return base.flatten(0, -2).index_add(0, rows, moved[keep].to(base.dtype)).view_as(base)


def _guided(direction: Matrices, guess: Matrices, generator: torch.Generator) -> Matrices:
    """With u the guess at unit length, ``z' = z - (z u) u +- u`` still has ``E[z' z'] = I``, so ``p^2`` stays unbiased.

    But the part of the gradient along u now enters p with a fixed magnitude instead of a random one: the better the
    guess, the less is left to chance, and nothing at all in the last layer.
    """
    length = dot(guess, guess).sqrt()
    if not length > 0:
        return direction
    sign = float(torch.randint(0, 2, (1,), generator=generator) * 2 - 1)
    shift = (sign - dot(direction, guess) / length) / length
    return combined(lambda z, u: z + shift * u, direction, guess)


def draw(like: Matrices, generator: torch.Generator) -> Matrices:
    """A standard normal direction; drawn on the CPU, so that devices agree."""
    return combined(lambda weight: torch.randn(weight.shape, generator=generator).to(weight), like)
