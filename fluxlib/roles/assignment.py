"""Eq. 4: the experts of highest utility within every participant's budget, exactly, for all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """Roles of one round: ``exploit`` is tuned and uploaded, ``explore`` only refreshes its utility.

    Both are bool ``[P, L, E]`` and disjoint; together they fill each participant's budget.
    """

    exploit: Tensor
    explore: Tensor


def assign(
    utilities: Tensor,
    budgets: Tensor | Sequence[int],
    epsilon: float,
    generator: torch.Generator,
    *,
    ages: Tensor | None = None,
    overdue: Tensor | None = None,
    max_tuners: int | None = None,
) -> Assignment:
    """Eq. 4: per participant the ``round(epsilon * B)`` experts of highest utility, the rest of B to explore.

    The problem is separable, so top-B is its exact solution; equal utilities go to the lower index. Explored
    experts are drawn uniformly from ALL experts outside the exploited ones.

    Args:
        utilities: ``[P, L, E]``, finite.
        budgets: ``[P]``, ``B_tune`` of each participant, 0..L*E.
        epsilon: exploitation share, 0..1. A participant with a budget exploits at least one expert if epsilon
            > 0.
        generator: draws the explored experts, on the CPU.
        ages: ``[P, L, E]`` rounds since the last measurement. Given, exploration rotates: oldest first, ties
            at random.
        overdue: bool ``[L, E]``; each such expert is exploited by someone as far as budgets reach (coverage):
            the participant to whom it is worth most gives up for it its least useful expert that can be spared, one
            that is not overdue itself, or that others tune too.
        max_tuners: at most so many participants exploit the same expert (load balance), by deferred
            acceptance.

    Raises:
        ValueError: naming the participant whose utilities or budget are not allowed.
    """
    values, counts, num_exploit = _checked(utilities, budgets, epsilon)
    exploit = _limited_top(values, num_exploit, max_tuners) if max_tuners else _top(values, num_exploit)
    if overdue is not None:
        exploit = _cover(values, exploit, overdue.reshape(-1).to(values.device))
    keys = torch.rand(values.shape, generator=generator, dtype=torch.float32).to(values.device)
    if ages is not None:
        keys = keys + ages.reshape(values.shape)
    explore = _top(keys.masked_fill(exploit, -math.inf), counts - exploit.sum(dim=1))
    return Assignment(exploit.view(utilities.shape), explore.view(utilities.shape))


def _checked(utilities: Tensor, budgets: Tensor | Sequence[int], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Flat utilities ``[P, L*E]``, budgets and numbers of exploited experts, both long ``[P]``."""
    if utilities.dim() != 3:
        raise ValueError(f"utilities must be [participants, layers, experts], got {tuple(utilities.shape)}")
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be in 0..1, got {epsilon}")
    values = utilities.reshape(utilities.shape[0], -1)
    counts = torch.as_tensor(budgets, device=values.device).long()
    if counts.shape != values.shape[:1]:
        raise ValueError(
            f"budgets must have one entry for each of {len(values)} participants, got {tuple(counts.shape)}"
        )
    for participant in ((counts < 0) | (counts > values.shape[1])).nonzero().flatten().tolist():
        allowed = f"0..{values.shape[1]} (all experts)"
        raise ValueError(f"budgets[{participant}] must be in {allowed}, got {int(counts[participant])}")
    bad = (~torch.isfinite(values)).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"utilities must be finite, those of participants {bad} are not (see roles.update)")
    rounded = (epsilon * counts.double() + 0.5).floor().long()
    at_least = (counts > 0).long() if epsilon > 0 else torch.zeros_like(counts)
    return values, counts, torch.maximum(rounded, at_least)


def _top(values: Tensor, counts: Tensor) -> Tensor:
    """Bool ``[P, N]``: the ``counts[p]`` largest of each row, the lower index first among equals."""
    most = int(counts.max()) if len(counts) else 0
    order = values.argsort(dim=1, descending=True, stable=True)[:, :most]
    chosen = torch.arange(most, device=values.device) < counts[:, None]
    return torch.zeros(values.shape, dtype=torch.bool, device=values.device).scatter_(1, order, chosen)


def _relative(values: Tensor) -> Tensor:
    """Utilities in units of the participant's mean, so that they compare between participants."""
    return values / values.mean(dim=1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)


def _limited_top(values: Tensor, counts: Tensor, max_tuners: int) -> Tensor:
    """Deferred acceptance: each proposes its best, an expert keeps its best ``max_tuners``, losers propose the next."""
    order, proposed = values.argsort(dim=1, descending=True, stable=True), _top(values, counts)
    relative, position, last = _relative(values), counts.clone(), values.shape[1] - 1
    while len(crowded := (proposed.sum(dim=0) > max_tuners).nonzero().flatten()):
        asking = proposed[:, crowded]
        offers = relative[:, crowded].masked_fill(~asking, -math.inf).T.contiguous()
        kept = _top(offers, torch.full((len(crowded),), max_tuners, device=values.device)).T
        proposed[:, crowded] = kept
        lost = (asking & ~kept).sum(dim=1)
        steps = torch.arange(int(lost.max()), device=values.device)
        places = position[:, None] + steps
        row, step = ((steps < lost[:, None]) & (places <= last)).nonzero(as_tuple=True)
        proposed[row, order[row, places[row, step]]] = True
        position += lost
    return proposed


def _cover(values: Tensor, exploit: Tensor, overdue: Tensor) -> Tensor:
    """Each overdue expert goes to who values it most and still exploits one that is not, or that others tune too."""
    exploit, relative = exploit.clone(), _relative(values)
    tuners = exploit.sum(dim=0)
    spare = exploit & (~overdue | (tuners > 1))
    room = spare.sum(dim=1)
    for expert in (overdue & (tuners == 0)).nonzero().flatten().tolist():
        if not (room > 0).any():
            break
        participant = int(relative[:, expert].masked_fill(room == 0, -math.inf).argmax())
        given_up = int(values[participant].masked_fill(~spare[participant], math.inf).argmin())
        exploit[participant, given_up], exploit[participant, expert] = False, True
        tuners[given_up] -= 1
        kept = exploit[:, given_up] & (~overdue[given_up] | (tuners[given_up] > 1))
        room -= spare[:, given_up].long() - kept.long()
        spare[:, given_up] = kept
    return exploit
