"""Gradient norms of experts from forward passes alone (section 6 of the paper).

The directional derivative ``p = (L(W + sigma z) - L(W - sigma z)) / 2 sigma`` of a random direction z with
``E[z z'] = I`` has ``E[p^2] = |g|^2``: the square of one number estimates the squared norm of millions, in
the same unit as backpropagation. (The norm of a rebuilt gradient ``p z`` would be too large by the root of
the number of parameters.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fluxlib import seeding
from fluxlib.gradients import expert as local
from fluxlib.gradients.answering import quiet
from fluxlib.gradients.exact import ExpertKey, by_layer, reached
from fluxlib.gradients.replay import Replay, depth, scored_tokens
from fluxlib.moe import find
from fluxlib.moe.expert import Matrices

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
    max_tokens: int = 4096,
) -> Tensor:
    """Estimated squared gradient norm of each expert, without backpropagation; no weight is ever written.

    Args:
        model: original or customised; an expert must not be merged with others.
        batch: ``input_ids``, ``attention_mask``, ``labels``, each ``[B, T]``.
        experts: ``(layer, expert)`` pairs.
        num_probes: random directions per expert.
        seed: directions are drawn from it, the layer, the expert and the number of the probe.
        unit: see :func:`fluxlib.gradients.true_norms`.
        guided: leave less to chance by a guess of the gradient: the one that comes straight down the residual stream
            from the head, which costs one product with it. False: plain random directions.
        sides: 2, or 1 as the paper prints it: ``(L(W + sigma z) - L(W)) / sigma``.
        sigma: length of a step in each weight. 1e-3 suits float32; a 16-bit model rounds such a step away and
            needs more.
        max_tokens: rows of a pass are as many samples of as many probes as this allows, at least one probe.

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
            pack = _Pack(replay, layer, sides, sigma, unit, max_tokens)
            for expert, call in local.of(layer, replay.arguments[layer.index], list(places), replay.mask).items():
                for number in range(num_probes):
                    chance = seeding.generator(seed, layer.index, expert, number)
                    pack.add(expert, call, _change(call, stream, unit, len(replay.labels), chance))
            for expert, squares in pack.finish().items():
                norms[places[expert]] = torch.stack(squares).mean().float().cpu()
    return norms


def probe_cost(model: nn.Module, experts: Sequence[ExpertKey], num_probes: int = 1, sides: int = 2) -> float:
    """Forward passes of the whole model and batch that :func:`probe_norms` is worth, at most.

    One pass to begin with, then the layers above the expert's, for the samples that reach it.
    """
    above = sum(
        (1 - depth(model, layer)) * sum(map(len, places.values())) for layer, places in by_layer(model, experts)
    )
    return 1 + sides * num_probes * above if experts else 0.0


