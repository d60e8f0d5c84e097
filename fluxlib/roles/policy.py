"""By what a server chooses the experts to exploit: FLUX's rule, and what it has to beat.

All of them fill the same number of places in the same round and differ in :func:`priorities` only, so that what they
are compared by is which experts are tuned, not how many.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from fluxlib.config import AssignmentKind
from fluxlib.roles.state import RoleState, current_utilities, uncertainty_bonus

KINDS: tuple[str, ...] = get_args(AssignmentKind)

PROBES = ("flux", "proportional")
"""Kinds that look at explored experts: what the others choose by would not change, or not by their own rule."""


def num_probed(kind: AssignmentKind, num_explored: int, limit: int | None) -> int:
    """Of ``num_explored`` experts, those that a participant probes in a round: at most ``limit``, unless it is None."""
    if kind not in PROBES:
        return 0
    return num_explored if limit is None else min(limit, num_explored)


def priorities(
    state: RoleState, kind: AssignmentKind, generator: torch.Generator, *, uncertainty: float = 0.0
) -> Tensor:
    """``[P, L, E]`` values whose largest are exploited, for :func:`fluxlib.roles.assign`.

    Args:
        kind:
            ``flux``: utilities as last measured, by backpropagation or by probes (section 6).
            ``utility``: the same values, but nothing is probed: an expert's utility is known once it was tuned, and
            until then it is its first one. Pure exploitation.
            ``frequency``: the activation frequency of the participant's first profile, round after round.
            ``random``: uniform, drawn anew in every round.
            ``proportional``: as ``flux``, but drawn without replacement with chances proportional to utility
            (Gumbel top-k), as Oort draws participants: no expert is certain, none is excluded.
        generator: of ``random`` and ``proportional``, on the CPU.
        uncertainty: weight of :func:`~fluxlib.roles.uncertainty_bonus`, added to measured utilities.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"assignment is {kind!r}, allowed are {', '.join(KINDS)}")
    if kind == "random":
        return torch.rand(state.first.shape, generator=generator).to(state.first)
    if kind == "frequency":
        return state.first
    values = current_utilities(state)
    if uncertainty:
        values = values + uncertainty_bonus(state, uncertainty)
    return _gumbel(values, generator) if kind == "proportional" else values


def _gumbel(values: Tensor, generator: torch.Generator) -> Tensor:
    """Positive values whose order is a draw without replacement, in proportion to ``values``.

    ``-log(u) / value`` is exponential with that rate: the smallest come first. Its inverse is finite and not negative.
    """
    chance = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values.device)
    waiting = -chance.clamp(min=1e-300).log()
    return (values.double() / waiting.clamp(min=1e-300)).clamp(max=1e100)
