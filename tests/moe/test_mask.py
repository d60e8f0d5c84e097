"""Dropped experts leave the top-k, by the model's own rule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fluxlib.moe import compact, find, mask
from fluxlib.moe.capture import capture
from fluxlib.moe.compact import LayerPlan


def _drop(model: nn.Module, dropped: tuple[int, ...]) -> list[LayerPlan]:
    return [
        LayerPlan(tuple(e for e in range(layer.num_experts) if e not in dropped), dropped=dropped)
        for layer in find.layers(model)
    ]


def test_dropped_experts_get_no_weight_and_come_back(tiny: SimpleNamespace, architecture: str) -> None:
    model, batch = tiny.build(architecture), tiny.batch()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(**batch).logits
    compact.customize(model, _drop(model, (0, 5)))
    with capture(model) as seen:
        output = model(**batch)
    for layer in seen.layers:
        index, weights = layer.top_k_index[0], layer.top_k_weights[0]
        assert not weights[(index == 0) | (index == 5)].any()
        assert torch.isfinite(weights).all()
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    compact.restore(model, write=False)
    assert torch.equal(model(**batch).logits, expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_weights_are_what_the_router_gives_without_those_experts(tiny: SimpleNamespace) -> None:
    """OLMoE takes a softmax over all experts: without two of them it is a softmax over the others."""
    model, hidden = tiny.build("olmoe"), torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    layer = find.layers(model)[0]
    undo = mask.drop(layer, (1, 4))
    logits, weights, index = layer.block.gate(hidden)
    stay = [0, 2, 3, 5, 6, 7]
    plain = nn.functional.linear(hidden, layer.block.gate.weight)[:, stay]
    values, position = plain.softmax(-1).topk(3)
    assert torch.equal(index, torch.tensor(stay)[position])
    torch.testing.assert_close(weights, values)
    assert torch.isneginf(logits[:, [1, 4]]).all()
    undo()
    assert torch.isfinite(layer.block.gate(hidden)[0]).all()


def test_sigmoid_routers_with_a_correction_drop_too(tiny: SimpleNamespace) -> None:
    """DeepSeek-V3 chooses by score plus correction: a large correction must not bring a dropped expert back."""
    model = tiny.build("deepseek_v3")
    layer = find.layers(model)[0]
    layer.block.gate.e_score_correction_bias[2] = 50.0
    mask.drop(layer, (2,))
    _, weights, index = layer.block.gate(torch.randn(50, 16, generator=torch.Generator().manual_seed(3)))
    assert not (index == 2).any()
    torch.testing.assert_close(weights.sum(-1), torch.full((50,), layer.block.gate.routed_scaling_factor))


def test_what_cannot_be_dropped_is_named(tiny: SimpleNamespace) -> None:
    model = tiny.build("olmoe")
    layer = find.layers(model)[0]
    with pytest.raises(ValueError, match=r"at least 3 experts \(top-k\) must stay .* 2 would"):
        mask.drop(layer, range(6))
    with pytest.raises(ValueError, match=r"plans\[0\]: dropped: at least 3"):
        compact.customize(model, [LayerPlan((6, 7), dropped=tuple(range(6)))] * 2)
    layer.block.gate = _Opaque()
    with pytest.raises(ValueError, match="cannot find the logits in its router, a _Opaque"):
        mask.drop(layer, (0,))
    layer.block.gate = _Stubborn()
    with pytest.raises(ValueError, match="a _Stubborn, still chooses dropped experts"):
        mask.drop(layer, (0,))
    del layer.block.gate
    with pytest.raises(ValueError, match=r"no router among .* its block has \['experts'\]"):
        mask.drop(layer, (0,))


class _Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(16, 3))


class _Stubborn(nn.Module):
    """Its head makes one logit per expert; the choice does not depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 8)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = (len(hidden), 3)
        return self.head(hidden), torch.ones(shape), torch.arange(3).expand(shape)