class _Pack:
    """Probes of one layer's experts, run several at a time.

    A probe changes one expert, and only in the samples that reach it, so it needs no other sample; and a sample's loss
    depends on that sample alone. So samples of different probes, and of both sides of one, are rows of one pass, each
    under its own change: as exact, and as unbiased, as one pass each.
    """

    def __init__(
        self, replay: Replay, layer: find.MoELayer, sides: int, sigma: float, unit: str, max_tokens: int
    ) -> None:
        self.replay, self.layer, self.unit, self.sigma = replay, layer, unit, sigma
        self.steps = (sigma, -sigma)[:sides]
        self.max_rows = max(1, max_tokens // replay.labels.shape[1])
        self.counts = scored_tokens(replay.labels)
        self.waiting: list[tuple[int, Tensor, Tensor]] = []
        self.squares: dict[int, list[Tensor]] = {}

    def add(self, expert: int, call: local.ExpertCall, change: local.Change) -> None:
        """Queue one probe; runs what is queued once a pass is full."""
        samples = reached(call, self.replay.labels).nonzero().flatten()
        if len(samples):
            base = call.output()
            outputs = [self._moved(call, samples, call.output(change, step) - base) for step in self.steps]
            self.waiting.append((expert, samples, torch.cat(outputs, dim=-3)))
            if sum(len(self.steps) * len(rows) for _, rows, _ in self.waiting) >= self.max_rows:
                self._run()

    def finish(self) -> dict[int, list[Tensor]]:
        """The estimates of all probes, by expert."""
        self._run()
        return self.squares

    def _moved(self, call: local.ExpertCall, samples: Tensor, moved: Tensor) -> Tensor:
        """The layer's output for the samples ``[..., R, T, H]``, changed where the expert's tokens are."""
        batch, length = self.replay.labels.shape
        base = self.replay.output_of(self.layer, samples)
        place = torch.zeros(batch, dtype=torch.long, device=samples.device)
        place[samples] = torch.arange(len(samples), device=samples.device)
        keep = torch.isin(call.samples, samples)
        stack, token = call.rows[keep] // (batch * length), call.rows[keep] % length
        rows = (stack * len(samples) + place[call.samples[keep]]) * length + token
        return base.flatten(0, -2).index_add(0, rows, moved[keep].to(base.dtype)).view_as(base)

    def _run(self) -> None:
        if not self.waiting:
            return
        samples = torch.cat([rows.repeat(len(self.steps)) for _, rows, _ in self.waiting])
        losses = self.replay.losses(self.layer, samples, torch.cat([output for *_, output in self.waiting], dim=-3))
        sizes = [len(self.steps) * len(rows) for _, rows, _ in self.waiting]
        for (expert, rows, _), found in zip(self.waiting, losses.split(sizes), strict=True):
            ahead, *back = found.view(len(self.steps), -1)
            slopes = (ahead - (back[0] if back else self.replay.base[rows])) / (self.sigma * len(self.steps))
            self.squares.setdefault(expert, []).append(self._square(slopes, rows))
        self.waiting = []

    def _square(self, slopes: Tensor, samples: Tensor) -> Tensor:
        """Squared directional derivative from those of the samples' summed losses."""
        if self.unit == "batch":
            return (slopes.sum() / self.counts.sum()).square()
        return (slopes / self.counts[samples]).square().mean()


def _change(
    call: local.ExpertCall, stream: Tensor | None, unit: str, num_samples: int, generator: torch.Generator
) -> local.Change:
    """A random direction, or one for each sample, guided by a guess of the gradient if there is one.

    With u the guess at unit length, ``z' = z - (z u) u +- u`` still has ``E[z' z'] = I``, so ``p^2`` stays unbiased
    whatever the guess. But the part of the gradient along u now enters p with a fixed magnitude instead of a random
    one: the better the guess, the less is left to chance, and nothing at all in the last layer.
    """
    direction = draw(call.matrices, generator)
    if unit == "batch":
        return local.Change(direction if stream is None else _guided(direction, call.gradients(stream), generator))
    change = local.Change(direction, draw_signs(call.matrices, num_samples, generator))
    if stream is None:
        return change
    factors, sign = call.factors(stream), _signs(generator, num_samples).to(call.states)
    length = call.sample_norms(stream, num_samples).sqrt()
    (states, projected), (act, result) = factors
    along = (change.up(states, call.samples) * projected).sum(dim=1)
    along = along + (change.down(act, call.samples) * result).sum(dim=1)
    along = local.per_sample(along, call.samples, num_samples) / length
    multiple = torch.where(length > 0, (sign - along) / length, 0)
    same = call.same_sample() * multiple[call.samples, None]
    return replace(change, shift=local.Shift(factors, same, call.layout.has_bias))


def _guided(direction: Matrices, guess: Matrices, generator: torch.Generator) -> Matrices:
    """See :func:`_change`."""
    length = local.dot(guess, guess).sqrt()
    if not length > 0:
        return direction
    shift = (_signs(generator, 1).item() - local.dot(direction, guess) / length) / length
    biases = [
        None if z is None or u is None else z + shift * u
        for z, u in ((direction.up_bias, guess.up_bias), (direction.down_bias, guess.down_bias))
    ]
    return Matrices(direction.up + shift * guess.up, direction.down + shift * guess.down, *biases)


def draw(like: Matrices, generator: torch.Generator) -> Matrices:
    """A standard normal direction; drawn on the CPU, so that devices agree."""

    def normal(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else torch.randn(weight.shape, generator=generator).to(weight)

    up, down = normal(like.up), normal(like.down)
    assert up is not None and down is not None
    return Matrices(up, down, normal(like.up_bias), normal(like.down_bias))


def draw_signs(like: Matrices, num_samples: int, generator: torch.Generator) -> local.Signs:
    """Signs per sample for inputs and outputs of both matrices; see :class:`fluxlib.gradients.expert.Change`."""
    sizes = (*like.up.shape, *like.down.shape)
    inputs, projected, act, outputs = (_signs(generator, num_samples, size).to(like.up) for size in sizes)
    return inputs, projected, act, outputs


def _signs(generator: torch.Generator, *shape: int) -> Tensor:
    return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).float()
