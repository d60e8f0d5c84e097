"""From a profile to what becomes of every expert (section 5), and its share of a merged slot (eq. 2)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fluxlib.config import MergeWeights, MergingConfig
from fluxlib.merging.budgets import layer_budgets
from fluxlib.merging.clustering import cluster
from fluxlib.merging.features import from_gram, gram_of, match_neurons
from fluxlib.merging.joint import joint_clusters
from fluxlib.moe import find
from fluxlib.moe.compact import LayerPlan
from fluxlib.profiling import Profile, check_fits

PAPER = MergingConfig()
"""The paper's rules, which are the settings' defaults."""


def merge_weights(profile: Profile, kind: MergeWeights = "attention_frequency") -> Tensor:
    """``[L, E]`` importance of each expert in its slot, not yet normalised; where all are 0 the slot is a plain mean.

    Args:
        kind: ``attention_frequency`` (eq. 2: ``f * a``), ``frequency``, ``uniform``; or ``gate`` (beyond the
            paper): squared gate weights. An expert that is chosen often, but always last, weighs little there.
    """
    if kind == "gate" and profile.gate.shape != profile.frequency.shape:
        raise ValueError("weights 'gate' needs a profile that measured gate weights, this one has none")
    weights = {
        "attention_frequency": profile.frequency * profile.attention.nan_to_num(),
        "frequency": profile.frequency,
        "uniform": torch.ones_like(profile.frequency),
        "gate": profile.gate,
    }
    if kind not in weights:
        raise ValueError(f"weights must be one of {tuple(weights)}, got {kind!r}")
    return weights[kind]


def plan(
    model: nn.Module, profile: Profile, tuned: Tensor, num_merged: int, rules: MergingConfig = PAPER, seed: int = 0
) -> list[LayerPlan]:
    """What becomes of every expert: its own slot, or a share of a merged one.

    Args:
        model: with its own experts, as the profile saw it (or a round later).
        tuned: bool ``[L, E]``, experts that are not merged.
        num_merged: ``B_non``, slots for merged experts over all layers.
        rules: of :func:`layer_budgets`, :func:`cluster`, :func:`merge_weights` and :func:`align_neurons`; with budgets
            ``joint`` the first two questions have one answer, :func:`joint_clusters` with the weights as importance.
        seed: of the clustering.

    Returns:
        One plan per MoE layer. Layers are read one at a time; nothing as large as an expert is kept.

    Raises:
        ValueError: a profile or a mask of another model, or fewer slots than layers with experts to merge.
    """
    check_fits(profile, model)
    if tuned.shape != profile.frequency.shape:
        raise ValueError(f"tuned must be {tuple(profile.frequency.shape)}, got {tuple(tuned.shape)}")
    found = find.layers(model)
    tuned = tuned.cpu().bool()
    rest = [(~row).nonzero().flatten() for row in tuned]
    alpha = merge_weights(profile, rules.weights).cpu()
    grams = [gram_of(layer.experts) for layer in found]
    if rules.budgets == "joint":
        shares = [_shares(*parts) for parts in zip(grams, alpha, rest, strict=True)]
        labels = joint_clusters(shares, [row[members] for row, members in zip(alpha, rest, strict=True)], num_merged)
    else:
        slots = layer_budgets(profile.frequency, tuned.sum(dim=1), num_merged, rules.budgets)
        points = [from_gram(gram[members][:, members]) for gram, members in zip(grams, rest, strict=True)]
        labels = cluster(points, slots, seed=seed)
    plans = [_layer_plan(*parts) for parts in zip(tuned, rest, labels, alpha, strict=True)]
    return [align_neurons(*pair) for pair in zip(found, plans, strict=True)] if rules.align_neurons else plans


def align_neurons(layer: find.MoELayer, plan: LayerPlan) -> LayerPlan:
    """The plan with the neurons of every group's members matched to those of its heaviest member.

    The order of an expert's neurons is arbitrary, so averaging two experts neuron by neuron mixes unrelated
    ones. Beyond the paper.
    """
    experts, layout = layer.experts, find.read_layout(layer.experts)
    permutations = []
    for number, group in enumerate(plan.groups):
        weights = plan.weights[number] if plan.weights else plan.shares(number)
        heaviest = group[weights.index(max(weights))]
        anchor = find.expert_tensors(experts, heaviest)
        matched = {e: match_neurons(anchor, find.expert_tensors(experts, e), layout) for e in group if e != heaviest}
        permutations.append(tuple(matched.get(e) for e in group))
    return replace(plan, permutations=tuple(permutations))


def _shares(gram: Tensor, alpha: Tensor, members: Tensor) -> Tensor:
    """Scalar products of a layer's experts to merge, in units of the layer's whole weighted square."""
    total = float(alpha.to(gram) @ gram.diagonal())
    return gram[members][:, members] / (total if total > 0 else 1.0)


def _layer_plan(tuned: Tensor, members: Tensor, labels: Tensor, alpha: Tensor) -> LayerPlan:
    """Members ``[n]`` of the slots that ``labels [n]`` name, weighted by ``alpha [E]``, beside the ``tuned [E]``."""
    groups = [_numbers(members[labels == slot]) for slot in range(int(labels.max()) + 1 if len(labels) else 0)]
    return LayerPlan(
        tuned=_numbers(tuned.nonzero()),
        groups=tuple(groups),
        weights=tuple(_numbers(alpha[list(group)]) for group in groups),
    )


def _numbers(values: Tensor) -> tuple:
    return tuple(values.flatten().tolist())
