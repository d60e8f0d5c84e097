"""From a profile to what becomes of every expert (section 5), and its share of a merged slot (eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fluxlib.merging.budgets import checked_budgets, layer_budgets, one_each
from fluxlib.merging.clustering import cluster
from fluxlib.merging.features import check_finite, from_gram, gram_of, match_neurons
from fluxlib.merging.joint import joint_clusters
from fluxlib.moe import find
from fluxlib.moe.compact import LayerPlan
from fluxlib.profiling import Profile, check_fits

WEIGHTS = ("attention_frequency", "frequency", "uniform", "gate")


def merge_weights(profile: Profile, kind: str = "attention_frequency") -> Tensor:
    """``[L, E]`` importance of each expert in its slot, not yet normalised.

    Args:
        kind: ``attention_frequency`` (eq. 2: ``f * a``), ``frequency``, ``uniform``; or ``gate`` (beyond the
            paper): squared gate weights. An expert that is chosen often, but always last, weighs little there.

    A slot whose members all weigh 0 is merged uniformly (:class:`fluxlib.moe.compact.LayerPlan`).
    """
    if kind == "attention_frequency":
        return profile.frequency * profile.attention.nan_to_num()
    if kind == "frequency":
        return profile.frequency
    if kind == "uniform":
        return torch.ones_like(profile.frequency)
    if kind == "gate":
        if profile.gate.shape != profile.frequency.shape:
            raise ValueError("weights 'gate' needs a profile that measured gate weights, this one has none")
        return profile.gate
    raise ValueError(f"weights must be one of {WEIGHTS}, got {kind!r}")


def plan(
    model: nn.Module,
    profile: Profile,
    tuned: Tensor,
    num_merged: int,
    *,
    kind: str = "adaptive",
    rounding: str = "largest_remainder",
    method: str = "fused",
    weights: str = "attention_frequency",
    align: bool = False,
    dim: int = 32,
    seed: int = 0,
    budgets: Sequence[int] | None = None,
    grams: Sequence[Tensor] | None = None,
) -> list[LayerPlan]:
    """What becomes of every expert: its own slot, or a share of a merged one.

    Args:
        model: with its own experts, as the profile saw it (or a round later).
        profile: of the participant's data, from :func:`fluxlib.profiling.profile`.
        tuned: bool ``[L, E]``, experts that are not merged.
        num_merged: ``B_non``, slots for merged experts over all layers.
        kind: of the layer budgets, see :func:`layer_budgets`; or ``joint``: budgets and clusters from one
            objective, see :func:`joint_clusters`, with the merge weights as importance (best: ``gate``).
        rounding: see :func:`layer_budgets`; with ``floor`` a layer that would get no slot gets one all the same, if
            need be from the layer that has most.
        method: clustering, see :func:`cluster`; not used with ``joint``.
        weights: see :func:`merge_weights`.
        align: match neurons to the slot's heaviest expert before averaging (beyond the paper).
        dim: length of the features.
        seed: of the clustering.
        budgets: slots of each layer, instead of those of ``kind``; see :func:`budgets_by_error`. A layer that has
            fewer experts to merge gets a slot for each of them.
        grams: scalar products ``[E, E]`` of each layer's experts, which say what resembles what; None: those of
            their weights. See :func:`output_grams`.

    Returns:
        One plan per MoE layer. Layers are read one at a time; nothing as large as an expert is kept.

    Raises:
        ValueError: a profile of another model, a mask of another shape, fewer slots than layers with experts
            to merge, ``budgets`` that leave such a layer without a slot or exceed ``num_merged``, or an expert with
            NaN or infinity; names the layer.
    """
    found = find.layers(model)
    check_fits(profile, model)
    if tuned.shape != profile.frequency.shape:
        raise ValueError(f"tuned must be {tuple(profile.frequency.shape)}, got {tuple(tuned.shape)}")
    rest = [(~row).nonzero().flatten() for row in tuned.cpu().bool()]
    alpha = merge_weights(profile, weights).cpu()
    if grams is not None and len(grams) != len(found):
        raise ValueError(f"grams must have one entry for each of {len(found)} layers, got {len(grams)}")
    grams = [_checked_gram(layer, grams) for layer in found]
    if kind == "joint" and budgets is None:
        shares = [_shares(*parts) for parts in zip(grams, alpha, rest, strict=True)]
        labels = joint_clusters(shares, [row[members] for row, members in zip(alpha, rest, strict=True)], num_merged)
    else:
        available = [len(members) for members in rest]
        if budgets is None:
            budgets = layer_budgets(profile.frequency, tuned.sum(dim=1), num_merged, kind, rounding)
            budgets = one_each(budgets, available, num_merged) if rounding == "floor" else budgets
        else:
            budgets = checked_budgets(budgets, available, num_merged)
        points = [from_gram(gram[members][:, members], dim) for gram, members in zip(grams, rest, strict=True)]
        labels = cluster(points, budgets, method, seed)
    plans = [
        _layer_plan(layer, members, label, alpha[layer.index])
        for layer, members, label in zip(found, rest, labels, strict=True)
    ]
    return [align_neurons(*pair) for pair in zip(found, plans, strict=True)] if align else plans


def align_neurons(layer: find.MoELayer, plan: LayerPlan) -> LayerPlan:
    """The plan with the neurons of every group's members matched to those of its heaviest member.

    The order of an expert's neurons is arbitrary, so averaging two experts neuron by neuron mixes unrelated
    ones. Beyond the paper.
    """
    weights = plan.weights or tuple((1.0,) * len(group) for group in plan.groups)
    orders = (_orders(layer.experts, *pair) for pair in zip(plan.groups, weights, strict=True))
    return replace(plan, permutations=tuple(orders))


def discard(profile: Profile, tuned: Tensor) -> list[LayerPlan]:
    """The comparison: what is not tuned is dropped from the routing (FMES)."""
    masks = tuned.cpu().bool()
    if masks.shape != profile.frequency.shape:
        raise ValueError(f"tuned must be {tuple(profile.frequency.shape)}, got {tuple(masks.shape)}")
    return [LayerPlan(tuned=_numbers(row.nonzero()), dropped=_numbers((~row).nonzero())) for row in masks]


def _checked_gram(layer: find.MoELayer, given: Sequence[Tensor] | None) -> Tensor:
    try:
        gram = gram_of(layer.experts) if given is None else given[layer.index]
        if gram.shape != (layer.num_experts, layer.num_experts):
            raise ValueError(f"grams must be {[layer.num_experts] * 2}, got {list(gram.shape)}")
        return check_finite(gram)
    except ValueError as error:
        raise ValueError(f"model: layer {layer.index} ({layer.name}): {error}") from error


def _shares(gram: Tensor, alpha: Tensor, members: Tensor) -> Tensor:
    """Scalar products of a layer's experts to merge, in units of the layer's whole weighted square."""
    total = float(alpha.to(gram) @ gram.diagonal())
    return gram[members][:, members] / (total if total > 0 else 1.0)


def _layer_plan(layer: find.MoELayer, members: Tensor, labels: Tensor, alpha: Tensor) -> LayerPlan:
    num_slots = int(labels.max()) + 1 if len(labels) else 0
    groups = [_numbers(members[labels == slot]) for slot in range(num_slots)]
    merged = set(_numbers(members))
    return LayerPlan(
        tuned=tuple(expert for expert in range(layer.num_experts) if expert not in merged),
        groups=tuple(groups),
        weights=tuple(_numbers(alpha[list(group)]) for group in groups),
    )


def _orders(experts: nn.Module, group: Sequence[int], weights: Sequence[float]) -> tuple[Tensor | None, ...]:
    """Order of the neurons of each member, None for the heaviest, which the others follow."""
    anchor = group[max(range(len(group)), key=weights.__getitem__)]
    layout, target = find.read_layout(experts), find.expert_tensors(experts, anchor)
    return tuple(
        None if expert == anchor else match_neurons(target, find.expert_tensors(experts, expert), layout)
        for expert in group
    )


def _numbers(values: Tensor) -> tuple:
    return tuple(values.flatten().tolist())
