"""Low-rank adapters of experts: formulas by hand, against autograd on the formed weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fluxlib import gradients
from fluxlib.config import make_config
from fluxlib.io import ConfigError
from fluxlib.moe import compact, find
from fluxlib.moe.adapter import Adapter
from fluxlib.moe.compact import LayerPlan

ADAPTER = Adapter(rank=4, alpha=8.0, seed=3)


def plans(model: nn.Module) -> list[LayerPlan]:
    """Experts 1 and 0 tuned, 2 and 3 each in a frozen slot of its own, the others merged."""
    return [LayerPlan((1, 0), ((2,), (3,), tuple(range(4, one.num_experts)))) for one in find.layers(model)]


def weight_gradients(model: nn.Module, batch: dict[str, Tensor]) -> list[dict[int, dict[str, Tensor]]]:
    """Gradients of the weights of the two tuned experts, by layer."""
    compact.customize(model, plans(model))
    model(**batch).loss.backward()
    found = [{e: {n: g.clone() for n, g in one.experts.grads(e).items()} for e in (0, 1)} for one in find.layers(model)]
    compact.restore(model, write=False)
    model.zero_grad()
    return found


def product(gradient: Tensor, fixed: Tensor, layout: find.Layout) -> Tensor:
    """The chain rule for B in ``W = W_base + B @ fixed``."""
    return (gradient.T if layout.is_transposed else gradient) @ fixed.T


def test_the_setting_says_whether_and_bad_values_are_refused() -> None:
    assert Adapter.of(make_config({})) is None
    changes = {"adapter.kind": "lora", "adapter.rank": 4, "adapter.alpha": 8, "seed": 3}
    assert Adapter.of(make_config(changes)) == ADAPTER
    with pytest.raises(ConfigError, match="adapter.rank"):
        make_config({"adapter.rank": 0})


def test_a_is_the_same_for_all_and_another_for_every_tensor(tiny: SimpleNamespace) -> None:
    layer = find.layers(tiny.build("olmoe"))[0]
    tensors = find.expert_tensors(layer.experts, 0)
    first, again, other = (ADAPTER.fixed((0, expert), tensors, find.read_layout(layer.experts)) for expert in (0, 0, 1))
    width = layer.hidden_size
    assert first["gate_up_proj"].shape == (4, width) and first["down_proj"].shape == (4, layer.expert_size)
    assert torch.equal(first["gate_up_proj"], again["gate_up_proj"])
    assert not torch.equal(first["gate_up_proj"], other["gate_up_proj"])
    # Kaiming's bound with a = sqrt(5) is 1 / sqrt(in); alpha / rank is 2.
    assert 1.5 * width**-0.5 < first["gate_up_proj"].abs().max() <= 2 * width**-0.5


@pytest.mark.parametrize("method", ["slots", "grouped"])
def test_gradients_of_b_follow_the_chain_rule(tiny: SimpleNamespace, architecture: str, method: str) -> None:
    model, batch = tiny.build(architecture, torch.float64 if method == "slots" else torch.float32), tiny.batch()
    of_weights = weight_gradients(model, batch)
    expected = model(**batch).logits
    compact.customize(model, [LayerPlan(tuple(range(one.num_experts))) for one in find.layers(model)], None, ADAPTER)
    for layer in find.layers(model):
        layer.experts.method = method if not layer.experts.layout.has_bias else "slots"
    torch.testing.assert_close(model(**batch).logits, expected)  # B is zero
    compact.restore(model, write=False)
    compact.customize(model, plans(model), None, ADAPTER)
    for layer in find.layers(model):
        layer.experts.method = method
    model(**batch).loss.backward()
    for layer, expected_here in zip(find.layers(model), of_weights, strict=True):
        own = layer.experts
        assert {n for n, p in own.named_parameters() if p.requires_grad} == {f"lora.{n}" for n in own.lora}
        for expert in (0, 1):
            fixed, found = own.fixed([expert]), own.grads(expert)
            assert set(found) == set(fixed) == {n for n in own.layout.names if not n.endswith("_bias")}
            for name, gradient in found.items():
                wanted = product(expected_here[expert][name], fixed[name][0], own.layout)
                torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_a_step_moves_the_weight_by_b_times_a(tiny: SimpleNamespace, architecture: str) -> None:
    model, batch = tiny.build(architecture, torch.float64), tiny.batch()
    compact.customize(model, plans(model), None, ADAPTER)
    for layer in find.layers(model):
        for up in layer.experts.lora.values():
            up.data.normal_(generator=torch.Generator().manual_seed(0))
    expected = model(**batch).logits
    before = [find.expert_tensors(layer.experts.original, 1) for layer in find.layers(model)]
    before = [{name: tensor.clone() for name, tensor in one.items()} for one in before]
    learned = [{name: up.detach()[0] for name, up in layer.experts.lora.items()} for layer in find.layers(model)]
    compact.restore(model)
    compact.customize(model, plans(model))
    torch.testing.assert_close(model(**batch).logits, expected)
    compact.restore(model)
    for layer, old, up in zip(find.layers(model), before, learned, strict=True):
        layout = find.read_layout(layer.experts)
        fixed = ADAPTER.fixed((layer.index, 1), old, layout)
        for name, tensor in find.expert_tensors(layer.experts, 1).items():
            change = up[name] @ fixed[name] if name in up else torch.zeros_like(old[name])
            torch.testing.assert_close(
                tensor, old[name] + (change.T if layout.is_transposed and name in up else change)
            )


def test_every_way_to_measure_an_expert_measures_its_b(tiny: SimpleNamespace) -> None:
    model, batch = tiny.build("olmoe", torch.float64), tiny.batch()
    compact.customize(model, plans(model), None, ADAPTER)
    for layer in find.layers(model):
        layer.experts.watch(2)
    model(**batch).loss.backward()
    own = find.layers(model)[1].experts
    tuned = sum(gradient.square().sum() for gradient in own.grads(0).values())
    watched = own.watched_norms[own.watched.index(3)].clone()  # another backward pass adds to it
    exact = gradients.true_norms(model, batch, [(1, 0), (1, 3)])
    torch.testing.assert_close(exact, torch.stack([tuned, watched]).float())
    for guided in (True, False):
        probed = gradients.probe_norms(model, batch, [(1, 0), (1, 3)], 600, guided=guided)
        torch.testing.assert_close(probed, exact, rtol=0.25, atol=0)


def test_a_mean_of_bs_is_the_mean_of_the_changes_and_that_of_both_factors_is_not() -> None:
    layout = find.Layout(("gate_up_proj", "down_proj"))
    tensors = {"gate_up_proj": torch.zeros(12, 8), "down_proj": torch.zeros(8, 6)}
    chance = torch.Generator().manual_seed(0)
    ups = [{name: torch.randn(len(t), 4, generator=chance) for name, t in tensors.items()} for _ in range(2)]
    each = [ADAPTER.added((0, 0), tensors, one, layout) for one in ups]
    mean = ADAPTER.added((0, 0), tensors, {name: (ups[0][name] + ups[1][name]) / 2 for name in tensors}, layout)
    for name in tensors:
        torch.testing.assert_close(mean[name], (each[0][name] + each[1][name]) / 2, rtol=0, atol=1e-6)
    downs = [torch.randn(4, 8, generator=chance) for _ in range(2)]
    of_factors = (ups[0]["gate_up_proj"] + ups[1]["gate_up_proj"]) @ (downs[0] + downs[1]) / 4
    of_products = (ups[0]["gate_up_proj"] @ downs[0] + ups[1]["gate_up_proj"] @ downs[1]) / 2
    assert (of_factors - of_products).norm() > 0.5 * of_products.norm()
