import json
import math
from pathlib import Path

import pytest
import torch

from fluxlib import models
from fluxlib.pretraining import Recipe, build_model, build_tokenizer, pretrain
from fluxlib.pretraining.training import learning_rate, mutual_information


def test_mutual_information_of_one_expert_per_label_is_log_experts() -> None:
    logits = 50 * torch.eye(4)[torch.tensor([0, 1, 2, 3])]
    assert mutual_information(logits, torch.arange(4), 4, balance=1.0).item() == pytest.approx(math.log(4), rel=1e-4)


def test_mutual_information_of_label_blind_routing_is_zero() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]]).expand(6, -1)
    value = mutual_information(logits, torch.tensor([0, 0, 1, 1, 2, 2]), 3, balance=1.0)
    assert value.item() == pytest.approx(0, abs=1e-6)


def test_learning_rate_warms_up_and_ends_at_a_tenth() -> None:
    recipe = Recipe(steps=100, warmup_steps=10, learning_rate=1.0)
    assert learning_rate(0, recipe) == pytest.approx(0.1)
    assert learning_rate(10, recipe) == pytest.approx(1.0)
    assert learning_rate(100, recipe) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["mini-llama-moe", "mini-deepseek-moe"])
def test_the_recipe_is_reproducible_and_loads_as_a_base(name: str, tmp_path: Path) -> None:
    recipe = Recipe(steps=2, samples_per_family=2)
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
