"""Compact experts against the model they stand in for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fluxlib.moe import compact, layers
from fluxlib.moe.compact import CompactExperts, LayerPlan


def _alone(num_experts: int) -> LayerPlan:
    return LayerPlan(tuple(range(0, num_experts, 2)), tuple((e,) for e in range(1, num_experts, 2)))


def test_a_slot_for_every_expert_is_the_same_model(tiny: SimpleNamespace, architecture: str) -> None:
    model = tiny.build(architecture, torch.float64)
    batch = tiny.batch()
    expected = model(**batch).logits
    compact.customize(model, [_alone(layer.num_experts) for layer in layers.find(model)])
    assert all(isinstance(layer.experts, CompactExperts) for layer in layers.find(model))
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-11, atol=1e-11)
    compact.restore(model)
    assert torch.equal(model(**batch).logits, expected)


def test_plans_name_what_is_wrong(tiny: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"disjoint; experts \[1\]"):
        LayerPlan((0, 1), ((1, 2),))
    with pytest.raises(ValueError, match="empty"):
        LayerPlan((0,), ((),))
    with pytest.raises(ValueError, match=r"left out \[3\], not in this layer \[9\]"):
        LayerPlan((0, 1), ((2, 9),)).check(4)
    with pytest.raises(ValueError, match="one per MoE layer, 2, got 1"):
        compact.customize(tiny.build("mixtral"), [_alone(6)])
