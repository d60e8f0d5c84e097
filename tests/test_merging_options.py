"""Merging beyond the paper: budgets by measured error, similarity by outputs, slots kept from the round before."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from fluxlib import merging, profiling
from fluxlib.config import make_config
from fluxlib.methods import flux
from fluxlib.methods.base import Budget, Roles
from fluxlib.moe import compact, find
from fluxlib.moe.compact import LayerPlan

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 3}
NONE = torch.zeros(3, 8, dtype=torch.bool)


def build() -> nn.Module:
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES, **SPECIAL, num_experts=8, num_experts_per_tok=2))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def batch(lengths: tuple[int, ...] = (9, 5, 7)) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def padding() -> dict[str, Tensor]:
    return batch() | {"attention_mask": torch.zeros(3, 9, dtype=torch.long)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build()


@pytest.fixture(scope="module")
def profile(model: nn.Module) -> profiling.Profile:
    return profiling.profile(model, [batch()], bits=16)


# Similarity by outputs


def test_output_grams_are_scalar_products_of_outputs(model: nn.Module) -> None:
    """By hand: each expert on the layer's own tokens, padding left out."""
    grams = merging.output_grams(model, [batch()])
    kept: list[Tensor] = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    with torch.no_grad():
        model(**batch())
    handle.remove()
    tokens = kept[0][batch()["attention_mask"].bool().flatten()]
    one = torch.ones(len(tokens), 1)
    with torch.no_grad():
        outputs = [experts(tokens, torch.full((len(tokens), 1), e), one).flatten() for e in range(8)]
    assert [gram.shape for gram in grams] == [(8, 8)] * 3
    assert float(grams[0][2, 5]) == pytest.approx(float(outputs[2] @ outputs[5]), rel=1e-4)
    with pytest.raises(ValueError, match="batches must hold at least one token"):
        merging.output_grams(model, [padding()])
    with pytest.raises(ValueError, match="batches must hold at least one token"):
        merging.output_grams(model, [])


def test_experts_that_answer_alike_share_a_slot(profile: profiling.Profile) -> None:
    """The same neurons in another order: other weights, the same outputs."""
    model = build()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    for layer in find.layers(model):
        layout = find.read_layout(layer.experts)
        for expert in range(4):
            own = find.permute_neurons(find.expert_tensors(layer.experts, expert), order, layout)
            find.write_expert(layer.experts, expert + 4, own)
    grams = merging.output_grams(model, [batch()], max_tokens=10)
    plans = merging.plan(model, profile, NONE, 12, kind="uniform", grams=grams, align=True)
    assert [plan.groups for plan in plans] == [((0, 4), (1, 5), (2, 6), (3, 7))] * 3
    assert merging.output_error(model, plans, [batch()], accumulated=True).max() < 1e-5


# Budgets by measured error


def test_budgets_follow_the_curves_by_hand() -> None:
    """Layer 0 gains 6, 1, 1 from its next slots, layer 1 gains 4 and 2, layer 2 has nothing to merge."""
    curves = [{1: 8.0, 2: 2.0, 4: 0.0}, {1: 6.0, 2: 2.0, 3: 0.0}, {}]
    assert merging.budgets_by_error(curves, 2) == [1, 1, 0]
    assert merging.budgets_by_error(curves, 3) == [2, 1, 0]
    assert merging.budgets_by_error(curves, 4) == [2, 2, 0]
    assert merging.budgets_by_error(curves, 5) == [2, 3, 0]
    assert merging.budgets_by_error(curves, 99) == [4, 3, 0]
    with pytest.raises(ValueError, match="num_merged must be at least 2"):
        merging.budgets_by_error(curves, 1)


def test_a_curve_that_dips_late_is_taken_at_its_hull() -> None:
    """The second slot alone saves nothing, the third a lot: together they are worth 3 each."""
    assert merging.budgets_by_error([{1: 6.0, 2: 6.0, 3: 0.0}, {1: 2.0, 2: 0.0}], 4) == [3, 1]


def test_error_curves_fall_to_nothing(model: nn.Module, profile: profiling.Profile) -> None:
    tuned = NONE.clone()
    tuned[0] = True
    tuned[1, :5] = True
    curves = merging.error_curves(model, profile, tuned, [batch()])
    assert [sorted(curve) for curve in curves] == [[], [1, 2, 3], [1, 2, 4, 8]]
    assert curves[1][3] == curves[2][8] == 0.0
    assert curves[2][1] > curves[2][8]
    budgets = merging.budgets_by_error(curves, 7)
    plans = merging.plan(model, profile, tuned, 7, budgets=budgets)
    assert [len(plan.groups) for plan in plans] == budgets
    with pytest.raises(ValueError, match="padding only"):
        merging.error_curves(model, profile, tuned, [padding()])


