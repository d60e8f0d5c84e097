"""FMQ: what a step does to quantised experts, exactly."""

import copy
import dataclasses

import torch
from torch import nn

from fluxlib import methods, seeding
from fluxlib.methods.base import Budget, LocalData, LocalRound, ParticipantState, Update
from fluxlib.methods.fmq import QuantizedLearner
from fluxlib.methods.local import run_steps
from fluxlib.moe import find
from fluxlib.moe.packing import quantize_tensor
from fluxlib.moe.quantized import quantize
from fluxlib.moe.replace import restoring
from fluxlib.roles import Roles

from .conftest import CONFIG

LAYERS, EXPERTS = 4, 16
EVERYTHING = torch.ones(LAYERS, EXPERTS, dtype=torch.bool)


def train(name: str, model: nn.Module, data: LocalData, changes: dict[str, object] | None = None) -> Update:
    given = Roles(EVERYTHING, ~EVERYTHING)
    config = CONFIG.updated({f"training.{name}": value for name, value in (changes or {}).items()})
    run = methods.get(name).train
    return run(model, LocalRound(ParticipantState(), given, Budget(16, 16), data, config, 1, seeding.generator(0)))[0]


def rounded(stack: torch.Tensor, bits: int) -> torch.Tensor:
    packed = quantize_tensor(stack, bits)
    return torch.stack([packed.read(expert) for expert in range(len(stack))])


def test_a_step_quantises_the_moved_weights_and_passes_through_the_quantised_ones(
    model: nn.Module, data: LocalData
) -> None:
    one, rate = dataclasses.replace(data, train=data.train[:1]), 2.0
    update = train("fmq", model, one, {"optimizer": "sgd", "learning_rate": rate})
    plain = copy.deepcopy(model)
    for layer in find.layers(plain):
        layer.experts.down_proj.data = rounded(layer.experts.down_proj.data, 4)
        layer.experts.gate_up_proj.data = rounded(layer.experts.gate_up_proj.data, 4)
    plain(**one.train[0]).loss.backward()
    stack = find.layers(plain)[1].experts.down_proj
    expected = rounded(stack.data - rate * stack.grad, 4) - stack.data
    got = torch.stack([update.changes[1, expert]["down_proj"] for expert in range(EXPERTS)])
    assert (got - expected).norm() < 0.02 * expected.norm()  # a value beside an edge may fall to the other side
    assert (got - expected).abs().gt(1e-6).float().mean() < 1e-3


def test_experts_are_in_few_bits_after_every_step(model: nn.Module, data: LocalData) -> None:
    with restoring(quantize(model, 4)):
        experts = [layer.experts for layer in find.layers(model)]
        learner = QuantizedLearner(experts, CONFIG)
        for batch in data.train:
            run_steps(model, learner, [batch], CONFIG)
            values = experts[0].expert_tensors(0)["down_proj"].flatten()[:64]
            assert len(values.unique()) <= 16
            assert all(p.numel() == 0 for held in learner.parameters.values() for p in held.values())


def test_a_movement_of_less_than_half_a_level_is_lost(model: nn.Module, data: LocalData) -> None:
    update = train("fmq", model, data, {"optimizer": "sgd", "learning_rate": 1e-9})
    assert all(float(t.abs().max()) < 1e-6 for tensors in update.changes.values() for t in tensors.values())


def test_an_expert_without_tokens_keeps_its_codes(model: nn.Module, data: LocalData) -> None:
    few = {name: rows[:1, :2] for name, rows in data.train[0].items()}
    few["labels"] = few["input_ids"]
    update = train("fmq", model, dataclasses.replace(data, train=[few]), {"learning_rate": 0.1})
    idle = [tuple(key) for key in (update.tokens == 0).nonzero().tolist()]
    assert idle
    assert all(not t.any() for key in idle for t in update.changes[key].values())


def test_with_16_bits_it_is_fmd_and_with_8_nearly(model: nn.Module, data: LocalData) -> None:
    full, same, near = (
        train(name, model, data, {"fmq_bits": bits, "optimizer": "sgd", "learning_rate": 100.0})
        for name, bits in (("fmd", 4), ("fmq", 16), ("fmq", 8))
    )
    one, other, close = (
        torch.cat([u.changes[k]["down_proj"].flatten() for k in u.changes]) for u in (full, same, near)
    )
    assert torch.equal(one, other)
    assert torch.cosine_similarity(one, close, dim=0) > 0.99


def test_adapters_learn_on_the_quantised_weights_as_on_any_others(model: nn.Module, data: LocalData) -> None:
    plain = copy.deepcopy(model)
    for layer in find.layers(plain):
        layer.experts.down_proj.data = rounded(layer.experts.down_proj.data, 4)
        layer.experts.gate_up_proj.data = rounded(layer.experts.gate_up_proj.data, 4)
    before = copy.deepcopy(model.state_dict())
    lora = {"adapter.kind": "lora", "adapter.rank": 4, "training.learning_rate": 0.1, "training.optimizer": "sgd"}
    given, config = Roles(EVERYTHING, ~EVERYTHING), CONFIG.updated(lora)
    on_quantised, on_rounded = (
        methods.get(name).train(
            each, LocalRound(ParticipantState(), given, Budget(16, 16), data, config, 1, seeding.generator(0))
        )[0]
        for name, each in (("fmq", model), ("fmd", plain))
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for key, ups in on_rounded.changes.items():
        for name, up in ups.items():
            torch.testing.assert_close(on_quantised.changes[key][name], up, rtol=1e-3, atol=1e-6)
    work = on_quantised.work
    assert (work.weight_bits, work.adapter_rank, work.num_quantized) == (4, 4, 64)
    assert (work.download_bits, work.upload_bits) == (16.0, 16.0)  # B's travel, in the run's own type


def test_what_it_costs_is_told_to_the_clock(model: nn.Module, data: LocalData) -> None:
    work = train("fmq", model, data).work
    assert (work.num_tuned, work.num_quantized, work.weight_bits, work.offloaded) == (64, 64, 4, True)
    assert (work.download_bits, work.upload_bits) == (4.25, 4.25)
    assert work.tuned_tokens == work.routed_tokens == work.slot_tokens == 4 * LAYERS * work.train_tokens
