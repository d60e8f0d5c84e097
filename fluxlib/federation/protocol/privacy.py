"""Clipping and noise on what participants send; what they cover, and who needs them, is in ``docs/security.md``.

The unit of protection is one participant's whole change in one round: all tensors of all experts it tuned, as one
vector. :func:`clip` bounds its norm; noise of ``noise_multiplier`` times that bound on every coordinate hides it, added
by the server to the sum (central) or by the participant to its own change (local). Which experts a participant was to
tune is the server's own choice and is not hidden by either. With noise every tuner of an expert counts alike, since a
weight by tokens has no bounded influence.

:func:`protect` is the participant's side, :class:`Guard` the server's, with a bound that may follow a quantile of the
norms (Andrew et al. 2021). Flower's mods do the same for whole models; they refuse a reply with some experts only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fluxlib import seeding
from fluxlib.config import RunConfig
from fluxlib.federation.protocol.wire import Experts
from fluxlib.methods.base import ExpertKey, Update

Changes = dict[ExpertKey, dict[str, Tensor]]

MOST_EPSILON = 50.0
"""Above it an epsilon promises nothing that anybody could use."""

ADAPT_RATE = 0.2
"""How fast an adaptive bound follows: the learning rate of Andrew et al."""


def norm(changes: Experts) -> float:
    """Euclidean norm of a whole change."""
    tensors = [tensor.float() for change in changes.values() for tensor in change.values()]
    return float(torch.stack(torch._foreach_norm(tensors)).norm()) if tensors else 0.0


@torch.no_grad()
def clip(changes: Experts, bound: float) -> tuple[Changes, bool]:
    """``changes`` scaled to a norm of at most ``bound``, and whether they were within it already."""
    found = norm(changes)
    scale = 1.0 if found <= bound else bound / found
    scaled = {key: {n: t if scale == 1.0 else t * scale for n, t in change.items()} for key, change in changes.items()}
    return scaled, found <= bound


@torch.no_grad()
def add_noise(changes: Experts, deviation: float, generator: torch.Generator) -> Changes:
    """``changes`` with independent Gaussian noise of that standard deviation on every coordinate."""
    return {
        key: {
            name: t + deviation * torch.randn(t.shape, generator=generator).to(t.device) for name, t in change.items()
        }
        for key, change in sorted(changes.items())
    }


def protect(update: Update, config: RunConfig, bound: float | None, generator: torch.Generator) -> tuple[Update, bool]:
    """What a participant sends of ``update`` under the run's options, and whether its norm was within ``bound``."""
    chosen, within = config.privacy, True
    if bound is not None:
        changes, within = clip(update.changes, bound)
        if chosen.noise == "participant" and chosen.noise_multiplier:
            changes = add_noise(changes, chosen.noise_multiplier * bound, generator)
        update = replace(update, changes=changes)
    if chosen.withhold_reports:
        unknown = torch.full_like(update.utilities, math.nan)
        update = replace(update, utilities=unknown, tokens=torch.zeros_like(update.tokens))
    return update, within


def noise_generator(config: RunConfig, *names: str | int) -> torch.Generator:
    """Where noise comes from: the run's seed, so that runs repeat, or in a deployment what nobody else knows."""
    if config.engine == "deployment":
        secret = torch.Generator()
        secret.seed()
        return secret
    return seeding.generator(config.seed, *names)


class Guard:
    """The server's side: no change above the bound gets in, noise gets out, and an adaptive bound moves.

    ``bound`` is that of this round; None: there is none.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.bound = config.privacy.clip_norm
        self._num_within = 0

    def admit(self, changes: Experts, tokens: Tensor, within: bool | None) -> tuple[Experts, Tensor]:
        """A reply's changes and weights as they may be aggregated: a participant may have clipped nothing."""
        if self.bound is None:
            return changes, tokens
        self._num_within += bool(within)
        weights = torch.ones_like(tokens) if self.config.privacy.noise_multiplier else tokens
        return clip(changes, self.bound)[0], weights

    def finish(
        self, round_number: int, changes: Changes, num_tuners: Callable[[ExpertKey], int], num_replies: int
    ) -> Changes:
        """The round's combined changes, with central noise on them; the bound moves on."""
        if self.bound is None:
            return changes
        chosen = self.config.privacy
        if chosen.noise == "server" and chosen.noise_multiplier:
            chance, noisy = noise_generator(self.config, "noise", round_number), Changes()
            for key, tensors in sorted(changes.items()):
                deviation = self.bound * chosen.noise_multiplier / num_tuners(key)
                noisy |= add_noise({key: tensors}, deviation, chance)
            changes = noisy
        if chosen.clip_quantile is not None and num_replies:
            self.bound = moved_bound(self.bound, self._num_within / num_replies, chosen.clip_quantile)
        self._num_within = 0
        return changes


def moved_bound(bound: float, share_within: float, quantile: float) -> float:
    """An adaptive bound for the next round: lower where more than ``quantile`` of the changes were within it."""
    return bound * math.exp(-ADAPT_RATE * (share_within - quantile))


def spent_epsilon(noise_multiplier: float, rounds: int, delta: float = 1e-5) -> float:
    """Epsilon of (epsilon, delta)-differential privacy after ``rounds`` Gaussian mechanisms; infinite without noise.

    Rényi differential privacy, composed over rounds (Mironov 2017, proposition 3 and corollary 3). Nothing is taken off
    for the sampling of participants.
    """
    if not noise_multiplier:
        return math.inf
    cost = rounds / (2 * noise_multiplier**2)
    return cost + 2 * math.sqrt(cost * math.log(1 / delta))


def weakness(config: RunConfig) -> str:
    """What options that a run has switched on do not protect from, as measured (``docs/security.md``); or nothing."""
    chosen, rounds, found = config.privacy, config.federation.rounds, []
    epsilon = spent_epsilon(chosen.noise_multiplier, rounds)
    if chosen.noise_multiplier and epsilon > MOST_EPSILON:
        noise = f"privacy.noise_multiplier {chosen.noise_multiplier:g}"
        found.append(f"{noise} is epsilon {epsilon:.2g} after {rounds} rounds, which hides nothing")
    if chosen.withhold_reports and (epsilon > MOST_EPSILON or chosen.noise == "server"):
        found.append("privacy.withhold_reports leaves the changes, which tell a server most of what the reports do")
    return "; ".join([*found, "see docs/security.md"]) if found else ""
