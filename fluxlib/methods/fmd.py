"""FMD: the whole model is fine-tuned; experts that do not fit are offloaded to host memory.

The reference of quality. Every participant tunes and uploads every expert. What offloading costs is the device
clock's matter (:mod:`fluxlib.devices.clock`): the arithmetic is the same wherever an expert lies
(:class:`fluxlib.moe.offloaded.OffloadedExperts` is what moves them on a GPU).

Paper: section 5 of its set-up, "inactive experts offloaded to CPU RAM and fetched on demand".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fluxlib.config import RunConfig
from fluxlib.methods.base import Budget, LocalRound, Method, ParticipantState, Update
from fluxlib.methods.local import Stopwatch, customized, report, tune
from fluxlib.moe.compact import LayerPlan
from fluxlib.roles import Roles, RoleState


def assign(
    state: RoleState, budgets: Sequence[Budget], epsilon: float, generator: torch.Generator, config: RunConfig
) -> Roles:
    """Everybody tunes every expert."""
    return Roles(torch.ones_like(state.first, dtype=torch.bool), torch.zeros_like(state.first, dtype=torch.bool))


def train(model: nn.Module, local: LocalRound) -> tuple[Update, ParticipantState]:
    """Local steps on all experts."""
    watch = Stopwatch()
    plans = [LayerPlan(tuned=tuple(mask.nonzero().flatten().tolist())) for mask in local.roles.exploit]
    with watch.phase("train"), customized(model, plans, local.config) as compact:
        tuned = tune(model, compact, local.data.train, local.config)
    return report(local, tuned, watch, plans, offloaded=True), local.state


METHOD = Method("fmd", "FMD (full model, offloaded)", assign, train, profiles=False)
