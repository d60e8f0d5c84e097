"""benchmarks/_references.py on layers whose answers are known, and the page of benchmarks/rivals.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _references as references
import pytest
import rivals
import torch
from torch import Tensor

from fluxlib import models
from fluxlib.config import REPO_ROOT
from fluxlib.methods import fmes
from fluxlib.methods.local import customized
from fluxlib.moe import find

LAYOUT = find.Layout(("gate_up_proj", "down_proj"))
EXPERT = {
    "gate_up_proj": torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 3]]),
    "down_proj": torch.tensor([[1.0, 0], [0, 2]]),
}
SWAPPED = find.permute_neurons(EXPERT, torch.tensor([1, 0]), LAYOUT)


def seen(gates: Any, outputs: Any = None, **more: Any) -> references.Seen:
    """Of gates ``[N, E]`` and outputs ``[E, H]`` that are the same for every token."""
    gates = torch.tensor(gates, dtype=torch.float)
    num_tokens, num_experts = gates.shape
    same = torch.tensor(outputs if outputs is not None else [[1.0]] * num_experts)[:, None].expand(-1, num_tokens, -1)
    neurons = torch.tensor([[1.0, 0], [0, 1]])[None].repeat(num_experts, -(-num_tokens // 2), 1)[:, :num_tokens]
    given = {
        "hidden": gates, "added": gates[:, 0], "logits": gates, "neurons": neurons, "outputs": same,
        "experts": [EXPERT] * num_experts, "layout": LAYOUT,
    }  # fmt: skip
    return references.Seen(gates=gates, **given | more)


def chosen(counts: list[int]) -> list[list[int]]:
    """Gates of tokens of which each chooses one expert."""
    return [[int(e == expert) for e in range(len(counts))] for expert, count in enumerate(counts) for _ in range(count)]


def orders(fewer: references.Fewer) -> list[list[list[int] | None]]:
    assert fewer.plan.permutations is not None
    return [[None if order is None else order.tolist() for order in group] for group in fewer.plan.permutations]


def test_dropping_by_frequency_and_by_saliency() -> None:
    """Expert 0 is chosen most, but 1 and 2 say more when they are: 0.6 x 1 against 0.4 x 5 and 0.4 x 2."""
    layer = seen([[0.6, 0.4, 0], [0.6, 0, 0.4]], [[1.0, 0], [3, 4], [0, 2]])
    assert references.saliency(layer).tolist() == pytest.approx([0.6, 2.0, 0.8])
    assert references.frequency(layer, 2).routed == (0, 1)
    found = references.reap(layer, 2)
    assert (found.routed, found.plan.groups, found.plan.weights) == ((1, 2), ((1, 0), (2,)), ((1.0, 0.0), (1.0,)))


def test_a_rule_is_asked_about_the_experts_that_are_not_tuned() -> None:
    tuned = torch.tensor([False, True, False, False])
    layer = references.rest(seen(chosen([1, 4, 2, 3])), tuned)
    found = references.lifted(references.frequency(layer, 1), tuned)
    assert (found.plan.tuned, found.plan.groups, found.routed) == ((1,), ((3, 2, 0),), (1, 3))


def test_hc_smoe_links_by_average() -> None:
    """Single linkage would leave 3.6 alone: 2.2 is nearer to 1 than to it, but not to the mean of 0 and 1."""
    found = references.hc_smoe(seen(chosen([2, 1, 0, 1]), [[0.0], [1.0], [2.2], [3.6]]), 2)
    assert found.plan.groups == ((0, 1), (2, 3))
    assert found.plan.weights == ((0.5, 0.25), (0.0, 0.25))
    assert found.routed is None


def test_m_smoe_spreads_groups_over_layers_and_joins_by_logits() -> None:
    """Of four dominant experts the even layer gets three; neurons are matched to those of the first expert."""
    uneven, even = seen(chosen([16, 2, 2]), experts=[EXPERT, SWAPPED, EXPERT]), seen(chosen([8, 7, 5]))
    first, second = references.m_smoe([uneven, even], 2)
    assert first.plan.groups == ((0, 1, 2),)
    assert first.plan.weights == (pytest.approx((0.8, 0.1, 0.1)),)
    assert orders(first) == [[[0, 1], [1, 0], [0, 1]]]
    assert second.plan.groups == ((0,), (1,), (2,))
    logits = torch.tensor([[1.0, 0, 0.1], [0, 1, 1]]).repeat(5, 1)
    (joined,) = references.m_smoe([seen(chosen([5, 3, 2]), logits=logits)], 2)
    assert joined.plan.groups == ((0,), (1, 2))
    assert joined.routed is None


def test_ream_fills_the_group_of_the_most_salient_first() -> None:
    """Saliencies 3, 2, 1 and 0.9; expert 2 is nearest to 0, 3 the next; 2's neurons are 0's, swapped."""
    logits = torch.tensor([[1.0, -1, 0.9, 0.5], [0.5, 1, 0.5, 0.5]])
    layer = seen([[1.0] * 4] * 2, [[3.0, 0], [0, 2], [1, 0], [0.9, 0]], logits=logits)
    swapped = layer.neurons.clone()
    swapped[2] = swapped[2].flip(1)
    layer = references.Seen(**vars(layer) | {"neurons": swapped, "experts": [EXPERT, EXPERT, SWAPPED, EXPERT]})
    found = references.ream(layer, 2)
    assert found.plan.groups == ((0, 2, 3), (1,))
    assert found.plan.weights == (pytest.approx((3.0, 1.0, 0.9)), (2.0,))
    assert orders(found) == [[None, [1, 0], [0, 1]], [None]]
    assert found.routed == (0, 1)
    small = references.ream(layer, 2, group_size=2, tied=True)
    assert (small.plan.groups, small.routed) == (((0, 2), (1, 3)), None)
    with pytest.raises(ValueError, match="group_size must be at least 2 for 2 groups, got 1"):
        references.ream(layer, 2, group_size=1)


def test_a_router_with_fewer_experts_than_it_chooses_gives_all_weight_to_these() -> None:
    output = torch.tensor([[3.0, 1, 2]]), torch.tensor([[0.7, 0.3]]), torch.tensor([[0, 2]])
    _, weights, index = references._choose(torch.tensor([1]), None, None, output)
    assert (weights.tolist(), index.tolist()) == ([[1.0]], [[1]])


def tiny(kind: str) -> torch.nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "llama":
        own = models.LlamaMoeConfig(**sizes, intermediate_size=48, num_experts=6, num_selects=2, score_scale_factor=3.0)
        model: torch.nn.Module = models.LlamaMoeForCausalLM(own)
    else:
        mixture = {"moe_intermediate_size": 8, "n_routed_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}
        model = models.DeepseekMoeForCausalLM(models.DeepseekMoeConfig(**sizes, **mixture, intermediate_size=24))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


BATCH = {
    "input_ids": torch.arange(3, 17).view(2, 7),
    "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
}


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.mark.parametrize("kind", ("llama", "deepseek"))
def test_in_a_model(kind: str) -> None:
    """What is seen adds up to the layer's output; who keeps all changes nothing, who drops does what FMES does."""
    model = tiny(kind)
    layers, before, outputs = find.layers(model), logits(model), []
    handles = [layer.experts.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for layer in layers]
    found = references.observe(model, layers, [BATCH])
    for handle in handles:
        handle.remove()
    for layer, output in zip(found, outputs, strict=True):
        real = BATCH["attention_mask"].bool().flatten()
        torch.testing.assert_close(torch.einsum("ne,enh->nh", layer.gates, layer.outputs), output[real])
    with references.in_force(model, [references.frequency(layer, 6) for layer in found]):
        torch.testing.assert_close(logits(model), before)
    used = torch.stack([layer.used for layer in found])
    none = torch.zeros_like(used, dtype=torch.bool)
    with customized(model, fmes.make_plans(model, used, none)):
        dropped = logits(model)
    with references.in_force(model, [references.frequency(layer, 2) for layer in found]):
        torch.testing.assert_close(logits(model), dropped)
    merged = references.one_by_one(model, [BATCH], [lambda seen: references.hc_smoe(seen, 3)] * len(layers))
    assert [len(fewer.plan.groups) for fewer in merged] == [3] * len(layers)
    assert merged[0].plan == references.hc_smoe(found[0], 3).plan
    whole = [references.grouped([tuple(range(6))], torch.ones(6))] * len(layers)
    errors = []
    for fit_to in ([None] * len(layers), found):
        outputs.clear()
        with references.in_force(
            model, [references.Fewer(plan, None, seen) for plan, seen in zip(whole, fit_to, strict=True)]
        ):
            first = find.layers(model)[0].experts.register_forward_hook(lambda _m, _a, output: outputs.append(output))
            logits(model)
            first.remove()
        wanted = torch.einsum("ne,enh->nh", found[0].gates, found[0].outputs)
        errors.append((outputs[0][BATCH["attention_mask"].bool().flatten()] - wanted).norm())
    assert errors[1] < errors[0]
    assert torch.equal(logits(model), before)


def test_the_page_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rivals, "PAGE", tmp_path / "rivals.md")
    page = (REPO_ROOT / "docs" / "rivals.md").read_text()
    rivals.PAGE.write_text(page)
    rivals.write_page()
    assert rivals.PAGE.read_text() == page
