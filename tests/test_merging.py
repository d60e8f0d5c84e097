"""Budgets, clusters, weights and plans: small numbers by hand, then properties on tiny models."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from fluxlib import merging, profiling
from fluxlib.config import MergingConfig
from fluxlib.merging.budgets import check_enough
from fluxlib.merging.features import _greedy_match, from_gram, gram_of
from fluxlib.merging.slots import NOWHERE, Slots
from fluxlib.methods import fmes
from fluxlib.models import LlamaMoeConfig, LlamaMoeForCausalLM
from fluxlib.moe import compact, find

JOINT = MergingConfig(budgets="joint", weights="gate")
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 3}


def build(kind: str = "olmoe") -> nn.Module:
    if kind == "olmoe":
        config = OlmoeConfig(**SIZES, **SPECIAL, intermediate_size=12, num_experts=8, num_experts_per_tok=2)
        model: nn.Module = OlmoeForCausalLM(config)
    else:
        own = {"intermediate_size": 72, "num_experts": 6, "num_selects": 2, "size_experts": [[12] * 6] * 3}
        model = LlamaMoeForCausalLM(LlamaMoeConfig(**SIZES, **SPECIAL, **own))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def batch(lengths: tuple[int, ...] = (9, 5, 7)) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def points(counts: list[int], dim: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [merging.features(torch.randn(n, 40, generator=generator), dim) for n in counts]


# Budgets


def test_adaptive_budgets_by_hand() -> None:
    """Two layers, equal variance: depth factors 2 and 1, so two thirds and one third of the slots."""
    frequency = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4, 0.0, 0.0]])
    assert merging.layer_budgets(frequency, [0, 0], 6) == [4, 2]
    assert merging.layer_budgets(frequency, [0, 0], 5) == [3, 2]
    assert merging.layer_budgets(frequency, [0, 0], 6, kind="uniform") == [3, 3]
    assert merging.layer_budgets(frequency, [0, 6], 6, kind="single") == [1, 0]


def test_an_evenly_used_layer_gets_more() -> None:
    skewed, even = [0.6, 0.2, 0.1, 0.1, 0.0, 0.0], [0.2, 0.2, 0.2, 0.2, 0.1, 0.1]
    budgets = merging.layer_budgets(torch.tensor([skewed, even]), [0, 0], 6)
    assert budgets[1] > budgets[0] >= 1


@pytest.mark.parametrize("kind", ["adaptive", "uniform"])
@pytest.mark.parametrize("num_merged", [8, 20, 41, 90])
def test_budgets_are_spent_within_their_limits(kind: str, num_merged: int) -> None:
    generator = torch.Generator().manual_seed(num_merged)
    frequency = torch.rand(8, 16, generator=generator) ** torch.linspace(6, 0.1, 8)[:, None]
    num_tuned = torch.randint(0, 17, (8,), generator=generator)
    num_tuned[0], num_tuned[1] = 16, 15
    budgets = merging.layer_budgets(frequency, num_tuned, num_merged, kind)
    most = 16 - num_tuned
    assert sum(budgets) == min(num_merged, int(most.sum()))
    assert all(min(n, 1) <= b <= n for b, n in zip(budgets, most.tolist(), strict=True))


def test_budgets_follow_eq_1_to_within_one_slot() -> None:
    frequency = torch.rand(6, 64, generator=torch.Generator().manual_seed(0))
    rows = frequency / frequency.sum(dim=1, keepdim=True)
    weight = torch.arange(6, 0, -1) / rows.double().var(dim=1, correction=0)
    ideal = weight / weight.sum() * 100
    budgets = torch.tensor(merging.layer_budgets(frequency, [0] * 6, 100))
    assert ((budgets - ideal).abs() < 1).all()


def test_a_perfectly_even_layer_does_not_divide_by_zero() -> None:
    frequency = torch.tensor([[0.25] * 4, [0.7, 0.1, 0.1, 0.1]])
    assert merging.layer_budgets(frequency, [0, 0], 5) == [4, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_merged": 1}, "num_merged must be a whole number of at least 2, one slot for each layer"),
        ({"num_merged": 2.5}, "num_merged must be a whole number of at least 2, .* got 2.5"),
        ({"num_merged": math.nan}, "num_merged must be a whole number of at least 2, .* got nan"),
        ({"num_tuned": [0]}, "num_tuned must be 2 counts in 0..4"),
        ({"num_tuned": [0, 5]}, "num_tuned must be 2 counts in 0..4"),
        ({"kind": "greedy"}, "kind must be 'adaptive', 'uniform' or 'single', got 'greedy'"),
        ({"frequency": torch.tensor([[0.5, 0.5, 0, 0], [math.nan, 1, 0, 0]])}, r"layers \[1\]"),
    ],
)
def test_budgets_name_what_is_wrong(change: dict, message: str) -> None:
    arguments = {"frequency": torch.full((2, 4), 0.25), "num_tuned": [0, 0], "num_merged": 4} | change
    with pytest.raises(ValueError, match=message):
        merging.layer_budgets(**arguments)


# Features


def test_features_keep_the_angles_between_centred_experts() -> None:
    experts = torch.randn(7, 3, 20, generator=torch.Generator().manual_seed(0))
    flat = experts.flatten(1)
    centred = torch.nn.functional.normalize(flat - flat.mean(dim=0), dim=1)
    found = merging.features(experts, dim=10)
    assert found.shape == (7, 10)
    assert torch.allclose(found @ found.T, centred @ centred.T, atol=1e-5)
    assert torch.allclose(found.norm(dim=1), torch.ones(7))


def test_features_of_a_module_are_those_of_its_flattened_experts() -> None:
    experts = find.layers(build())[0].experts
    rows = [torch.cat([t.flatten() for t in find.expert_tensors(experts, e).values()]) for e in range(8)]
    found, expected = from_gram(gram_of(experts), 5), merging.features(torch.stack(rows), 5)
    assert torch.allclose(found @ found.T, expected @ expected.T, atol=1e-4)


def test_equal_experts_and_single_experts_have_no_features() -> None:
    assert (merging.features(torch.ones(4, 10)) == 0).all()
    assert (merging.features(torch.ones(1, 10)) == 0).all()
    with pytest.raises(ValueError, match="dim is -1, allowed is at least 1"):
        merging.features(torch.randn(4, 10), -1)


# Clusters


def test_clusters_of_a_hand_made_layer() -> None:
    """Three experts, two slots: the two that point the same way share one."""
    layer = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.98, 0.02]])
    for method in ("fused", "per_layer"):
        assert merging.cluster([layer], [2], method)[0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("method", ["fused", "per_layer"])
def test_every_cluster_has_members_and_lies_in_one_layer(method: str) -> None:
    counts, budgets = [8, 0, 5, 1, 16], [3, 0, 5, 1, 7]
    labels = merging.cluster(points(counts), budgets, method, seed=3)
    assert [len(found) for found in labels] == counts
    for found, budget in zip(labels, budgets, strict=True):
        assert sorted(set(found.tolist())) == list(range(budget))


@pytest.mark.parametrize("method", ["fused", "per_layer"])
def test_equal_experts_still_fill_all_clusters(method: str) -> None:
    labels = merging.cluster([torch.zeros(6, 4), torch.ones(5, 4)], [3, 5], method)
    assert sorted(set(labels[0].tolist())) == [0, 1, 2]
    assert labels[1].tolist() == [0, 1, 2, 3, 4]


def test_fused_finds_what_the_reference_finds_where_clusters_are_clear() -> None:
    generator = torch.Generator().manual_seed(0)
    clear, budgets = [], [3, 5, 2, 4]
    for budget in budgets:
        centres = torch.nn.functional.one_hot(torch.arange(budget), 8).float()
        own = torch.randint(0, budget, (12,), generator=generator)
        own[:budget] = torch.arange(budget)
        clear.append(centres[own] + 0.02 * torch.randn(12, 8, generator=generator))
    fused, reference = (merging.cluster(clear, budgets, method) for method in ("fused", "per_layer"))
    assert all(torch.equal(a, b) for a, b in zip(fused, reference, strict=True))


def test_fused_inertia_is_within_two_percent_of_the_reference() -> None:
    layers_ = points([16] * 12, dim=15)
    ratios = []
    for seed in range(5):
        fused = merging.inertia(layers_, merging.cluster(layers_, [4] * 12, seed=seed))
        reference = merging.inertia(layers_, merging.cluster(layers_, [4] * 12, "per_layer", seed=seed))
        ratios.append(fused / reference)
    assert sum(ratios) / 5 < 1.02


def test_layers_are_clustered_independently_of_their_neighbours_shape() -> None:
    """No similarity crosses layers: equal layers beside very different ones get a partition of their own."""
    one = points([9])[0]
    labels = merging.cluster([one, 100 * one, one + 5], [3, 3, 3], seed=1)
    for found in labels:
        assert merging.inertia([one], [found]) < merging.inertia([one], [torch.zeros(9, dtype=torch.long)])


def test_inertia_by_hand() -> None:
    layer = torch.tensor([[0.0], [2.0], [5.0]])
    assert merging.inertia([layer], [torch.tensor([0, 0, 1])]) == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [2]}, "one entry for each of 2 layers, got 1"),
        ({"budgets": [0, 2]}, r"budgets\[0\] must be in 1..4"),
        ({"budgets": [2, 5]}, r"budgets\[1\] must be in 1..4"),
        ({"method": "slow"}, "'fused' or 'per_layer', got 'slow'"),
        (
            {"features": [torch.zeros(4, 2), torch.tensor([[0.0, 1], [math.nan, 1], [0, 0], [0, 0]])]},
            "layer 1, expert 1",
        ),
    ],
)
def test_cluster_names_what_is_wrong(change: dict, message: str) -> None:
    arguments = {"features": [torch.zeros(4, 2)] * 2, "budgets": [2, 2]} | change
    with pytest.raises(ValueError, match=message):
        merging.cluster(**arguments)


# Budgets and clusters at once


def test_joint_clusters_by_hand() -> None:
    """Experts on a line: the close pair of layer 0 merges first, then that of layer 1; weights change the order."""
    near, far = torch.tensor([[0.0], [0.1], [5.0]]), torch.tensor([[0.0], [1.0], [9.0]])
    grams, ones = [near @ near.T, far @ far.T], [torch.ones(3), torch.ones(3)]
    heavy = [torch.tensor([1000.0, 1000.0, 1.0]), torch.tensor([0.1, 0.1, 1.0])]

    def found(weights: list[Tensor], num_slots: int) -> list[list[int]]:
        return [labels.tolist() for labels in merging.joint_clusters(grams, weights, num_slots)]

    assert found(ones, 6) == [[0, 1, 2], [0, 1, 2]]
    assert found(ones, 5) == [[0, 0, 1], [0, 1, 2]]
    assert found(ones, 4) == [[0, 0, 1], [0, 0, 1]]
    assert found(heavy, 5) == [[0, 1, 2], [0, 0, 1]]
    assert found(ones, 2) == [[0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="num_merged must be a whole number of at least 2"):
        found(ones, 1)


def test_joint_clusters_of_one_layer_are_wards() -> None:
    from scipy.cluster.hierarchy import fcluster, linkage

    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    expected = fcluster(linkage(x.numpy(), "ward"), 6, "maxclust").tolist()
    found = merging.joint_clusters([x @ x.T], [torch.ones(20)], 6)[0].tolist()
    assert len({*zip(expected, found, strict=True)}) == 6


def test_a_heavy_expert_counts_like_several_light_ones() -> None:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    copies = torch.tensor([3, 1, 1, 2, 1, 1, 1])
    repeated = x.repeat_interleave(copies, dim=0)
    weighted = merging.joint_clusters([x @ x.T], [copies.float()], 3)[0]
    plain = merging.joint_clusters([repeated @ repeated.T], [torch.ones(10)], 3)[0]
    assert torch.equal(weighted.repeat_interleave(copies), plain)


def test_joint_clusters_of_uneven_layers_spend_the_budget() -> None:
    generator = torch.Generator().manual_seed(2)
    experts = [torch.randn(n, 4, generator=generator) for n in (5, 0, 1, 12)]
    weights = [torch.rand(len(x), generator=generator) for x in experts]
    found = merging.joint_clusters([x @ x.T for x in experts], weights, 8)
    assert [len(labels) for labels in found] == [5, 0, 1, 12]
    assert sum(len(set(labels.tolist())) for labels in found) == 8


# Neurons


@pytest.mark.parametrize("kind", ["olmoe", "llama_moe"])
@pytest.mark.parametrize("exact", [True, False])
def test_matching_undoes_a_shuffle_of_neurons(kind: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(merging.match_neurons.__globals__, "MAX_EXACT_NEURONS", 12 if exact else 11)
    experts = find.layers(build(kind))[0].experts
    layout, anchor = find.read_layout(experts), find.expert_tensors(experts, 1)
    shuffle = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    shuffled = find.permute_neurons(anchor, shuffle, layout)
    order = merging.match_neurons(anchor, shuffled, layout)
    restored = find.permute_neurons(shuffled, order, layout)
    assert all(torch.equal(restored[name], anchor[name]) for name in anchor)


# Plans


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build()


@pytest.fixture(scope="module")
def profile(model: nn.Module) -> profiling.Profile:
    return profiling.profile(model, [batch()], bits=16)


def some(num_tuned: int = 6) -> Tensor:
    mask = torch.zeros(24, dtype=torch.bool)
    mask[torch.randperm(24, generator=torch.Generator().manual_seed(5))[:num_tuned]] = True
    return mask.view(3, 8)


def test_merge_weights_by_hand(profile: profiling.Profile) -> None:
    known = replace(
        profile, frequency=torch.tensor([[0.75, 0.25, 0.0]]), attention=torch.tensor([[0.1, 0.5, math.nan]])
    )
    assert merging.merge_weights(known)[0].tolist() == pytest.approx([0.075, 0.125, 0.0])
    assert merging.merge_weights(known, "frequency")[0].tolist() == [0.75, 0.25, 0.0]
    assert merging.merge_weights(known, "uniform")[0].tolist() == [1.0, 1.0, 1.0]
    gate = torch.tensor([[0.9, 0.1, 0.0]])
    assert merging.merge_weights(replace(known, gate=gate), "gate") is gate
    with pytest.raises(ValueError, match="weights must be one of"):
        merging.merge_weights(known, "loudest")


def test_plan_covers_every_expert_within_the_budget(model: nn.Module, profile: profiling.Profile) -> None:
    tuned = some()
    plans = merging.plan(model, profile, tuned, 9)
    assert sum(len(plan.groups) for plan in plans) == 9
    alpha = merging.merge_weights(profile)
    for layer, plan in enumerate(plans):
        plan.check(8)
        assert plan.tuned == tuple(tuned[layer].nonzero().flatten().tolist())
        for group, weights in zip(plan.groups, plan.weights or (), strict=True):
            assert weights == pytest.approx(alpha[layer, list(group)].tolist())


def test_a_plan_of_whatever_comes_covers_every_expert_or_is_refused(
    model: nn.Module, profile: profiling.Profile
) -> None:
    shares, any_float = st.sampled_from([0.0, 0.1, 0.5]), st.floats(width=32)
    values = st.lists(shares, min_size=24, max_size=24) | st.lists(shares | any_float, min_size=24, max_size=24)
    every = {name: st.sampled_from(get_args(field.annotation)) for name, field in MergingConfig.model_fields.items()
             if field.annotation is not bool}  # fmt: skip
    made = []

    @given(
        st.lists(st.booleans(), min_size=24, max_size=24), values,
        st.integers(-1, 30) | st.floats(-1, 30), st.builds(MergingConfig, **every, align_neurons=st.booleans()),
    )  # fmt: skip
    def case(flags: list[bool], numbers: list[float], num_merged: float, rules: MergingConfig) -> None:
        tuned, found = torch.tensor(flags).view(3, 8), torch.tensor(numbers).view(3, 8)
        try:
            plans = merging.plan(model, replace(profile, frequency=found, gate=found), tuned, num_merged, rules)  # type: ignore[arg-type]
        except ValueError:
            return
        made.append(plans)
        for row, plan in zip(tuned, plans, strict=True):
            plan.check(8)
            assert plan.tuned == tuple(row.nonzero().flatten().tolist())
        slots = sum(len(plan.groups) for plan in plans)
        single = int((~tuned).any(dim=1).sum())
        assert slots == (single if rules.budgets == "single" else min(num_merged, int((~tuned).sum())))

    case()
    assert made


def test_a_slot_for_every_expert_changes_nothing(model: nn.Module, profile: profiling.Profile) -> None:
    plans = merging.plan(model, profile, some(), 18)
    assert all(len(group) == 1 for plan in plans for group in plan.groups)
    assert merging.output_error(model, plans, [batch()]).max() < 1e-6
    assert merging.output_error(model, plans, [batch()], accumulated=True).max() < 1e-6


@pytest.mark.parametrize("align", [False, True])
def test_equal_experts_merge_to_themselves(align: bool) -> None:
    model = build()
    for layer in find.layers(model):
        for name in find.read_layout(layer.experts).names:
            stack = getattr(layer.experts, name).data
            stack[4:] = stack[:4]
    known = profiling.profile(model, [batch()], bits=16)
    plans = merging.plan(
        model, known, torch.zeros(3, 8, dtype=torch.bool), 12, MergingConfig(budgets="uniform", align_neurons=align)
    )
    assert [plan.groups for plan in plans] == [((0, 4), (1, 5), (2, 6), (3, 7))] * 3
    assert merging.output_error(model, plans, [batch()], accumulated=True).max() < 1e-5


def test_alignment_undoes_shuffled_neurons() -> None:
    """Pairs of equal experts whose neurons lie in another order: only alignment merges them without loss."""
    model = build()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    for layer in find.layers(model):
        for expert in range(4):
            own = find.expert_tensors(layer.experts, expert)
            find.write_expert(
                layer.experts, expert + 4, find.permute_neurons(own, order, find.read_layout(layer.experts))
            )
    groups = tuple((e, e + 4) for e in range(4))
    plain = [compact.LayerPlan(groups=groups)] * 3
    assert merging.output_error(model, plain, [batch()]).min() > 0.1
    aligned = [
        merging.align_neurons(layer, compact.LayerPlan(groups=groups, weights=((1.0, 1.0),) * 4))
        for layer in find.layers(model)
    ]
    assert merging.output_error(model, aligned, [batch()], accumulated=True).max() < 1e-5


def test_a_joint_plan_spends_the_budget_where_it_counts(model: nn.Module, profile: profiling.Profile) -> None:
    """A layer that one expert carries needs one slot, which that expert fills; the even layer gets the others."""
    gate = torch.full((3, 8), 1e-6)
    gate[0, 3] = gate[1, 5] = 1.0
    gate[2] = 1 / 8
    known, none = replace(profile, gate=gate), torch.zeros(3, 8, dtype=torch.bool)
    plans = merging.plan(model, known, none, 6, JOINT)
    assert [len(plan.groups) for plan in plans] == [1, 1, 4]
    merged = compact.merge(find.layers(model)[0].experts, plans[0], 0)["down_proj"]
    assert torch.allclose(merged, find.layers(model)[0].experts.down_proj[3], atol=1e-4)
    for plan in plans:
        plan.check(8)
    with pytest.raises(ValueError, match="num_merged must be a whole number of at least 3"):
        merging.plan(model, known, none, 2, JOINT)
    with pytest.raises(ValueError, match="'gate' needs a profile that measured"):
        merging.merge_weights(replace(profile, gate=torch.empty(0)), "gate")


def test_planning_leaves_the_model_alone(profile: profiling.Profile) -> None:
    model = build("olmoe")
    before = [tensor.clone() for tensor in model.state_dict().values()]
    plans = merging.plan(model, profile, some(), 7, MergingConfig(align_neurons=True))
    merging.output_error(model, plans, [batch()])
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_same_seed_same_plan(model: nn.Module, profile: profiling.Profile) -> None:
    assert merging.plan(model, profile, some(), 7, seed=4) == merging.plan(model, profile, some(), 7, seed=4)


def test_experts_never_used_are_merged_uniformly(model: nn.Module, profile: profiling.Profile) -> None:
    frequency = torch.zeros(3, 8)
    frequency[:, 0] = 1
    known = replace(profile, frequency=frequency)
    tuned = torch.zeros(3, 8, dtype=torch.bool)
    tuned[:, 0] = True
    plans = merging.plan(model, known, tuned, 3)
    assert [plan.weights for plan in plans] == [((0.0,) * 7,)] * 3
    merged = compact.merge(find.layers(model)[0].experts, plans[0], 0)["down_proj"]
    assert torch.allclose(merged, find.layers(model)[0].experts.down_proj[1:].mean(dim=0), atol=1e-6)


def test_merging_errs_less_than_discarding(model: nn.Module, profile: profiling.Profile) -> None:
    tuned = torch.zeros(3, 8, dtype=torch.bool)
    tuned[:, :3] = True
    merged = merging.output_error(model, merging.plan(model, profile, tuned, 9), [batch()])
    dropped = merging.output_error(model, fmes.make_plans(model, profile.frequency, tuned), [batch()])
    assert (merged < dropped).all()


def test_output_error_by_hand() -> None:
    """Halving every expert halves the output: the error of a layer is one half, whatever its inputs."""
    model = build()
    halved = [compact.LayerPlan(tuned=tuple(range(8)))] * 3
    before = compact.CompactExperts.forward
    try:
        compact.CompactExperts.forward = lambda self, *a: 0.5 * before(self, *a)  # type: ignore[method-assign]
        error = merging.output_error(model, halved, [batch()])
    finally:
        compact.CompactExperts.forward = before  # type: ignore[method-assign]
    assert error.tolist() == pytest.approx([0.5] * 3, abs=1e-5)


def test_plan_names_what_is_wrong(model: nn.Module, profile: profiling.Profile) -> None:
    with pytest.raises(ValueError, match="profile is of another model"):
        merging.plan(build("llama_moe"), profile, torch.zeros(3, 6, dtype=torch.bool), 6)
    with pytest.raises(ValueError, match=r"tuned must be \(3, 8\), got \(2, 8\)"):
        merging.plan(model, profile, torch.zeros(2, 8, dtype=torch.bool), 6)
    with pytest.raises(ValueError, match="num_merged must be a whole number of at least 3"):
        merging.plan(model, profile, torch.zeros(3, 8, dtype=torch.bool), 2)
    empty = batch()
    empty["attention_mask"] = torch.zeros_like(empty["attention_mask"])
    plans = merging.plan(model, profile, some(), 7)
    with pytest.raises(ValueError, match="padding only"):
        merging.output_error(model, plans, [empty])


def test_an_error_grows_from_the_layer_that_was_merged(model: nn.Module, profile: profiling.Profile) -> None:
    plans = merging.plan(model, profile, torch.zeros(3, 8, dtype=torch.bool), 6)
    found = merging.growth(model, plans, [batch()])
    assert found.shape == (3, 3)
    assert found.tril(-1).abs().max() < 1e-5
    assert (found.diagonal() > 0).all()


def test_shares_of_a_slot_add_up_to_one(model: nn.Module, profile: profiling.Profile) -> None:
    for plan in merging.plan(model, profile, torch.zeros(3, 8, dtype=torch.bool), 7):
        for group in range(len(plan.groups)):
            assert sum(plan.shares(group)) == pytest.approx(1.0)
    assert compact.LayerPlan(groups=((0, 1),), weights=((0.0, 0.0),)).shares(0) == (0.5, 0.5)
    assert compact.LayerPlan(groups=((0, 1),)).shares(0) == (0.5, 0.5)


def test_merging_holds_one_layer_at_a_time(
    model: nn.Module, profile: profiling.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged tensors that wait to be stacked never exceed the slots of one layer."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, merge = [0], compact.merge

    def counted(*args: object) -> dict[str, Tensor]:
        made = merge(*args)  # type: ignore[arg-type]
        alive.add(made["down_proj"])
        most[0] = max(most[0], len(alive))
        return made

    monkeypatch.setattr(compact, "merge", counted)
    plans = merging.plan(model, profile, torch.zeros(3, 8, dtype=torch.bool), 9, MergingConfig(budgets="uniform"))
    compact.restore(compact.customize(model, plans), write=False)
    assert most[0] <= 3


def test_joint_cost_is_wards_for_experts_that_count_little() -> None:
    # Cost of a pair: squared distance times q q' / (q + q'), so 0.5 for the first two and 0.6 for the last two.
    x = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    found = merging.joint_clusters([x @ x.T], [torch.tensor([1.0, 1.0, 0.3, 0.3])], 3)
    assert found[0].tolist() == [0, 0, 1, 2]


def test_a_layer_with_a_single_expert_to_merge_needs_a_slot_too() -> None:
    check_enough(np.array([1, 3, 0]), 2)
    with pytest.raises(ValueError, match="at least 2"):
        check_enough(np.array([1, 3, 0]), 1)


def test_a_neuron_whose_match_is_taken_gets_another() -> None:
    assert _greedy_match(np.array([[3.0, 2.0], [2.9, 0.0]])).tolist() == [0, 1]


# Slots that stay


def kept(model: nn.Module, profile: profiling.Profile) -> Slots:
    return merging.merge_slots(model, profile, some(), 9, JOINT, 0, number=3)


def test_slots_made_anew_are_what_the_plan_merges(model: nn.Module, profile: profiling.Profile) -> None:
    tuned, slots = some(), kept(model, profile)
    plans = merging.plan(model, profile, tuned, 9, JOINT)
    nobody = torch.zeros_like(tuned)
    again, stacks = merging.plans_of(slots, tuned, nobody)
    assert [(p.tuned, sorted(p.groups)) for p in again] == [(p.tuned, sorted(p.groups)) for p in plans]
    for layer, (plan, ready_stacks) in enumerate(zip(again, stacks, strict=True)):
        experts = find.layers(model)[layer].experts
        made = compact.CompactExperts(experts, plan).merged_stacks()
        ready = compact.CompactExperts(experts, plan, merged=ready_stacks).merged_stacks()
        assert all(torch.equal(made[name], ready[name]) for name in made)
    assert slots.made == 3
    assert (slots.place[tuned] == NOWHERE).all()


def test_an_expert_leaves_its_slot_and_comes_back(model: nn.Module, profile: profiling.Profile) -> None:
    tuned, slots = some(), kept(model, profile)
    layer, expert = (~tuned).nonzero()[0].tolist()
    number = int(slots.place[layer, expert])
    away, watched = tuned.clone(), torch.zeros_like(tuned)
    away[layer, expert] = True
    for of_tuned, alone in ((away, watched), (tuned, away & ~tuned)):
        plans, stacks = merging.plans_of(slots, of_tuned, alone)
        assert all(sorted(plan.experts) == list(range(8)) for plan in plans)
        of_layer = slots.place[layer][slots.place[layer] != NOWHERE].unique().tolist()
        used = [n for n in of_layer if n != number or int((slots.place[layer] == number).sum()) > 1]
        assert torch.equal(stacks[layer]["down_proj"], slots.stacks["down_proj"][used])
        assert len(plans[layer].groups) == len(used) + int(alone.sum())


def test_an_expert_joins_the_nearest_slot_by_its_weight(model: nn.Module) -> None:
    experts = find.layers(model)[0].experts
    own = {name: find.expert_tensors(experts, 7)[name] for name in ("gate_up_proj", "down_proj")}
    stacks = {name: torch.stack([tensor + 4.0, tensor - 1.0]) for name, tensor in own.items()}
    place = torch.full((3, 8), NOWHERE)
    place[0, :7] = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    weight = torch.full((3, 8), 0.5)
    slots = Slots(1, place, weight, torch.tensor([2.0, 1.5]), stacks)
    nobody = torch.zeros(3, 8, dtype=torch.bool)
    joining = nobody.clone()
    joining[0, 7] = True
    found = merging.join(slots, model, joining)
    assert found.place[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert found.total.tolist() == [2.0, 2.0]
    for name, tensor in own.items():
        torch.testing.assert_close(found.stacks[name][1], tensor - 0.75)
        assert torch.equal(found.stacks[name][0], stacks[name][0])
    assert slots.place[0, 7] == NOWHERE
    assert merging.can_stay(slots, nobody | (torch.arange(3) > 0)[:, None])
    assert not merging.can_stay(slots, nobody), "layers without a slot have experts to put somewhere"