def test_an_error_grows_from_the_layer_that_was_merged(model: nn.Module, profile: profiling.Profile) -> None:
    plans = merging.plan(model, profile, NONE, 6)
    found = merging.growth(model, plans, [batch()])
    assert found.shape == (3, 3)
    assert found.tril(-1).abs().max() < 1e-5
    assert (found.diagonal() > 0).all()
    alone = merging.one_layer(plans, 1)
    assert alone[1] is plans[1]
    assert [plan.tuned for plan in (alone[0], alone[2])] == [tuple(range(8))] * 2


# Shares, streaming, reuse


def test_shares_of_a_slot_add_up_to_one(model: nn.Module, profile: profiling.Profile) -> None:
    for plan in merging.plan(model, profile, NONE, 7):
        for group in range(len(plan.groups)):
            assert sum(plan.shares(group)) == pytest.approx(1.0)
    assert LayerPlan(groups=((0, 1),), weights=((0.0, 0.0),)).shares(0) == (0.5, 0.5)
    assert LayerPlan(groups=((0, 1),)).shares(0) == (0.5, 0.5)


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
    plans = merging.plan(model, profile, NONE, 9, kind="uniform")
    compact.restore(compact.customize(model, plans), write=False)
    assert most[0] <= 3


def test_slots_without_a_changed_member_are_reused(profile: profiling.Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    plans = merging.plan(model, profile, NONE, 9, kind="uniform")
    compact.customize(model, plans)
    before = merging.compact_layers(model)
    compact.restore(model, write=False)
    changed = NONE.clone()
    changed[1, plans[1].groups[0][0]] = True
    model.model.layers[1].mlp.experts.down_proj.data[plans[1].groups[0][0]] += 1.0
    known = merging.reusable_slots(before, plans, changed)
    assert [sorted(slots) for slots in known] == [[0, 1, 2], [1, 2], [0, 1, 2]]

    merged, merge = [], compact.merge
    monkeypatch.setattr(compact, "merge", lambda *args: merged.append(args[2]) or merge(*args))
    compact.customize(model, plans, known=known)
    reused = [{n: t.clone() for n, t in layer.merged_stacks().items()} for layer in merging.compact_layers(model)]
    compact.restore(model, write=False)
    assert merged == [0]
    compact.customize(model, plans)
    for kept, fresh in zip(reused, merging.compact_layers(model), strict=True):
        assert all(torch.equal(kept[name], stack) for name, stack in fresh.merged_stacks().items())
    compact.restore(model, write=False)


def test_slots_of_other_shares_are_reused_within_a_tolerance() -> None:
    model = build()
    old = [LayerPlan(groups=((0, 1), tuple(range(2, 8))), weights=((0.5, 0.5), (1.0,) * 6))] * 3
    new = [LayerPlan(groups=((0, 1), tuple(range(2, 8))), weights=((0.51, 0.49), (1.0,) * 6))] * 3
    compact.customize(model, old)
    before = merging.compact_layers(model)
    compact.restore(model, write=False)
    assert [sorted(s) for s in merging.reusable_slots(before, new, NONE)] == [[1]] * 3
    assert [sorted(s) for s in merging.reusable_slots(before, new, NONE, tolerance=0.02)] == [[0, 1]] * 3
    regrouped = [LayerPlan(groups=((0, 2), (1, 3, 4, 5, 6, 7)))] * 3
    assert merging.reusable_slots(before, regrouped, NONE) == [{}] * 3
    orders = ((None, torch.arange(12)), (None,) * 6)
    assert 0 not in merging.reusable_slots(before, [replace(old[0], permutations=orders)] * 3, NONE)[0]
    with pytest.raises(ValueError, match="tolerance must be at least 0, got -1"):
        merging.reusable_slots(before, new, NONE, tolerance=-1)
    with pytest.raises(ValueError, match="one entry per layer, got 3, 1, 3"):
        merging.reusable_slots(before, new[:1], NONE)


def test_a_run_can_ask_for_joint_budgets_and_gate_weights(model: nn.Module, profile: profiling.Profile) -> None:
    config = make_config({"merging.budgets": "joint", "merging.weights": "gate"})
    exploit = NONE.clone()
    exploit[:, 0] = True
    plans = flux.make_plans(model, profile, Roles(exploit, NONE), Budget(3, 7), config)
    assert sum(len(plan.groups) for plan in plans) == 7
    assert plans[0].weights is not None
    assert plans[0].weights[0] == pytest.approx(profile.gate[0, list(plans[0].groups[0])].tolist())


def test_given_grams_are_checked(model: nn.Module, profile: profiling.Profile) -> None:
    grams = [torch.eye(8), torch.eye(8), torch.eye(8)]
    grams[1][3, 3] = math.nan
    with pytest.raises(ValueError, match=r"layer 1 .*\[3\] hold NaN"):
        merging.plan(model, profile, NONE, 6, grams=grams)
