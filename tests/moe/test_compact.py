"""Compact experts against the model they stand in for, and against a plain float64 reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fluxlib.moe import compact, find, product
from fluxlib.moe.compact import CompactExperts, LayerPlan
from fluxlib.moe.replace import replace


def _alone(num_experts: int) -> LayerPlan:
    return LayerPlan(tuple(range(0, num_experts, 2)), tuple((e,) for e in range(1, num_experts, 2)))


def _plans(model: nn.Module) -> list[LayerPlan]:
    """A different number of tuned and merged slots in every layer."""
    plans = []
    for layer in find.layers(model):
        experts = list(range(layer.num_experts))
        cut = 1 + layer.index
        weights = ((3.0, 1.0), tuple(float(e) for e in range(len(experts) - cut - 2)))
        plans.append(
            LayerPlan(tuple(experts[:cut]), (tuple(experts[cut : cut + 2]), tuple(experts[cut + 2 :])), weights)
        )
    return plans


def _compare(model: nn.Module, plans: list[LayerPlan], batch: dict[str, Tensor], plain: type[nn.Module]) -> None:
    """Loss, logits and gradients of a customised float64 model equal the reference's."""
    found = find.layers(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embedding = model.get_input_embeddings().weight.requires_grad_()
    references = [plain(layer.experts, plan) for layer, plan in zip(found, plans, strict=True)]
    for layer, reference in zip(found, references, strict=True):
        replace(model, layer, reference)
    expected = model(**batch)
    expected.loss.backward()
    expected_embedding, embedding.grad = embedding.grad, None
    for layer in found:
        replace(model, layer, layer.experts)
    compact.customize(model, plans)
    embedding.requires_grad_()
    output = model(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(embedding.grad, expected_embedding, rtol=1e-8, atol=1e-11)
    for layer, plan, reference in zip(find.layers(model), plans, references, strict=True):
        for slot, expert in enumerate(plan.tuned):
            for name, gradient in layer.experts.grads(expert).items():
                torch.testing.assert_close(gradient, reference.slots[slot][name].grad, rtol=1e-8, atol=1e-12)


def test_a_slot_for_every_expert_is_the_same_model(tiny: SimpleNamespace, architecture: str) -> None:
    model, batch = tiny.build(architecture, torch.float64), tiny.batch()
    expected = model(**batch).logits
    compact.customize(model, [_alone(layer.num_experts) for layer in find.layers(model)])
    assert all(isinstance(layer.experts, CompactExperts) for layer in find.layers(model))
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-11, atol=1e-11)
    compact.restore(model)
    assert torch.equal(model(**batch).logits, expected)


def test_output_and_gradients_equal_the_reference(tiny: SimpleNamespace, architecture: str) -> None:
    model = tiny.build(architecture, torch.float64)
    _compare(model, _plans(model), tiny.batch(), tiny.PlainExperts)


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_short_batch_of_one(tiny: SimpleNamespace, tokens: int) -> None:
    model = tiny.build("olmoe", torch.float64)
    batch = tiny.batch(2, rows=1)
    batch = {name: value[:, :tokens] for name, value in batch.items()}
    if tokens == 1:
        batch["labels"] = batch["input_ids"]
    model.loss_function = lambda logits, labels, vocab_size, **_: nn.functional.cross_entropy(logits[0], labels[0])
    _compare(model, _plans(model), batch, tiny.PlainExperts)


def test_every_token_on_one_expert_and_others_empty(tiny: SimpleNamespace) -> None:
    original = find.layers(tiny.build("olmoe", torch.float64))[0].experts
    plan = LayerPlan((0, 1), ((2, 3), (4, 5, 6, 7)))
    hidden = torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for index in ([0], [2], [0, 4, 5], [2, 3, 4]):
        choice = torch.tensor([index] * 9)
        weights = torch.rand(choice.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        weights.requires_grad_()
        module, reference = CompactExperts(original, plan), tiny.PlainExperts(original, plan)
        results = []
        for experts in (module, reference):
            output = experts(hidden, choice, weights)
            results.append((output, *torch.autograd.grad(output.square().sum(), (hidden, weights))))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_slot_shared_by_two_choices_is_computed_once(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    original = find.layers(tiny.build("olmoe"))[0].experts
    module = CompactExperts(original, LayerPlan((0,), ((1, 2, 3), (4, 5, 6, 7))))
    module.method = "slots"
    rows: list[int] = []
    forward = module.activation.forward
    monkeypatch.setattr(module.activation, "forward", lambda x: rows.append(len(x)) or forward(x))
    hidden = torch.randn(5, 16)
    index = torch.tensor([[1, 2, 4]] * 5)
    output = module(hidden, index, torch.tensor([[0.25, 0.5, 0.25]] * 5))
    assert rows == [5, 5]
    same = module(hidden, torch.tensor([[3, 7]] * 5), torch.tensor([[0.75, 0.25]] * 5))
    torch.testing.assert_close(output, same)


def test_training_changes_tuned_slots_only(tiny: SimpleNamespace, architecture: str) -> None:
    model, batch = tiny.build(architecture), tiny.batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    plans = _plans(model)
    compact.customize(model, plans)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.1)
    model(**batch).loss.backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    optimizer.step()
    compact.restore(model)
    assert len(optimizer.state) == len(trainable)
    for layer, plan in zip(find.layers(model), plans, strict=True):
        for name in find.read_layout(layer.experts).names:
            old, new = before.pop(f"{layer.name}.{name}"), getattr(layer.experts, name)
            changed = [e for e in range(layer.num_experts) if not torch.equal(old[e], new[e])]
            assert changed == list(plan.tuned), name
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [p.requires_grad for p in model.parameters()] == flags


def test_merged_slots_do_no_weight_gradient_work(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxlib.moe import dispatch

    model, batch = tiny.build("mixtral"), tiny.batch()
    calls: list[int] = []
    original = dispatch.Run.gradients
    monkeypatch.setattr(dispatch.Run, "gradients", lambda *a: calls.append(1) or original(*a))
    compact.customize(model, [LayerPlan((0,), ((1, 2, 3, 4, 5),))] * 2)
    for layer in find.layers(model):
        layer.experts.method = "slots"
    model(**batch).loss.backward()
    assert len(calls) == 2


def test_sixteen_bit_model_with_float32_tuned_slots(tiny: SimpleNamespace) -> None:
    batch, logits = tiny.batch(), []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.build("qwen3_moe").to(dtype)
        compact.customize(model, _plans(model), dtype=torch.float32)
        output = model(**batch)
        output.loss.backward()
        logits.append(output.logits.float())
        experts = find.layers(model)[0].experts
        assert experts.tuned_down_proj.dtype == experts.tuned_down_proj.grad.dtype == torch.float32
        assert experts.merged_down_proj.dtype == dtype
        compact.restore(model)
    assert (logits[1] - logits[0]).norm() < 0.03 * logits[0].norm()


def test_checkpointing_gives_the_same_gradients(tiny: SimpleNamespace) -> None:
    batch, gradients = tiny.batch(), []
    for checkpointing in (False, True):
        model = tiny.build("olmoe", torch.float64).train()
        compact.customize(model, _plans(model))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_generation_with_cache_equals_generation_without(tiny: SimpleNamespace, architecture: str) -> None:
    model = tiny.build(architecture)
    compact.customize(model, _plans(model))
    prompt = {name: tiny.batch(6, rows=1)[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(**prompt, **settings, use_cache=True), model.generate(**prompt, **settings, use_cache=False)
    )


def test_no_grad_keeps_nothing(tiny: SimpleNamespace) -> None:
    model, batch = tiny.build("mixtral"), tiny.batch()
    compact.customize(model, _plans(model))
    with torch.no_grad():
        output = model(**batch).logits
    assert not output.requires_grad
    torch.testing.assert_close(output, model(**batch).logits)


def test_merging_is_a_weighted_sum_with_aligned_neurons(tiny: SimpleNamespace) -> None:
    experts = find.layers(tiny.build("mixtral"))[0].experts
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    aligned = LayerPlan((), ((0, 1), (2, 3, 4, 5)), ((1.0, 3.0), (0.0,) * 4), ((None, order), (None,) * 4))
    first, second = (compact.expert_tensors(experts, e) for e in (0, 1))
    moved = find.permute_neurons(second, order, find.read_layout(experts))
    merged = compact.merge(experts, aligned, 0)
    for name in first:
        torch.testing.assert_close(merged[name], 0.25 * first[name] + 0.75 * moved[name])
    uniform = torch.stack([compact.expert_tensors(experts, e)["down_proj"] for e in (2, 3, 4, 5)]).mean(0)
    torch.testing.assert_close(compact.merge(experts, aligned, 1)["down_proj"], uniform)


def test_restore_can_leave_the_originals_as_they_were(tiny: SimpleNamespace) -> None:
    model = tiny.build("mixtral")
    before = model.state_dict()["model.layers.0.mlp.experts.down_proj"].clone()
    compact.customize(model, _plans(model))
    experts = find.layers(model)[0].experts
    experts.tuned_down_proj.data.zero_()
    assert compact.expert_tensors(experts, 0)["down_proj"].abs().sum() == 0
    compact.restore(model, write=False)
    assert torch.equal(model.state_dict()["model.layers.0.mlp.experts.down_proj"], before)


def test_plans_name_what_is_wrong(tiny: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"disjoint; experts \[1\]"):
        LayerPlan((0, 1), ((1, 2),))
    with pytest.raises(ValueError, match="empty"):
        LayerPlan((0,), ((),))
    with pytest.raises(ValueError, match=r"weights: expected one per member, sizes \[2\], got \[1\]"):
        LayerPlan((0,), ((1, 2),), ((1.0,),))
    with pytest.raises(ValueError, match="not negative"):
        LayerPlan((0,), ((1, 2),), ((1.0, -1.0),))
    with pytest.raises(ValueError, match=r"left out \[3\], not in this layer \[9\]"):
        LayerPlan((0, 1), ((2, 9),)).check(4)
    for fields in ({"tuned": (0.0,)}, {"groups": ((1, 2.5),)}, {"groups": (1, 2)}, {"dropped": 3}):
        with pytest.raises(ValueError, match=r"(tuned|groups|dropped): expected whole numbers of experts, got"):
            LayerPlan(**fields)
    model = tiny.build("mixtral")
    with pytest.raises(ValueError, match="one per MoE layer, 2, got 1"):
        compact.customize(model, [_alone(6)])
    with pytest.raises(ValueError, match="plans: expected a list of LayerPlan, one per MoE layer, got LayerPlan"):
        compact.customize(model, _alone(6))
    with pytest.raises(ValueError, match=r"plans: expected a list of LayerPlan.*\['LayerPlan', 'NoneType'\]"):
        compact.customize(model, [_alone(6), None])
    with pytest.raises(ValueError, match=r"plans\[1\]: .* left out \[4, 5\]"):
        compact.customize(model, [_alone(6), _alone(4)])
    compact.customize(model, [_alone(6)] * 2)
    with pytest.raises(ValueError, match="restore"):
        compact.customize(model, [_alone(6)] * 2)


def test_frozen_layers_are_hastened_routers_are_not_and_all_come_back(tiny: SimpleNamespace, architecture: str) -> None:
    model = tiny.build(architecture)
    before = {name: type(module) for name, module in model.named_modules()}
    found = find.layers(model)
    compact.customize(model, _plans(model))
    assert any(isinstance(module, product.FrozenLinear) for module in model.modules())
    for layer in found:
        for module in layer.block.modules():
            if isinstance(module, product.FrozenLinear):
                assert module.out_features > layer.num_experts
    compact.restore(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_the_other_library_changes_no_number(
    tiny: SimpleNamespace, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a model writes into what a linear layer returned (Llama-4)."""
    model, batch = tiny.build(architecture), tiny.batch()
    compact.customize(model, _plans(model))
    made = []
    for smallest in (product.SMALLEST, 1):
        monkeypatch.setattr(product, "SMALLEST", smallest)
        monkeypatch.setattr(product, "SMALLEST_LINEAR", smallest)
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        made.append([output.logits, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for ours, plain in zip(made[1], made[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_weights_are_shares_and_numbers_of_any_kind_are_numbers() -> None:
    with pytest.raises(ValueError, match="expected finite numbers"):
        LayerPlan((), ((0, 1, 2),), ((1e308, 1e308, 0.0),))
    assert LayerPlan((), ((0, 1),), ((1.0, 3.0),)).shares(0) == (0.25, 0.75)
    plan = LayerPlan(torch.tensor([2, 0]), ([torch.tensor(1), 3],))
    assert plan == LayerPlan((2, 0), ((1, 3),))
    assert all(type(expert) is int for expert in plan.experts)
