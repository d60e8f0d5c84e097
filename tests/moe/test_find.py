"""Finding experts, reading and writing one of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fluxlib.moe import find


def test_find_names_every_layer(tiny: SimpleNamespace, architecture: str) -> None:
    model = tiny.build(architecture)
    found = find.layers(model)
    assert [layer.index for layer in found] == [0, 1]
    for layer in found:
        assert model.get_submodule(layer.name) is layer.experts
        assert (layer.hidden_size, layer.expert_size) == (16, 12)
        assert layer.top_k == {"llama4": 1, "mixtral": 2, "phimoe": 2}.get(architecture, layer.top_k)
        assert layer.num_experts == len(layer.experts.down_proj)
    assert ("model.layers.1." in found[0].name) == (architecture.startswith("deepseek"))


def test_a_dense_model_is_named() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE layer"):
        find.layers(LlamaForCausalLM(config))


def test_unknown_experts_are_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.zeros(2, 3, 4))
            self.down_proj = nn.Parameter(torch.zeros(2, 4, 3))

    for experts, message in (
        (
            nn.ModuleList([nn.Linear(2, 2)]),
            r"\(0 are\): experts: ModuleList holds no stacks .*, at block\.experts \(1 in all",
        ),
        (Bare(), r"Bare holds stacks .* does not declare their layout"),
    ):
        model = nn.ModuleDict({"block": nn.ModuleDict({"experts": experts})})
        with pytest.raises(ValueError, match=message):
            find.layers(model)


def test_an_expert_is_a_view_and_can_be_written(tiny: SimpleNamespace, architecture: str) -> None:
    experts = find.layers(tiny.build(architecture))[0].experts
    first = find.expert_tensors(experts, 1)
    assert all(tensor.data_ptr() == getattr(experts, name)[1].data_ptr() for name, tensor in first.items())
    other = experts.down_proj[0].clone()
    find.write_expert(experts, 1, {name: torch.full_like(tensor, 2.0) for name, tensor in first.items()})
    assert all((tensor == 2.0).all() for tensor in first.values())
    assert torch.equal(experts.down_proj[0], other)


def test_writing_names_what_is_wrong(tiny: SimpleNamespace) -> None:
    experts = find.layers(tiny.build("mixtral"))[0].experts
    with pytest.raises(ValueError, match=r"among \['down_proj', 'gate_up_proj'\], got 'up'"):
        find.write_expert(experts, 0, {"up": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"expected \(16, 12\), got \(12, 16\)"):
        find.write_expert(experts, 0, {"down_proj": torch.zeros(12, 16)})
    with pytest.raises(ValueError, match=r"expected 0\.\.5, got 6"):
        find.expert_tensors(experts, 6)


def test_the_order_of_neurons_does_not_matter(tiny: SimpleNamespace, architecture: str) -> None:
    model, batch = tiny.build(architecture, torch.float64), tiny.batch()
    expected = model(**batch).logits
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for layer in find.layers(model):
        layout = find.read_layout(layer.experts)
        for expert in range(layer.num_experts):
            tensors = find.expert_tensors(layer.experts, expert)
            before, moved = find.neurons(tensors, layout), find.permute_neurons(tensors, order, layout)
            assert before.shape == (12, 48)
            assert torch.equal(find.neurons(moved, layout), before[order])
            find.write_expert(layer.experts, expert, moved)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="permutation of 0..11"):
        find.permute_neurons(tensors, torch.zeros(12, dtype=torch.long), layout)
