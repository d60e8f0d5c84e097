import json
import math
from pathlib import Path

import pytest
import torch
from mini_bases import build_model, build_tokenizer
from recipe import Recipe, learning_rate, load_balance_loss, pretrain, router_term, target_shares

from fluxlib import models

EVEN = torch.full((4,), 0.25)


def test_an_expert_for_each_label_costs_nothing() -> None:
    logits = 50 * torch.eye(4)
    assert router_term(logits, torch.arange(4), EVEN, (1.0, 1.0)).item() == pytest.approx(0, abs=1e-4)


def test_routing_that_knows_no_labels_pays_their_entropy() -> None:
    logits = torch.zeros(6, 4)
    value = router_term(logits, torch.tensor([0, 0, 1, 1, 2, 2]), EVEN, (1.0, 0.5))
    assert value.item() == pytest.approx(0.5 * math.log(4), rel=1e-5)


def test_one_expert_for_all_pays_the_divergence() -> None:
    logits = torch.tensor([[100.0, 0.0]]).expand(6, -1)
    value = router_term(logits, torch.zeros(6, dtype=torch.long), torch.tensor([0.5, 0.5]), (1.0, 1.0))
    assert value.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-4), rel=1e-4)


def test_load_balance_is_zero_for_even_routing_and_counts_places_times_probability() -> None:
    assert load_balance_loss(50 * torch.eye(4), 1).item() == pytest.approx(0, abs=1e-5)
    assert load_balance_loss(torch.tensor([[100.0, 0.0]]).expand(6, -1), 1).item() == pytest.approx(1.0)


def test_target_shares_fall_as_zipf_and_are_even_at_zero() -> None:
    found = target_shares(4, 1.0, layer=0).sort(descending=True).values
    assert torch.allclose(found, torch.tensor([12, 6, 4, 3]) / 25)
    assert torch.allclose(target_shares(4, 0.0, layer=3), EVEN)


def test_learning_rate_warms_up_and_ends_at_a_tenth() -> None:
    recipe = Recipe(steps=100, warmup_steps=10, learning_rate=1.0)
    assert learning_rate(0, recipe) == pytest.approx(0.1)
    assert learning_rate(10, recipe) == pytest.approx(1.0)
    assert learning_rate(100, recipe) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["mini-llama-moe", "mini-deepseek-moe"])
def test_the_recipe_is_reproducible_and_loads_as_a_base(name: str, tmp_path: Path) -> None:
    recipe = Recipe(steps=2, router_steps=2, samples_per_family=2)
    for folder in ("a", "b"):
        pretrain(name, tmp_path / folder, recipe)
    first, again = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("a", "b"))
    assert first == again
    assert len(first) < 10_000_000
    assert json.loads((tmp_path / "a" / "recipe.json").read_text())["recipe"]["steps"] == 2
    model, tokenizer = models.load(str(tmp_path / "a"))
    assert model.config.vocab_size == len(tokenizer)


def test_unknown_base_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="allowed are mini-llama-moe, mini-deepseek-moe"):
        build_model("mini-gpt", len(build_tokenizer()))
