"""Gradient norms of experts from forward passes alone (section 6 of the paper).

The directional derivative ``p = (L(W + sigma z) - L(W - sigma z)) / 2 sigma`` of a random direction z with
``E[z z'] = I`` has ``E[p^2] = |g|^2``: the square of one number estimates the squared norm of millions, in
the same unit as backpropagation. (The norm of a rebuilt gradient ``p z`` would be too large by the root of
the number of parameters.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fluxlib import seeding
from fluxlib.gradients import expert as local
from fluxlib.gradients.exact import ExpertKey, by_layer, reached
from fluxlib.gradients.replay import Replay, quiet, scored_tokens
from fluxlib.moe import layers
from fluxlib.moe.kernels import Matrices

SIGMA = 1e-3


def probe_norms(
    model: nn.Module,
    batch: dict[str, Tensor],
    experts: Sequence[ExpertKey],
    num_probes: int = 1,
    seed: int = 0,
    *,
    unit: str = "batch",
    guided: bool = True,
    sides: int = 2,
    sigma: float = SIGMA,
) -> Tensor:
    """Estimated squared gradient norm of each expert, without backpropagation; no weight is ever written.

    Args:
        model: original or customised; an expert must not be merged with others.
        batch: ``input_ids``, ``attention_mask``, ``labels``, each ``[B, T]``.
        experts: ``(layer, expert)`` pairs.
        num_probes: random directions per expert.
        seed: directions are drawn from it, the layer, the expert and the number of the probe.
        unit: see :func:`fluxlib.gradients.true_norms`.
        guided: take the part of the gradient that comes straight down the residual stream out of the chance
            (see :func:`_guide`).
        sides: 2, or 1 as the paper prints it: ``(L(W + sigma z) - L(W)) / sigma``.
        sigma: length of a step in each weight. 1e-3 suits float32; a 16-bit model rounds such a step away and
            needs more.

    Returns:
        ``[len(experts)]`` float32 on the CPU, unbiased up to sigma^2 (one-sided: sigma); 0 where no token
        goes.

    Raises:
        ValueError: an unknown or merged expert, a batch without a scored token, or sides other than 1 or 2.
    """
    if sides not in (1, 2) or num_probes < 1:
        raise ValueError(f"sides must be 1 or 2 and num_probes at least 1, got {sides} and {num_probes}")
    if unit not in ("batch", "sample"):
        raise ValueError(f"unit must be 'batch' or 'sample', got {unit!r}")
    norms = torch.zeros(len(experts))
    groups = by_layer(model, experts)
    if not groups:
        return norms
    with quiet(model), torch.no_grad():
        replay = Replay(model, batch, [layer for layer, _ in groups])
        stream = replay.stream_gradient() if guided else None
        for layer, places in groups:
            calls = local.of(layer, replay.arguments[layer.index], list(places), replay.mask)
            for expert, call in calls.items():
                if len(call.rows):
                    probe = _Probe(replay, layer, call, sides, sigma)
                    squares = [
                        _square(probe, stream, unit, seeding.generator(seed, layer.index, expert, number))
                        for number in range(num_probes)
                    ]
                    norms[places[expert]] = torch.stack(squares).mean().float().cpu()
    return norms


class _Probe:
    """Directional derivatives of the samples' losses with respect to one expert's weights."""

    def __init__(
        self, replay: Replay, layer: layers.MoELayer, call: local.ExpertCall, sides: int, sigma: float
    ) -> None:
        self.replay, self.layer, self.call, self.sides, self.sigma = replay, layer, call, sides, sigma
        self.base = call.output()

    def derivatives(self, change: local.Change) -> Tensor:
        """``[B]`` float64 derivative of each sample's summed token losses along the change."""
        ahead = self._losses(change, self.sigma)
        if self.sides == 2:
            return (ahead - self._losses(change, -self.sigma)) / (2 * self.sigma)
        return (ahead - self._losses(change, 0.0)) / self.sigma

    def _losses(self, change: local.Change, size: float) -> Tensor:
        output = self.replay.outputs[self.layer.index]
        moved = (self.call.output(change, size) - self.base).to(output.dtype)
        return self.replay.losses(self.layer, output.index_add(0, self.call.rows, moved))


def _square(probe: _Probe, stream: Tensor | None, unit: str, generator: torch.Generator) -> Tensor:
    """One unbiased estimate of the squared norm."""
    labels, call = probe.replay.labels, probe.call
    counts = scored_tokens(labels).to(call.rows.device)
    direction = draw(call.matrices, generator)
    if unit == "sample":
        change = local.Change(direction, draw_signs(call.matrices, len(labels), generator))
        hit = reached(call, labels)
        slopes = probe.derivatives(change)[hit] / counts[hit]
        return slopes.square().mean() if len(slopes) else slopes.sum()
    if stream is not None:
        direction = _guide(direction, call.gradients(stream), generator)
    return (probe.derivatives(local.Change(direction)).sum() / counts.sum()).square()


def draw(like: Matrices, generator: torch.Generator) -> Matrices:
    """A standard normal direction; drawn on the CPU, so that devices agree."""

    def normal(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else torch.randn(weight.shape, generator=generator).to(weight)

    up, down = normal(like.up), normal(like.down)
    assert up is not None and down is not None
    return Matrices(up, down, normal(like.up_bias), normal(like.down_bias))


def draw_signs(like: Matrices, num_samples: int, generator: torch.Generator) -> local.Signs:
    """Signs per sample for inputs and outputs of both matrices; see :class:`fluxlib.gradients.expert.Change`."""

    def signs(size: int) -> Tensor:
        return (torch.randint(0, 2, (num_samples, size), generator=generator) * 2 - 1).to(like.up)

    (inputs, projected), (act, outputs) = like.up.shape, like.down.shape
    return signs(inputs), signs(projected), signs(act), signs(outputs)


def _guide(direction: Matrices, guess: Matrices, generator: torch.Generator) -> Matrices:
    """The direction with its part along a guessed gradient replaced by a step of length one, at a random sign.

    With u the guess at unit length, ``z' = z - (z u) u +- u`` still has ``E[z' z'] = I``, so ``p^2`` stays
    unbiased whatever the guess. But the part of the gradient along u now enters p with a fixed magnitude
    instead of a random one: the better the guess, the less is left to chance, and nothing at all in the last
    layer.
    """
    length = local.dot(guess, guess).sqrt()
    if not length > 0:
        return direction
    sign = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
    shift = (sign - local.dot(direction, guess) / length) / length
    biases = [
        None if z is None or u is None else z + shift * u
        for z, u in ((direction.up_bias, guess.up_bias), (direction.down_bias, guess.down_bias))
    ]
    return Matrices(direction.up + shift * guess.up, direction.down + shift * guess.down, *biases)
