"""FLUX+: FLUX without what its rounds are made of, transfer and looking.

One round of one participant, beside :mod:`fluxlib.methods.flux`, which is the paper's:

========================  ======================================  ================================================
question                  FLUX                                    FLUX+
========================  ======================================  ================================================
what is sent to it        every expert that changed               those it tunes; what it merges or watches is its own
                                                                  copy, at most :data:`MAX_STALENESS` rounds old
what is merged how        eq. 1, K-Means, eq. 2                   slots, clusters and weights from one objective, with
                                                                  squared gate weights (:mod:`fluxlib.merging.joint`)
who is explored           a share of the budget, at random        nearly the whole budget is tuned; in the place of one
                                                                  expert in eight several are watched, the longest
                                                                  unseen first
what they are worth       forward passes, for eight of them       exact norms, from the training's own backward passes
the profile               4 bits, an extra pass                   what the training's own passes routed, through the
                                                                  customised model; the first is FLUX's
========================  ======================================  ================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from fluxlib import profiling, roles
from fluxlib.config import MergingConfig, RunConfig
from fluxlib.methods.base import Budget, LocalRound, Method, ParticipantState, Update
from fluxlib.methods.flux import make_plans
from fluxlib.methods.local import Stopwatch, customized, profile, report, tune

MAX_STALENESS = 8
"""Rounds that an expert which is only merged may lag behind."""

MERGING = MergingConfig(budgets="joint", weights="gate")

GIVEN = 8
"""Of this many tuned experts one makes room for those that are watched."""

WATCHED = 4
"""Experts that are watched in its place. At the peak of a step a tuned parameter takes 12 bytes (weight, moments), a
watched one 2, its tokens' activations, and 4 for the gradient of the one that is at work. With an adapter a tuned one
takes little more than 2."""


def split(budget: Budget, num_experts: int, num_layers: int, watched: int = WATCHED) -> tuple[int, int]:
    """Experts that are tuned and watched within a budget; one of each layer can be left to merge."""
    given = math.ceil(budget.num_tuned / GIVEN) if 1 < budget.num_tuned < num_experts - num_layers else 0
    exploit = budget.num_tuned - given
    return exploit, min(watched * given, max(0, num_experts - num_layers - exploit))


def assign(
    state: roles.RoleState, budgets: Sequence[Budget], epsilon: float, generator: torch.Generator, config: RunConfig
) -> roles.Roles:
    """The experts of highest utility are tuned, the longest unseen ones watched; ``epsilon`` is not used."""
    values = roles.priorities(state, config.roles.assignment, generator)
    watched = 1 if config.adapter.used_rank else WATCHED
    counts = [split(budget, values[0].numel(), values.shape[1], watched) for budget in budgets]
    totals = torch.tensor(counts).sum(dim=1)
    shares = torch.tensor([tuned for tuned, _ in counts]) / totals
    return roles.assign(values, totals, shares, generator, roles.ages(state))


def train(model: nn.Module, local: LocalRound) -> tuple[Update, ParticipantState]:
    """Merge, tune, and see all that is to be seen on the way."""
    watch, data, config, known = Stopwatch(), local.data, local.config, local.state.profile
    if known is None:
        with watch.phase("first_profile"):
            known = profile(model, data, config)
    with watch.phase("merge"):
        plans = make_plans(model, known, local.roles, local.budget, MERGING, config.seed)
    with watch.phase("train"), customized(model, plans, config) as compact:
        for layer, explored in zip(compact, local.roles.explore, strict=True):
            layer.watch(int(explored.sum()))
        tuned = tune(model, compact, data.train, config)
    update = report(
        local,
        tuned,
        watch,
        plans,
        utilities=roles.utility(tuned.squared_norms, tuned.tokens),
        watched=local.roles.explore,
    )
    num_tokens = int(tuned.tokens[0].sum()) // known.fingerprint[0][1]
    seen = profiling.of_counts(model, tuned.counts, tuned.gate, num_tokens)
    return update, ParticipantState(seen, local.number)


METHOD = Method(
    "flux_plus",
    "FLUX+",
    assign,
    train,
    profiles=True,
    utilities=True,
    max_staleness=MAX_STALENESS,
    explored_place=1 / WATCHED,
)
