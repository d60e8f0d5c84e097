"""FMD: the whole model is fine-tuned; experts that do not fit are offloaded to host memory.

The reference of quality. What offloading costs is the device clock's matter (:mod:`fluxlib.devices.clock`): the
arithmetic is the same wherever an expert lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fluxlib.config import RunConfig
from fluxlib.methods.base import Budget, LocalData, Method, ParticipantState, Roles, Update, Work
from fluxlib.methods.local import Stopwatch, customized, tune
from fluxlib.moe.compact import LayerPlan
from fluxlib.roles import Assignment, RoleState


def assign(state: RoleState, budgets: Sequence[Budget], epsilon: float, generator: torch.Generator) -> Assignment:
    """Everybody tunes every expert."""
    return Assignment(torch.ones_like(state.first, dtype=torch.bool), torch.zeros_like(state.first, dtype=torch.bool))


def train(
    model: nn.Module,
    state: ParticipantState,
    roles: Roles,
    budget: Budget,
    data: LocalData,
    config: RunConfig,
    round_number: int,
    generator: torch.Generator,
) -> tuple[Update, ParticipantState]:
    """Local steps on all experts."""
    watch = Stopwatch()
    plans = [LayerPlan(tuned=tuple(mask.nonzero().flatten().tolist())) for mask in roles.exploit]
    with watch.phase("train"), customized(model, plans) as compact:
        tuned = tune(model, compact, data.train, config)
    work = Work(
        num_experts=roles.exploit.numel(),
        num_tuned=int(roles.exploit.sum()),
        train_steps=len(data.train),
        train_samples=tuned.num_samples,
        train_tokens=tuned.num_tokens,
        offloaded=True,
    )
    nothing = torch.full(roles.exploit.shape, float("nan"))
    update = Update(tuned.deltas, nothing, tuned.tokens, tuned.loss, tuned.num_samples, work, watch.phases_s)
    return update, state


METHOD = Method("fmd", "FMD (full model, offloaded)", assign, train, profiles=False)
