"""FMES: the most used experts are tuned, the others are dropped from the routing.

Each participant tunes as many experts as FLUX would let it, those that its own data activates most, and takes the rest
out of the top-k: their tokens go to experts that stay, the gate's weights renormalised as the model does it. A layer
that is left with fewer tuned experts than top-k keeps its most used others, frozen, until it has top-k. Tuned experts
are uploaded and averaged into the full model, of which no expert is ever dropped on the server.

Paper: section 5 of its set-up, "tune the most frequently activated experts and drop the rest", similar to FedMoE.
Deviation: the profile is made anew after every round in few bits, as FLUX makes it, so the baseline is spared a stale
choice and an expensive profile; its choice is one round old.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fluxlib import roles
from fluxlib.config import RunConfig
from fluxlib.methods.base import Budget, LocalRound, Method, ParticipantState, Update
from fluxlib.methods.local import Stopwatch, customized, profile, profile_account, report, tune
from fluxlib.moe import find
from fluxlib.moe.compact import LayerPlan


def assign(
    state: roles.RoleState, budgets: Sequence[Budget], epsilon: float, generator: torch.Generator, config: RunConfig
) -> roles.Roles:
    """The experts of highest frequency within each budget; all others only report theirs."""
    counts = [budget.num_tuned for budget in budgets]
    exploit = roles.assign(roles.current_utilities(state), counts, 1.0, generator).exploit
    return roles.Roles(exploit, ~exploit)


def train(model: nn.Module, local: LocalRound) -> tuple[Update, ParticipantState]:
    """Drop, tune, profile."""
    watch, data, config, known = Stopwatch(), local.data, local.config, local.state.profile
    if known is None:
        with watch.phase("first_profile"):
            known = profile(model, data, config)
    plans = make_plans(model, known.frequency, local.roles.exploit)
    with watch.phase("train"), customized(model, plans, config) as compact:
        tuned = tune(model, compact, data.train, config)
    with watch.phase("profile"):
        found = profile(model, data, config)
    update = report(
        local,
        tuned,
        watch,
        plans,
        utilities=roles.first_utilities(found.frequency),
        **profile_account(data, found.frequency.numel(), config),
    )
    return update, ParticipantState(found, local.number)


def make_plans(model: nn.Module, frequency: Tensor, exploit: Tensor) -> list[LayerPlan]:
    """Per layer: the experts to tune, the most used others up to top-k frozen, the rest dropped; tensors ``[L, E]``."""
    plans = []
    for layer, used, tuned in zip(find.layers(model), frequency, exploit, strict=True):
        others = used.masked_fill(tuned, -1.0).argsort(descending=True, stable=True)
        others = others[: layer.num_experts - int(tuned.sum())].tolist()
        num_kept = max(0, layer.top_k - int(tuned.sum()))
        plans.append(
            LayerPlan(
                tuned=tuple(tuned.nonzero().flatten().tolist()),
                groups=tuple((expert,) for expert in sorted(others[:num_kept])),
                dropped=tuple(sorted(others[num_kept:])),
            )
        )
    return plans


METHOD = Method("fmes", "FMES (frequent experts, the rest dropped)", assign, train, profiles=True)
