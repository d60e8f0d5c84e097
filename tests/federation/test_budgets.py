"""Budgets: shares of all experts, refused by name when nothing could work."""

from __future__ import annotations

import re

import pytest

from fluxlib.config import ConfigError, make_config
from fluxlib.federation.checks import make_budgets
from fluxlib.methods.base import Budget


def budgets(tune_frac: float, merge_frac: float) -> list[Budget]:
    config = make_config({"federation.participants": 2, "budget.tune_frac": tune_frac, "budget.merge_frac": merge_frac})
    return make_budgets(config, num_layers=4, num_experts=16)


def test_shares_are_of_all_experts() -> None:
    assert budgets(0.25, 0.125) == [Budget(16, 8)] * 2


def test_slots_never_outnumber_experts_that_are_not_tuned() -> None:
    assert budgets(0.9, 0.1) == [Budget(58, 6)] * 2
    assert budgets(1.0, 0.5) == budgets(1.0, 0.0) == [Budget(64, 0)] * 2


@pytest.mark.parametrize(("tune_frac", "merge_frac", "name"), [(0.03, 0.2, "tune_frac"), (0.2, 0.01, "merge_frac")])
def test_too_little_is_refused_with_the_least_that_is_allowed(tune_frac: float, merge_frac: float, name: str) -> None:
    with pytest.raises(ConfigError, match=f"budget.{name} is") as caught:
        budgets(tune_frac, merge_frac)
    found = re.search(r"at least ([\d.]+\d)", str(caught.value))
    assert found
    (allowed, _) = budgets(**({"tune_frac": tune_frac, "merge_frac": merge_frac} | {name: float(found[1])}))
    assert allowed.num_tuned >= 4 and allowed.num_merged >= 4
