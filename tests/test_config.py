"""What a run's configuration refuses, and how it says so."""

from typing import Any

import pytest

from fluxlib.config import SETTINGS, RunConfig, make_config
from fluxlib.io import ConfigError


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lerning_rate": 1}, "unknown parameter 'lerning_rate'; did you mean training.learning_rate?"),
        ({"learning_rate": 1}, "'learning_rate'; did you mean training.learning_rate?"),
        ({"model.name": 1}, "unknown parameter 'model.name'; allowed are"),
        ({"merging.budget": 1}, "unknown parameter 'merging.budget'; did you mean merging.budgets?"),
        ({"federation.rounds": 0}, "^federation.rounds: Input should be greater than or equal to 1, got 0"),
        ({"training": {"learning_rate": float("inf")}}, "^training.learning_rate: .* a finite number, got inf"),
        ({"data.alpha": float("nan")}, "alpha: .*got nan"),
        ({"roles.epsilon": 0.0}, "epsilon is 0.0, allowed are 'dynamic', 'paper' and more than 0 up to 1"),
        ({"roles.epsilon": "rising"}, "roles.epsilon: Input should be 'dynamic' or 'paper'"),
        ({"roles.assignment": "best"}, "assignment: Input should be 'flux', 'random', 'frequency' or 'utility'"),
        ({"roles": 3}, "^roles is a group of settings, got 3; allowed are roles.assignment, "),
        (
            {"budget.tune_frac": 0.7, "budget.merge_frac": 0.7},
            "budget.tune_frac \\+ budget.merge_frac is 1.4, allowed is at most 1",
        ),
        (
            {"federation.participants": 3, "federation.participants_per_round": 4},
            "participants_per_round is 4, allowed is at most federation.participants=3",
        ),
        (
            {"torch_dtype": "bfloat16"},
            "explore_by is 'probes', allowed with torch_dtype 'bfloat16' is 'backward'",
        ),
        ({1: 2}, "^configuration: the name of a setting is 1, allowed is text"),
        ({"federation": {1: 2}}, "unknown parameter 'federation.1'"),
        ({"model": "\ud800"}, r"^configuration: model is '\\ud800', allowed is text"),
        ({"\ud800": 1}, "^configuration: the name of a setting is"),
        ({"seed": 10**5000}, "^seed: .*got a number of thousands of digits"),
        ({"engine": "ray"}, "engine: Input should be 'local', 'simulation' or 'deployment', got 'ray'"),
    ],
)
def test_bad_values_are_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(parameters)


def test_run_id_is_what_runs_are_compared_by() -> None:
    assert (
        RunConfig(model="llama-moe/LLaMA-MoE-v1-3_5B-4_16", seed=3).run_id
        == "flux-LLaMA-MoE-v1-3_5B-4_16-mini-gsm8k-seed3"
    )


def test_settings_are_named_by_group_and_read_back() -> None:
    config = make_config({"merging": {"budgets": "joint"}, "clock.link": "lte"})
    assert config.settings(changed_only=True) == {"merging.budgets": "joint", "clock.link": "lte"}
    assert make_config(config.settings()) == config == make_config(config.model_dump())
    assert set(config.settings()) == set(SETTINGS)
    assert config.updated({"merging.budgets": "adaptive"}).settings(changed_only=True) == {"clock.link": "lte"}


def test_what_is_said_of_a_bad_value_is_short() -> None:
    for bad in (
        {"seed": "x" * 10_000},
        {"merging.budgets": ["x"] * 10_000},
        {"x" * 10_000: 1},
        {"roles": "x" * 10_000},
    ):
        with pytest.raises(ConfigError) as caught:
            make_config(bad)
        assert len(str(caught.value)) < 2500


def test_settings_that_are_gone_are_taken_from_stored_runs_where_they_did_nothing() -> None:
    assert (
        make_config({"privacy": {"noise": "server", "clip_norm": None}, "merging.clustering": "fused"}) == RunConfig()
    )
    with pytest.raises(ConfigError, match="unknown parameter 'privacy.noise_multiplier'"):
        make_config({"privacy": {"noise_multiplier": 0.1}})
