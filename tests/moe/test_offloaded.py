"""Offloaded experts compute what resident ones do, and account for what they move."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fluxlib.moe import compact, find, offloaded
from fluxlib.moe.adapter import Adapter
from fluxlib.moe.compact import LayerPlan
from fluxlib.moe.offloaded import DeviceSet, OffloadedExperts

EXPERT_BYTES = 3 * 16 * 12 * 4
CPU = torch.device("cpu")


def _all_tuned(model: nn.Module) -> list[LayerPlan]:
    return [LayerPlan(tuple(range(layer.num_experts))) for layer in find.layers(model)]


def test_training_equals_the_resident_model_bit_by_bit(tiny: SimpleNamespace, architecture: str) -> None:
    resident, model = tiny.build(architecture), tiny.build(architecture)
    compact.customize(resident, _all_tuned(resident))
    for layer in find.layers(resident):
        layer.experts.method = "slots"
    device_set = offloaded.offload(model, capacity=3)
    for step in range(2):
        batch, losses = tiny.batch(seed=step), []
        for each in (resident, model):
            optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
            optimizer.zero_grad()
            losses.append(each(**batch).loss)
            losses[-1].backward()
            optimizer.step()
        assert torch.equal(*losses)
        for ours, theirs in zip(find.layers(model), find.layers(resident), strict=True):
            for expert in range(ours.num_experts):
                for name, gradient in theirs.experts.grads(expert).items():
                    found = ours.experts.parameters_of(expert)[name].grad
                    assert torch.equal(torch.zeros_like(gradient) if found is None else found, gradient)
    assert device_set.traffic.misses > 0
    compact.restore(resident)
    compact.restore(model)
    for (name, ours), theirs in zip(model.state_dict().items(), resident.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def _trained(model: nn.Module, step: Callable[[], None], batch: dict) -> dict[str, torch.Tensor]:
    for _ in range(3):
        model(**batch).loss.backward()
        step()
    compact.restore(model)
    return model.state_dict()


def test_adapters_learn_what_those_of_resident_experts_do_and_nothing_travels_back(
    tiny: SimpleNamespace, architecture: str
) -> None:
    adapter = Adapter(rank=4, alpha=8.0, seed=3)
    resident, model = tiny.build(architecture), tiny.build(architecture)
    compact.customize(resident, _all_tuned(resident), None, adapter)
    for layer in find.layers(resident):
        layer.experts.method = "slots"
    traffic = offloaded.offload(model, capacity=3, adapter=adapter).traffic
    for step in range(2):
        for each in (resident, model):
            learned = [parameter for parameter in each.parameters() if parameter.requires_grad]
            optimizer = torch.optim.SGD(learned, lr=0.1)
            optimizer.zero_grad()
            each(**tiny.batch(seed=step)).loss.backward()
            optimizer.step()
        for ours, theirs in zip(find.layers(model), find.layers(resident), strict=True):
            assert ours.experts.lora.keys() == theirs.experts.lora.keys()
            for name, up in theirs.experts.lora.items():
                assert up.any() and torch.equal(ours.experts.lora[name], up)
    assert traffic.to_device_bytes > 0 == traffic.to_host_bytes
    compact.restore(resident)
    compact.restore(model)
    for (name, ours), theirs in zip(model.state_dict().items(), resident.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_both_forms_and_the_pipeline_train_the_same(tiny: SimpleNamespace) -> None:
    """One optimizer after the backward pass, or one per layer behind it: bit for bit, in either form."""
    states = []
    for offloading, pipelined in product(("on_demand", "overlapped"), (False, True)):
        model = tiny.build("olmoe")
        make = partial(torch.optim.AdamW, lr=0.01)
        there = offloaded.offload(model, 3, offloading, make if pipelined else None)
        plain = None if pipelined else make(p for p in model.parameters() if p.requires_grad)

        def step(plain: torch.optim.Optimizer | None = plain) -> None:
            if plain is not None:
                plain.step()
                plain.zero_grad()

        states.append(_trained(model, step, tiny.batch(seed=0)))
        assert there.traffic.misses > 0
    for state in states[1:]:
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())


def test_on_demand_copies_nothing_ahead_and_overlapping_copies_the_next_layers_first(tiny: SimpleNamespace) -> None:
    hidden, weights, chosen = torch.randn(2, 16), torch.ones(2, 2), torch.tensor([[0, 1]] * 2)
    ahead = {}
    for offloading in ("on_demand", "overlapped"):
        model = tiny.build("olmoe")
        there = offloaded.offload(model, 2, offloading)
        first, second = (layer.experts for layer in find.layers(model))
        with torch.no_grad():
            for _ in range(2):
                first(hidden, chosen, weights)
                second(hidden, chosen, weights)
            first(hidden, chosen, weights)
        ahead[offloading] = [key for key, entry in there._entries.items() if entry.is_ahead]
        assert there.traffic.hits == 0
    assert ahead == {"on_demand": [], "overlapped": [(1, 0)]}


def test_what_is_computed_with_crosses_the_bus(tiny: SimpleNamespace) -> None:
    """Master weights of 32 bit, products in 16: half the bytes both ways, and a copy that follows the masters."""
    model = tiny.build("olmoe")
    there = offloaded.offload(model, capacity=2)
    experts = find.layers(model)[0].experts.to(torch.bfloat16)
    hidden, chosen = torch.randn(2, 16, dtype=torch.bfloat16), torch.tensor([[1]] * 2)
    experts(hidden, chosen, torch.ones(2, 1)).sum().backward()
    assert (there.traffic.to_device_bytes, there.traffic.to_host_bytes) == (EXPERT_BYTES // 2, EXPERT_BYTES // 2)
    assert experts.parameters_of(1)["down_proj"].grad.dtype == torch.float32
    with torch.no_grad():
        experts.parameters_of(1)["down_proj"].zero_()
        assert not experts(hidden, chosen, torch.ones(2, 1)).any()


def test_every_expert_has_its_own_gradient_and_state(tiny: SimpleNamespace) -> None:
    model = tiny.build("olmoe")
    offloaded.offload(model, capacity=4)
    experts = find.layers(model)[0].experts
    optimizer = torch.optim.AdamW(experts.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in experts.expert_tensors(0).items()}
    experts(torch.randn(4, 16), torch.tensor([[1, 6]] * 4), torch.ones(4, 2)).sum().backward()
    optimizer.step()
    assert sum(p.grad is not None for p in experts.parameters()) == len(optimizer.state) == 2 * 2
    assert experts.parameters_of(0)["down_proj"].grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in experts.expert_tensors(0).items())
    assert len(list(experts.parameters())) == 2 * 8


def test_hits_misses_and_bytes(tiny: SimpleNamespace) -> None:
    model = tiny.build("olmoe")
    device_set = offloaded.offload(model, capacity=3)
    first, second = (layer.experts for layer in find.layers(model))
    hidden, weights = torch.randn(2, 16), torch.ones(2, 2)
    with torch.no_grad():
        first(hidden, torch.tensor([[0, 1]] * 2), weights)
        assert (device_set.traffic.hits, device_set.traffic.misses) == (0, 2)
        first(hidden, torch.tensor([[1, 0]] * 2), weights)
        assert (device_set.traffic.hits, device_set.traffic.misses) == (2, 2)
        second(hidden, torch.tensor([[0, 1]] * 2), weights)  # pushes out the first layer's 0
        first(hidden, torch.tensor([[1, 1]] * 2), weights)
        assert (device_set.traffic.hits, device_set.traffic.misses) == (3, 4)
    assert device_set.traffic.to_device_bytes == 4 * EXPERT_BYTES
    assert device_set.traffic.to_host_bytes == 0
    first(hidden, torch.tensor([[1, 1]] * 2), weights).sum().backward()
    assert device_set.traffic.to_host_bytes == EXPERT_BYTES
    assert len(device_set._entries) == 3


def test_the_backward_pass_finds_what_the_forward_pass_used_last(tiny: SimpleNamespace) -> None:
    model = tiny.build("olmoe")
    device_set = offloaded.offload(model, capacity=3)
    experts = find.layers(model)[0].experts
    output = experts(torch.randn(2, 16), torch.tensor([[0, 1, 2, 3, 4]] * 2), torch.ones(2, 5))
    assert (device_set.traffic.hits, device_set.traffic.misses) == (0, 5)
    output.sum().backward()
    assert (device_set.traffic.hits, device_set.traffic.misses) == (3, 7)


def test_an_expert_that_was_updated_is_copied_again() -> None:
    device_set, host = DeviceSet(2), {"down_proj": torch.zeros(4)}
    device_set.get((0, 0), host, CPU)
    device_set.get((0, 0), host, CPU)
    host["down_proj"].add_(1)
    assert torch.equal(device_set.get((0, 0), host, CPU)["down_proj"], torch.ones(4))
    assert (device_set.traffic.hits, device_set.traffic.misses) == (1, 2)
    assert device_set.traffic.to_device_bytes == 2 * 16


def test_a_set_of_one_copies_nothing_ahead() -> None:
    device_set, host = DeviceSet(1), {"down_proj": torch.zeros(4)}
    device_set.get((0, 0), host, CPU)
    device_set.ahead((0, 1), host, CPU)
    assert (len(device_set._entries), device_set.traffic.misses) == (1, 1)


def test_moving_the_model_leaves_experts_on_the_host_as_they_are(tiny: SimpleNamespace) -> None:
    model = tiny.build("mixtral")
    offloaded.offload(model, capacity=2)
    model.to(torch.bfloat16)
    experts = find.layers(model)[0].experts
    assert isinstance(experts, OffloadedExperts)
    assert experts.expert_tensors(0)["down_proj"].dtype == torch.float32
    assert experts(torch.randn(2, 16).bfloat16(), torch.tensor([[0]] * 2), torch.ones(2, 1)).dtype == torch.bfloat16


def test_what_cannot_be_is_named(tiny: SimpleNamespace) -> None:
    model = tiny.build("mixtral")
    with pytest.raises(ValueError, match="room for at least 1 expert, got 0"):
        offloaded.offload(model, capacity=0)
    offloaded.offload(model, capacity=2)
    compact.restore(model, write=False)
    offloaded.offload(model, capacity=2)
    find.layers(model)[0].experts.expert_tensors(3)["down_proj"].zero_()
    with pytest.raises(ValueError, match=r"trained in place, expected True; changed were \[3\]"):
        compact.restore(model, write=False)
    compact.restore(model)
    assert not find.layers(model)[0].experts.down_proj[3].any()
