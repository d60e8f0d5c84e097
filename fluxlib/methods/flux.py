"""FLUX: profile, merge what is not tuned, tune what is worth most, look at some of the rest.

One round of one participant (section 3 of the paper): its plan follows from the profile of the round before; exploited
experts are tuned, explored ones are kept unmerged and probed, all others are merged within the budget; afterwards it
profiles the model it holds for the next round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fluxlib import gradients, merging, profiling, roles
from fluxlib.config import MergingConfig, RunConfig
from fluxlib.methods.base import Budget, ExpertKey, LocalRound, Method, ParticipantState, Update
from fluxlib.methods.local import Stopwatch, customized, profile, profile_account, report, size, tune
from fluxlib.moe.compact import LayerPlan
from fluxlib.tasks.batches import to_device


def assign(
    state: roles.RoleState, budgets: Sequence[Budget], epsilon: float, generator: torch.Generator, config: RunConfig
) -> roles.Roles:
    """Eq. 4 on the utilities known so far; explored experts are drawn at random.

    Deviation: with ``roles.exploration="oldest"`` the least recently measured ones come first.

    ``config.roles.assignment`` puts other values in the place of utilities (:func:`fluxlib.roles.priorities`), in the
    same budget: as many experts are exploited in each round, and as many held unmerged beside them.
    """
    values, counts = roles.priorities(state, config.roles.assignment, generator), [one.num_tuned for one in budgets]
    by_age = config.roles.assignment == "flux" and config.roles.exploration == "oldest"
    return roles.assign(values, counts, epsilon, generator, roles.ages(state) if by_age else None)


def train(model: nn.Module, local: LocalRound) -> tuple[Update, ParticipantState]:
    """Merge, probe, tune; the profile for the next round comes afterwards (``Method.afterwards``)."""
    watch, data, config = Stopwatch(), local.data, local.config
    known = local.state.profile if config.profiling.stale else None
    is_first = known is None
    if known is None:
        with watch.phase("first_profile"):
            known = profile(model, data, config)
    with watch.phase("merge"):
        plans = make_plans(model, known, local.roles, local.budget, config.merging, config.seed)
    with customized(model, plans, config) as compact:
        with watch.phase("probe"):
            probed = keys_to_probe(local)
            probe_norms = probe(model, local, probed)
        with watch.phase("train"):
            tuned = tune(model, compact, data.train, config)
    (once, each), (samples, tokens) = forward_passes(probed, len(plans), config), size(data.train[:1])
    update = report(
        local,
        tuned,
        watch,
        plans,
        utilities=roles.utility(torch.cat([tuned.squared_norms, probe_norms]), tuned.tokens),
        probe_samples=round(once * samples),
        probe_tokens=round(once * tokens),
        expert_probe_samples=round(each * samples),
        expert_probe_tokens=round(each * tokens),
        hidden_profile=not is_first,
        **profile_account(data, known.frequency.numel(), config),
    )
    return update, ParticipantState(known, local.number) if is_first else local.state


def make_plans(
    model: nn.Module,
    known: profiling.Profile,
    assigned: roles.Roles,
    budget: Budget,
    rules: MergingConfig,
    seed: int,
) -> list[LayerPlan]:
    """Section 5: exploited experts tuned, explored ones kept as they are, all others merged."""
    kept = assigned.exploit | assigned.explore
    plans = merging.plan(model, known, kept, budget.num_merged, rules, seed)
    return [freeze(plan, explored) for plan, explored in zip(plans, assigned.explore, strict=True)]


def freeze(plan: LayerPlan, explored: Tensor) -> LayerPlan:
    """Move experts that are ``explored`` (``[E]`` bool) from the tuned ones into frozen slots of their own."""
    alone = tuple(e for e in plan.tuned if explored[e])
    permutations = None if plan.permutations is None else (*((None,) for _ in alone), *plan.permutations)
    return replace(
        plan,
        tuned=tuple(e for e in plan.tuned if not explored[e]),
        groups=(*((e,) for e in alone), *plan.groups),
        weights=(*((1.0,) for _ in alone), *(plan.weights or ())),
        permutations=permutations,
    )


def keys_to_probe(local: LocalRound) -> list[ExpertKey]:
    """The explored experts that are probed this round, drawn at random where there are more than may be."""
    keys = [(int(layer), int(expert)) for layer, expert in local.roles.explore.nonzero()]
    count = roles.num_probed(local.config.roles, len(keys))
    if count == len(keys):
        return keys
    return [keys[i] for i in torch.randperm(len(keys), generator=local.generator)[:count].tolist()]


def probe(model: nn.Module, local: LocalRound, probed: Sequence[ExpertKey]) -> Tensor:
    """``[1, L, E]`` squared gradient norms of the probed experts on the first batch, NaN elsewhere.

    Paper: estimates from forward passes, of every explored expert. Deviation: at most ``probes_per_round`` of them.
    Deviation: with ``explore_by="guided_probes"`` directions contain a guess of the gradient. Deviation: with
    ``"backward"`` exact norms of all explored experts from one backward pass, which keeps one expert's gradient at a
    time and no optimizer state. Its activations are those of a training step, so it fits where training fits.
    """
    seed = int(torch.randint(2**62, (1,), generator=local.generator))
    norms = torch.full((1, *local.roles.explore.shape), float("nan"))
    if not probed:
        return norms
    batch = to_device(local.data.train[0], next(model.parameters()).device)
    if local.config.roles.explore_by == "backward":
        values = gradients.true_norms(model, batch, probed)
    else:
        guided = local.config.roles.explore_by == "guided_probes"
        values = gradients.probe_norms(model, batch, probed, local.config.roles.num_probes, seed, guided=guided)
    layer, expert = zip(*probed, strict=True)
    norms[0, layer, expert] = values.to(norms)
    return norms


def forward_passes(probed: Sequence[ExpertKey], num_layers: int, config: RunConfig) -> tuple[float, float]:
    """What measuring the explored experts is worth, in forward passes of the whole model: once, and for each of them.

    Probes: one pass to cache every layer's input, then each side of each runs the layers from the expert's upwards.
    Guidance is charged as one pass: a product with the head, and the probed experts' own weight gradients. A backward
    pass is worth two, after a forward pass of its own, however many experts it measures.
    """
    if not probed:
        return 0.0, 0.0
    if config.roles.explore_by == "backward":
        return 3.0, 0.0
    above = sum((num_layers - layer) / num_layers for layer, _ in probed)
    return 1.0 + (config.roles.explore_by == "guided_probes"), 2 * config.roles.num_probes * above


METHOD = Method(
    "flux", "FLUX", assign, train, profiles=True, utilities=True, explores=True, explored_place=1.0, afterwards=True
)
