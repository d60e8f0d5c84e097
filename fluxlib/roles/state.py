"""What the server remembers of utilities between rounds.

:func:`update` is the only way to a new :class:`RoleState`: it bounds and reports what participants send.
:func:`current_utilities` and :func:`ages` are what :func:`fluxlib.roles.assign` is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluxlib.roles.utility import first_utilities

NEVER = -1
"""Round of something that has not happened yet: it is one round older than the oldest."""

MOST_UTILITY = 1e30
"""Largest utility that is believed of anybody: sums of such stay finite in 32 bits."""


@dataclass(frozen=True)
class Fault:
    """What :func:`update` did not take as it came: ``count`` values of one participant.

    ``kind`` is ``infinite`` or ``negative`` (ignored), ``huge`` (cut to the bound), ``unasked`` (ignored) or
    ``missing`` (asked for, not delivered; the last utility stays).
    """

    participant: int
    kind: str
    count: int


@dataclass(frozen=True)
class RoleState:
    """What the server knows about utilities.

    ``measured [P, L, E]`` last reported utility, NaN = never; ``first [P, L, E]`` utilities before round 1;
    ``measured_round [P, L, E]``: last round in which it was measured (-1 = never); ``round``: rounds that were
    recorded; ``faults``: of the last update.
    """

    measured: Tensor
    first: Tensor
    measured_round: Tensor
    round: int = 0
    faults: tuple[Fault, ...] = ()

    @classmethod
    def start(cls, frequency: Tensor) -> RoleState:
        """State before round 1 from activation frequencies ``[P, L, E]``."""
        first = first_utilities(frequency)
        never = torch.full(first.shape, NEVER, dtype=torch.long, device=first.device)
        return cls(torch.full_like(first, math.nan), first, never)


def current_utilities(state: RoleState) -> Tensor:
    """``[P, L, E]`` utilities to assign by: the last measured ones; first ones where nothing was measured.

    After the first measurement a participant's first utilities are scaled so that, over the experts it did
    measure, they have the same mean as the measurements: both are then in one unit and neither always wins. Deviation:
    the paper does not say how frequencies and measured utilities are compared.
    """
    known = ~state.measured.isnan()
    measured_sum = state.measured.nan_to_num().sum(dim=(1, 2), keepdim=True)
    first_sum = (state.first * known).sum(dim=(1, 2), keepdim=True)
    ratio = measured_sum / first_sum.clamp(min=torch.finfo(first_sum.dtype).tiny)
    scale = torch.where(first_sum > 0, ratio, torch.ones_like(ratio))
    return torch.where(known, state.measured, state.first * scale)


def ages(state: RoleState) -> Tensor:
    """``[P, L, E]`` rounds since each utility was measured (never = longer than all others), for rotation."""
    return state.round - state.measured_round


def update(
    state: RoleState,
    utilities: Tensor,
    asked: Tensor | None = None,
    optional: Tensor | None = None,
    at_least: Tensor | None = None,
    bound: float = 100.0,
) -> RoleState:
    """State after one round; its ``faults`` name what was ignored, cut or missing.

    Args:
        utilities: ``[P, L, E]`` as reported, NaN = not measured: the last value stays.
        asked: bool ``[P, L, E]``: experts whose utility was to be measured; others are ignored.
        optional: bool ``[P, L, E]``, with ``asked``: experts whose utility may come too.
        at_least: ``[P]`` how many of the optional ones are due.
        bound: a utility above ``bound`` times the median of the participants' largest known ones is cut to that,
            since one lie must not outweigh everything an honest participant can ever report.
    """
    if utilities.shape != state.measured.shape:
        raise ValueError(f"utilities must be {tuple(state.measured.shape)}, got {tuple(utilities.shape)}")
    values = utilities.to(state.measured)
    faults = []
    for kind, wrong in (("infinite", values.isinf()), ("negative", values < 0)):
        faults += _faults(kind, wrong)
        values = values.masked_fill(wrong, math.nan)
    if asked is not None:
        allowed = asked if optional is None else asked | optional
        faults += _missing(utilities, asked, allowed & ~asked, at_least)
        faults += _faults("unasked", ~allowed & ~values.isnan())
        values = values.masked_fill(~allowed, math.nan)
    cap = _cap(state, values, bound)
    faults += _faults("huge", values > cap)
    values = values.clamp(max=cap)
    fresh = ~values.isnan()
    return replace(
        state,
        measured=torch.where(fresh, values, state.measured),
        measured_round=torch.where(fresh, state.round, state.measured_round),
        round=state.round + 1,
        faults=tuple(faults),
    )


def _cap(state: RoleState, values: Tensor, bound: float) -> float:
    """Largest utility that is believed: those of one participant span many orders, participants' largest do not."""
    known = torch.fmax(state.measured, values).nan_to_num(nan=0.0).flatten(1).amax(dim=1)
    known = known[known > 0]
    return min(bound * float(known.median()), MOST_UTILITY) if len(known) else math.inf


def _missing(utilities: Tensor, asked: Tensor, optional: Tensor, at_least: Tensor | None) -> list[Fault]:
    """What did not come: each expert asked for, and as many optional ones as lack of those that are due."""
    came = ~utilities.isnan()
    count = (asked & ~came).flatten(1).sum(dim=1)
    if at_least is not None:
        count = count + (at_least.to(count) - (optional & came).flatten(1).sum(dim=1)).clamp(min=0)
    return _faults("missing", count)


def _faults(kind: str, wrong: Tensor) -> list[Fault]:
    """``wrong [P, ...]``: how many of each participant's values are, or which."""
    count = wrong.reshape(len(wrong), -1).sum(dim=1)
    return [Fault(p, kind, int(count[p])) for p in count.nonzero().flatten().tolist()]
