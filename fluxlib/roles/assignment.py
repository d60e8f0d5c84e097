"""Eq. 4: the experts of highest utility within every participant's budget, exactly, for all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxlib.config import AssignmentKind, RolesConfig
from fluxlib.roles.state import RoleState, current_utilities


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
