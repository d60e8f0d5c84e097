"""Robust aggregation: what a bad change can and cannot do to one expert."""

from __future__ import annotations

import pytest
import torch

from fluxlib.federation.server.aggregation import RULES, RobustAggregate, trimmed_mean

TOKENS = torch.ones(2, 4)


def combined(kind: str, *values: float, trim: float = 0.2) -> float:
    found = RobustAggregate(kind, trim)
    for value in values:
        found.add({(0, 1): {"w": torch.full((2,), value)}}, TOKENS)
    assert found.num_tuners((0, 1)) == len(values)
    return float(found.result()[0, 1]["w"][0])


def test_trimmed_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 5.0], [2.0, 4.0], [9.0, -50.0], [3.0, 6.0]])
    assert trimmed_mean(values, 1).tolist() == [2.5, 4.5]
    assert trimmed_mean(values, 0).tolist() == [3.75, -8.75]


@pytest.mark.parametrize("kind", RULES)
def test_one_liar_among_five_moves_nothing_far(kind: str) -> None:
    assert 0.9 <= combined(kind, 1.0, 1.1, 1e6, 0.9, 1.0) <= 1.1


def test_medians_and_trimmed_means_by_hand() -> None:
    assert combined("median", 1.0, 2.0, 50.0) == 2.0
    assert combined("median", 1.0, 2.0, 4.0, 50.0) == 3.0
    assert combined("trimmed_mean", 0.0, 1.0, 2.0, 3.0, 50.0) == 2.0


def test_with_two_tuners_nobody_can_tell_and_with_one_it_is_taken_as_it_is() -> None:
    assert combined("median", 1.0, 3.0) == combined("trimmed_mean", 1.0, 3.0) == 2.0
    assert all(combined(kind, 7.0) == 7.0 for kind in RULES)


def test_each_expert_is_combined_over_those_who_tuned_it() -> None:
    found = RobustAggregate("median", 0.2)
    found.add({(0, 0): {"w": torch.ones(1)}, (1, 2): {"w": torch.tensor([5.0])}}, TOKENS)
    found.add({(0, 0): {"w": torch.ones(1) * 3}}, TOKENS)
    assert {key: float(t["w"]) for key, t in found.result().items()} == {(0, 0): 2.0, (1, 2): 5.0}
