"""Budgets: shares of all experts, spread over participants, refused by name when nothing could work."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fluxlib.config import ConfigError, RunConfig
from fluxlib.federation.server.budgets import make_budgets
from fluxlib.methods.base import Budget


def budgets(**changes: Any) -> list[Budget]:
    return make_budgets(RunConfig(**changes), num_layers=4, num_experts=16)


def test_shares_are_of_all_experts() -> None:
    assert budgets(participants=2, tune_fraction=0.25, merge_fraction=0.125) == [Budget(16, 8)] * 2


def test_spread_is_even_and_the_smallest_comes_first() -> None:
    made = budgets(participants=5, tune_fraction=0.25, merge_fraction=0.25, budget_spread=0.5)
    assert [budget.num_tuned for budget in made] == [8, 12, 16, 20, 24]
    assert [budget.num_merged for budget in made] == [8, 12, 16, 20, 24]


def test_slots_never_outnumber_experts() -> None:
    made = budgets(participants=3, tune_fraction=0.75, merge_fraction=0.25, budget_spread=0.3)
    assert [(b.num_tuned, b.num_merged) for b in made] == [(34, 11), (48, 16), (62, 2)]


def test_everything_tuned_needs_no_slots() -> None:
    assert budgets(participants=1, tune_fraction=1.0, merge_fraction=0.0) == [Budget(64, 0)]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tune_fraction", {"budget.tune_frac": 0.03}),
        ("tune_fraction", {"budget.tune_frac": 0.08, "budget_spread": 0.5}),
        ("merge_fraction", {"budget.merge_frac": 0.01}),
        ("merge_fraction", {"budget.merge_frac": 0.1, "budget_spread": 0.6}),
    ],
)
def test_too_little_is_refused_with_the_least_that_is_allowed(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{name} is") as caught:
        budgets(participants=3, **changes)
    found = re.search(r"at least ([\d.]+\d)", str(caught.value))
    assert found
    allowed = budgets(participants=3, **{**changes, name: float(found[1])})
    assert min(b.num_tuned for b in allowed) >= 4 and min(b.num_merged for b in allowed) >= 4
