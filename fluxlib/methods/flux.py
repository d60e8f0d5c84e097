"""FLUX: profile, merge what is not tuned, tune what is worth most, look at some of the rest.

One round of one participant (section 3 of the paper): its plan follows from the profile it made in the round
before; exploited experts are tuned, explored ones are kept unmerged and probed without backpropagation, all others
are merged within the budget; afterwards it profiles the model it holds for the next round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fluxlib import gradients, merging, profiling, roles
from fluxlib.config import RunConfig
from fluxlib.methods.base import Budget, ExpertKey, LocalData, LocalRound, Method, ParticipantState, Roles, Update, Work
from fluxlib.methods.local import Stopwatch, Tuned, count_profile, count_training, customized, profile, tune
from fluxlib.moe import find
from fluxlib.moe.compact import LayerPlan
from fluxlib.tasks.batches import to_device


def assign(
    state: roles.RoleState, budgets: Sequence[Budget], epsilon: float, generator: torch.Generator, config: RunConfig
) -> roles.Assignment:
    """Eq. 4 on the utilities known so far; the least recently measured experts are explored first.

    ``config.assignment`` puts other values in the place of utilities (:func:`fluxlib.roles.priorities`), in the same
    budget: as many experts are exploited in each round, and as many held unmerged beside them.
    """
    values = roles.priorities(state, config.roles.assignment, generator)
    return roles.assign(
        values,
        [budget.num_tuned for budget in budgets],
        epsilon,
        generator,
        ages=roles.ages(state) if config.roles.assignment in roles.PROBES else None,
    )


def train(model: nn.Module, local: LocalRound) -> tuple[Update, ParticipantState]:
    """Merge, probe, tune; the profile for the next round comes afterwards (``Method.afterwards``)."""
    watch, state, assigned = Stopwatch(), local.state, local.roles
    data, config, generator = local.data, local.config, local.generator
    work = Work(num_experts=assigned.exploit.numel())
    known = state.profile
    if known is None or not config.profiling.stale:
        with watch.phase("first_profile"):
            known = profile(model, data, config)
        state = ParticipantState(known, local.number)
        work = replace(work, first_profile=True)
    given = assigned.merged
    with watch.phase("merge"):
        plans = list(given.plans) if given else make_plans(model, known, assigned, local.budget, config)
    with customized(model, plans, given.slots if given else None) as compact:
        with watch.phase("probe"):
            probed = _probe_keys(assigned.explore, config, generator)
            probe_norms = _probe(model, data, probed, config, generator)
        with watch.phase("train"):
            tuned = tune(model, compact, data.train, config)
    utilities = roles.utility(torch.cat([tuned.squared_norms, probe_norms]), tuned.tokens)
    work = _account(work, plans, assigned, data, tuned, probed, config)
    return Update(tuned.changes, utilities, tuned.tokens, tuned.loss, tuned.num_samples, work, watch.phases_s), state


def make_plans(
    model: nn.Module, known: profiling.Profile, assigned: Roles, budget: Budget, config: RunConfig
) -> list[LayerPlan]:
    """Section 5: exploited experts tuned, explored ones kept as they are, all others merged."""
    kept = assigned.exploit | assigned.explore
    plans = merging.plan(
        model,
        known,
        kept,
        budget.num_merged,
        kind=config.merging.budgets,
        method=config.merging.clustering,
        weights=config.merging.weights,
        align=config.merging.align_neurons,
        seed=config.seed,
    )
    return [freeze(plan, explored) for plan, explored in zip(plans, assigned.explore, strict=True)]


def freeze(plan: LayerPlan, explored: Tensor) -> LayerPlan:
    """Move explored experts from the tuned ones into frozen slots of their own.

    Args:
        explored: ``[E]`` bool.
    """
    alone = tuple(e for e in plan.tuned if explored[e])
    weights = None if plan.weights is None else (*((1.0,) for _ in alone), *plan.weights)
    permutations = None if plan.permutations is None else (*((None,) for _ in alone), *plan.permutations)
    return replace(
        plan,
        tuned=tuple(e for e in plan.tuned if not explored[e]),
        groups=(*((e,) for e in alone), *plan.groups),
        weights=weights,
        permutations=permutations,
    )


def _probe_keys(explore: Tensor, config: RunConfig, generator: torch.Generator) -> list[ExpertKey]:
    """The explored experts that are probed this round, drawn at random where there are more than may be."""
    keys = [(int(layer), int(expert)) for layer, expert in explore.nonzero()]
    count = roles.num_probed(config.roles.assignment, len(keys), config.roles.probe_limit)
    if count == len(keys):
        return keys
    return [keys[i] for i in torch.randperm(len(keys), generator=generator)[:count].tolist()]


def _probe(
    model: nn.Module,
    data: LocalData,
    probed: Sequence[ExpertKey],
    config: RunConfig,
    generator: torch.Generator,
) -> Tensor:
    """``[1, L, E]`` squared gradient norms of the probed experts, NaN elsewhere.

    Paper: estimates from forward passes. Deviation, with ``explore_by="backward"``: exact norms of all explored experts
    from one backward pass, which keeps one expert's gradient at a time and no optimizer state. Its activations are
    those of a training step, so it fits where training fits.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator))
    moe = find.layers(model)
    norms = torch.full((1, len(moe), moe[0].num_experts), float("nan"))
    if not probed:
        return norms
    batch = to_device(data.train[0], next(model.parameters()).device)
    if config.roles.explore_by == "backward":
        values = gradients.true_norms(model, batch, probed)
    else:
        values = gradients.probe_norms(model, batch, probed, config.roles.num_probes, seed)
    for (layer, expert), value in zip(probed, values.tolist(), strict=True):
        norms[0, layer, expert] = value
    return norms


def _account(
    work: Work,
    plans: Sequence[LayerPlan],
    assigned: Roles,
    data: LocalData,
    tuned: Tuned,
    probed: Sequence[ExpertKey],
    config: RunConfig,
) -> Work:
    passes = forward_passes(probed, len(plans), config)
    given = assigned.merged.slots if assigned.merged else [{}] * len(plans)
    work = replace(
        count_training(work, tuned, assigned.exploit, len(data.train)),
        num_frozen=sum(len(plan.groups) for plan in plans),
        num_merge_sources=sum(
            len(group)
            for plan, slots in zip(plans, given, strict=True)
            for number, group in enumerate(plan.groups)
            if len(group) > 1 and number not in slots
        ),
        num_server_merged=sum(
            len(plan.groups[number]) + 1 for plan, slots in zip(plans, given, strict=True) for number in slots
        ),
        probe_samples=round(passes * len(data.train[0]["input_ids"])),
        probe_tokens=round(passes * int(data.train[0]["attention_mask"].sum())),
    )
    return count_profile(work, data, config)


def forward_passes(probed: Sequence[ExpertKey], num_layers: int, config: RunConfig) -> float:
    """What measuring the explored experts is worth, in forward passes of the whole model.

    Probes: one pass to cache every layer's input, then each side of each runs the layers from the expert's upwards. A
    backward pass is worth two, after a forward pass of its own.
    """
    if not probed:
        return 0.0
    if config.roles.explore_by == "backward":
        return 3.0
    above = sum((num_layers - layer) / num_layers for layer, _ in probed)
    return 1 + 2 * config.roles.num_probes * above


METHOD = Method(
    "flux", "FLUX", assign, train,
    profiles=True, utilities=True, explores=True, afterwards=profile, plan=make_plans,
)  # fmt: skip
