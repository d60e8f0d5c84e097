"""What a run's configuration refuses, and how it says so."""

from typing import Any

import pytest

from fluxlib.config import ConfigError, RunConfig, make_config


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lerning_rate": 1}, "unknown parameter 'lerning_rate'; allowed are method, model, task"),
        ({"federation.rounds": 0}, "rounds: Input should be greater than or equal to 1, got 0"),
        ({"training.learning_rate": float("inf")}, "learning_rate: Input should be a finite number, got inf"),
        ({"data.alpha": float("nan")}, "alpha: .*got nan"),
        ({"roles.epsilon": 0.0}, "epsilon is 0.0, allowed are 'dynamic', 'paper' and more than 0 up to 1"),
        ({"roles.epsilon": "rising"}, "epsilon.*: Input should be 'dynamic' or 'paper'"),
        ({"assignment": "best"}, "assignment: Input should be 'flux', 'random', 'frequency', 'utility' or"),
        ({"coverage": 0}, "coverage: Input should be greater than or equal to 1, got 0"),
        ({"uncertainty": -1.0}, "uncertainty: Input should be greater than or equal to 0, got -1.0"),
        (
            {"federation.participants": 8, "budget.tune_frac": 0.5, "max_tuners": 3},
            "max_tuners is 3, allowed is at least tune_fraction times the 8 participants of a round, 4",
        ),
        (
            {"budget.tune_frac": 0.7, "budget.merge_frac": 0.7},
            "tune_fraction \\+ merge_fraction is 1.4, allowed is at most 1",
        ),
        (
            {"federation.participants": 3, "federation.participants_per_round": 4},
            "participants_per_round is 4, allowed is at most participants=3",
        ),
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
