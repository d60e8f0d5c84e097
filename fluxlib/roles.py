"""Which expert each participant tunes, and which it only looks at (section 6 of the paper).

Everything is a pure function of its arguments. P participants, L MoE layers, E experts per layer.

What the server remembers of utilities between rounds is a :class:`RoleState`. :func:`update` is the only way to a new
one: it bounds and reports what participants send. :func:`current_utilities` and :func:`ages` are what :func:`assign` is
given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluxlib.config import AssignmentKind, RolesConfig

NEVER = -1
"""Round of something that has not happened yet: it is one round older than the oldest."""

MOST_UTILITY = 1e30
"""Largest utility that is believed of anybody: sums of such stay finite in 32 bits."""


@dataclass(frozen=True)
class Roles:
    """Who does what in one round, as boolean masks ``[P, L, E]``, or ``[L, E]`` of one participant.

    ``exploit`` is tuned and uploaded. Of ``explore`` only a utility is reported. No expert is both.
    """

    exploit: Tensor
    explore: Tensor

    def __getitem__(self, participant: int) -> Roles:
        """Roles of one participant."""
        return Roles(self.exploit[participant], self.explore[participant])


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
        came = ~utilities.isnan()
        missing = (asked & ~came).flatten(1).sum(dim=1)
        if at_least is not None:
            missing = missing + (at_least.to(missing) - (allowed & ~asked & came).flatten(1).sum(dim=1)).clamp(min=0)
        faults += _faults("missing", missing)
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


def _faults(kind: str, wrong: Tensor) -> list[Fault]:
    """``wrong [P, ...]``: how many of each participant's values are, or which."""
    count = wrong.reshape(len(wrong), -1).sum(dim=1)
    return [Fault(p, kind, int(count[p])) for p in count.nonzero().flatten().tolist()]


def priorities(state: RoleState, kind: AssignmentKind, generator: torch.Generator) -> Tensor:
    """``[P, L, E]`` values whose largest are exploited: FLUX's utilities, and what they have to beat.

    All kinds fill the same number of places in the same round, so that what they are compared by is which experts are
    tuned, not how many.

    Args:
        kind:
            ``flux``: utilities as last measured, by backpropagation or by probes (section 6).
            ``utility``: the same values, but nothing is probed: an expert's utility is known once it was tuned, and
            until then it is its first one. Pure exploitation.
            ``frequency``: the activation frequency of the participant's first profile, round after round.
            ``random``: uniform, drawn anew in every round.
        generator: of ``random``, on the CPU.
    """
    if kind == "random":
        return torch.rand(state.first.shape, generator=generator).to(state.first)
    return state.first if kind == "frequency" else current_utilities(state)


def num_probed(config: RolesConfig, num_explored: int) -> int:
    """Of ``num_explored`` experts, those that a participant probes in a round.

    Only FLUX looks: what the other assignments choose by would not change, or not by their own rule.
    """
    if config.assignment != "flux":
        return 0
    return num_explored if config.probe_limit is None else min(config.probe_limit, num_explored)


def assign(
    utilities: Tensor,
    budgets: Tensor | Sequence[int],
    epsilon: float | Tensor,
    generator: torch.Generator,
    ages: Tensor | None = None,
) -> Roles:
    """Eq. 4: per participant the ``round(epsilon * B)`` experts of highest utility, the rest of B to explore.

    The problem is separable, so top-B is its exact solution; equal utilities go to the lower index. Explored
    experts are drawn uniformly. Deviation: from ALL experts outside the exploited ones, not from the next best alone.

    Args:
        utilities: ``[P, L, E]``, finite.
        budgets: ``[P]``, ``B_tune`` of each participant, 0..L*E.
        epsilon: exploitation share, 0..1, of all or ``[P]`` of each. A participant with a budget exploits at least one
            expert if epsilon > 0.
        generator: draws the explored experts, on the CPU.
        ages: ``[P, L, E]`` rounds since the last measurement. Deviation: given, exploration rotates: oldest first, ties
            at random.

    Raises:
        ValueError: naming the participant whose utilities or budget are not allowed.
    """
    if utilities.dim() != 3 or len(budgets) != len(utilities):
        shape = (len(budgets), "layers", "experts")
        raise ValueError(f"utilities must be {shape}, got {tuple(utilities.shape)}")
    values, counts = utilities.flatten(1), torch.as_tensor(budgets, device=utilities.device).long()
    for participant in ((counts < 0) | (counts > values.shape[1])).nonzero().flatten().tolist():
        allowed = f"0..{values.shape[1]} (all experts)"
        raise ValueError(f"budgets[{participant}] must be in {allowed}, got {int(counts[participant])}")
    bad = (~torch.isfinite(values)).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"utilities must be finite, those of participants {bad} are not (see roles.update)")
    shares = torch.as_tensor(epsilon, device=utilities.device)
    num_exploit = (shares * counts.double() + 0.5).floor().long()
    num_exploit = num_exploit.maximum(counts.clamp(max=1) * (shares > 0))
    exploit = _top(values, num_exploit)
    keys = torch.rand(values.shape, generator=generator, dtype=torch.float32).to(values.device)
    if ages is not None:
        keys = keys + ages.reshape(values.shape)
    explore = _top(keys.masked_fill(exploit, -math.inf), counts - num_exploit)
    return Roles(exploit.view(utilities.shape), explore.view(utilities.shape))


def _top(values: Tensor, counts: Tensor) -> Tensor:
    """Bool ``[P, N]``: the ``counts[p]`` largest of each row, the lower index first among equals."""
    most = int(counts.max()) if len(counts) else 0
    order = values.argsort(dim=1, descending=True, stable=True)[:, :most]
    chosen = torch.arange(most, device=values.device) < counts[:, None]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, chosen)


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
