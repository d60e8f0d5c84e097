"""The shipped bases are what their recipes say: size, seed, routing, scores."""

import json
from dataclasses import asdict

import pytest
from recipe import MAX_TOKENS, RECIPES

from fluxlib import models, tasks
from fluxlib.config import data_dir
from fluxlib.moe import find
from fluxlib.tasks.evaluate import evaluate

SHAPES = {"mini-llama-moe": (6, 16, 4), "mini-deepseek-moe": (6, 32, 6)}

FIRST_WEIGHT = {"mini-llama-moe": 0.6, "mini-deepseek-moe": 0.5}


@pytest.mark.parametrize("name", RECIPES)
class TestShippedBase:
    def test_is_small_and_of_the_shape_of_its_kind(self, name: str) -> None:
        assert (data_dir() / "models" / name / "model.safetensors").stat().st_size < 10_000_000
        model, _ = models.load(name)
        found = find.layers(model)
        assert (len(found), found[0].num_experts, found[0].top_k) == SHAPES[name]

    def test_was_made_by_the_recipe_in_the_code(self, name: str) -> None:
        record = json.loads((data_dir() / "models" / name / "recipe.json").read_text())
        assert record["recipe"] == json.loads(json.dumps(asdict(RECIPES[name])))
        assert record["curve"][0]["loss"] > 6 > 1 > record["curve"][-1]["loss"]

    def test_routes_as_a_mixture(self, name: str) -> None:
        rows = json.loads((data_dir() / "models" / name / "recipe.json").read_text())["routing"]
        assert 1.5 <= rows[0]["busiest"] <= 3
        assert rows[-1]["busiest"] <= 1.6
        assert min(row["rarest"] for row in rows) >= 0.1
        assert rows[0]["label_distance"] >= 0.1
        assert rows[-1]["label_distance"] >= 0.35
        assert max(row["first_weight"] for row in rows) <= FIRST_WEIGHT[name]

    def test_leaves_room_that_full_fine_tuning_fills(self, name: str) -> None:
        scores = json.loads((data_dir() / "models" / name / "recipe.json").read_text())["scores"]
        assert set(scores) == set(tasks.mini.FAMILIES)
        assert all(score["tuned"] - score["base"] > 0.2 for score in scores.values())

    def test_scores_what_its_card_says(self, name: str) -> None:
        model, tokenizer = models.load(name)
        task = tasks.load("mini-mmlu")
        score = evaluate(model, tokenizer, task.metric, task.test, MAX_TOKENS)
        recorded = json.loads((data_dir() / "models" / name / "recipe.json").read_text())["scores"]["mini-mmlu"]
        assert score.metric == pytest.approx(recorded["base"], abs=0.005)
