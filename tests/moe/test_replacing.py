"""All layers of a model are replaced or none, and what was there before comes back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fluxlib.moe import compact, find, offloaded, quantized
from fluxlib.moe.compact import LayerPlan
from fluxlib.moe.replace import restoring

PLANS = [LayerPlan((0,), ((1, 2), (3, 4, 5)))] * 2
DROPS = [LayerPlan((0, 1, 2), dropped=(3, 4, 5))] * 2


def _state(model: nn.Module) -> tuple[Any, ...]:
    """Everything that replacing experts touches."""
    return (
        [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        sorted(model.__dict__),
    )


def _fail_at_the_second(monkeypatch: pytest.MonkeyPatch, owner: type) -> None:
    plain, calls = owner.__init__, []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        plain(*args, **kwargs)

    monkeypatch.setattr(owner, "__init__", fail)


@pytest.mark.parametrize(
    ("kind", "replace"),
    [
        (compact.CompactExperts, lambda model: compact.customize(model, DROPS)),
        (quantized.QuantizedExperts, lambda model: quantized.quantize(model)),
        (quantized.QuantizedExperts, lambda model: restoring(quantized.quantize(model)).__enter__()),
        (offloaded.OffloadedExperts, lambda model: offloaded.offload(model, 2)),
    ],
)
def test_a_failure_midway_leaves_the_model_as_it_was(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, kind: type, replace: Callable[[nn.Module], Any]
) -> None:
    model, batch = tiny.build("mixtral"), tiny.batch()
    model.model.embed_tokens.requires_grad_(False)
    before, expected = _state(model), model(**batch).logits
    _fail_at_the_second(monkeypatch, kind)
    with pytest.raises(MemoryError):
        replace(model)
    assert _state(model) == before
    assert torch.equal(model(**batch).logits, expected)


def test_a_router_that_cannot_be_masked_leaves_the_model_as_it_was(tiny: SimpleNamespace) -> None:
    model = tiny.build("mixtral")
    block = find.layers(model)[1].block
    block.other_name = block.gate
    del block.gate
    before = _state(model)
    with pytest.raises(ValueError, match="no router among"):
        compact.customize(model, DROPS)
    assert _state(model) == before


def test_an_order_of_the_wrong_neurons_is_refused(tiny: SimpleNamespace) -> None:
    model = tiny.build("mixtral")
    before = _state(model)
    for order in (torch.arange(5), torch.zeros(12, dtype=torch.long)):
        bad = LayerPlan((0,), ((1, 2, 3, 4, 5),), None, ((order, None, None, None, None),))
        with pytest.raises(ValueError, match=r"plans\[1\]: order: expected a permutation of 0\.\.11"):
            compact.customize(model, [PLANS[0], bad])
    assert _state(model) == before


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3", "gpt_oss", "llama_moe", "deepseek"])
def test_a_copy_of_a_masked_model_has_a_mask_of_its_own(tiny: SimpleNamespace, architecture: str) -> None:
    model, batch = tiny.build(architecture), tiny.batch()
    whole = model(**batch).logits
    plans = [LayerPlan(tuple(range(1, e)), dropped=(0,)) for e in (layer.num_experts for layer in find.layers(model))]
    masked = compact.customize(model, plans)(**batch).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, masked)
    compact.restore(twin)
    assert torch.equal(twin(**batch).logits, whole)
    assert torch.equal(model(**batch).logits, masked)
    compact.restore(model)
    assert torch.equal(model(**batch).logits, whole)


def test_a_routers_own_override_comes_back(tiny: SimpleNamespace) -> None:
    model = tiny.build("mixtral")
    router, calls = find.layers(model)[0].block.gate, []
    plain = router.forward

    def watched(*args: Any) -> Any:
        calls.append(1)
        return plain(*args)

    router.forward = watched
    compact.customize(model, DROPS)
    calls.clear()
    model(**tiny.batch())
    assert len(calls) == 1
    compact.restore(model)
    assert router.__dict__["forward"] is watched


def test_a_checkpoint_without_experts_is_not_written(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.build("mixtral")
    before = _state(model)
    for replace in (lambda: compact.customize(model, PLANS), lambda: quantized.quantize(model)):
        replace()
        for each in (model, copy.deepcopy(model)):
            with pytest.raises(ValueError, match=r"experts of this MixtralForCausalLM are replaced.*restore"):
                each.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
        compact.restore(model)
        assert _state(model) == before
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "replace",
    [lambda m: compact.customize(m, PLANS), lambda m: quantized.quantize(m), lambda m: offloaded.offload(m, 2)],
    ids=["compact", "quantized", "offloaded"],
)
def test_originals_follow_the_models_type(tiny: SimpleNamespace, replace: Callable[[nn.Module], Any]) -> None:
    model, batch = tiny.build("mixtral"), tiny.batch()
    expected = tiny.build("mixtral").to(torch.bfloat16)
    expected.set_experts_implementation("eager")  # grouped_mm wants wider rows of this type
    model.set_experts_implementation("eager")
    replace(model)
    model.to(torch.bfloat16)
    compact.restore(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(**batch).logits, expected(**batch).logits)


def test_tuned_slots_in_float32_leave_a_sixteen_bit_model_in_sixteen(tiny: SimpleNamespace) -> None:
    model = tiny.build("mixtral").to(torch.bfloat16)
    compact.restore(compact.customize(model, PLANS, torch.float32))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
