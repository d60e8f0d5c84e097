"""Utilities, assignment and what the server remembers, on examples small enough to check by hand."""

from __future__ import annotations

import math
import time

import pytest
import torch

from fluxlib import roles
from fluxlib.config import RolesConfig


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_utility_is_tokens_times_root_of_the_mean_squared_norm() -> None:
    squared_norms = torch.tensor([[9.0, 1.0, math.nan], [7.0, math.nan, math.nan]])
    utility = roles.utility(squared_norms, torch.tensor([10.0, 2.0, 5.0]))
    assert utility[0] == pytest.approx(10 * math.sqrt(8))
    assert utility[1] == 2.0
    assert utility[2].isnan()


def test_utility_cuts_a_negative_estimate_after_the_mean() -> None:
    assert roles.utility(torch.tensor([[-3.0], [1.0]]), torch.tensor([5.0])) == 0.0
    assert roles.utility(torch.tensor([[-1.0], [3.0]]), torch.tensor([5.0])) == 5.0


def test_first_utilities_are_relative_to_the_most_used_expert() -> None:
    first = roles.first_utilities(torch.tensor([[[0.1, 0.4], [0.2, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]))
    assert torch.allclose(first[0], torch.tensor([[0.25, 1.0], [0.5, 0.0]]))
    assert (first[1] == 0).all()


@pytest.mark.parametrize("wrong", [math.nan, -0.1, math.inf])
def test_first_utilities_name_the_participant_with_a_wrong_frequency(wrong: float) -> None:
    frequency = torch.full((3, 1, 2), 0.5)
    frequency[1, 0, 0] = wrong
    with pytest.raises(ValueError, match=r"participants \[1\]"):
        roles.first_utilities(frequency)


def test_epsilon_rises_over_the_first_third_and_stays() -> None:
    schedule = [roles.epsilon_schedule(r, 30) for r in range(30)]
    assert schedule[0] == pytest.approx(0.3)
    assert schedule[5] == pytest.approx(0.55)
    assert schedule[10:] == pytest.approx([0.8] * 20)
    assert roles.epsilon_schedule(7, 30, 0.7) == 0.7
    assert roles.epsilon_schedule(3, 30, "paper") == pytest.approx(0.4)
    with pytest.raises(ValueError, match="'dynamic', 'paper' or a number"):
        roles.epsilon_schedule(0, 30, "rising")


def test_assign_exploits_the_best_and_explores_among_all_others() -> None:
    utilities = torch.tensor([[[1.0, 5.0], [3.0, 2.0]], [[9.0, 0.0], [0.0, 0.0]]])
    seen = torch.zeros(2, 2, 2)
    for seed in range(60):
        roles_now = roles.assign(utilities, [3, 1], 0.67, seeded(seed))
        assert torch.equal(roles_now.exploit[0], torch.tensor([[False, True], [True, False]]))
        assert torch.equal(roles_now.exploit[1], torch.tensor([[True, False], [False, False]]))
        assert not (roles_now.exploit & roles_now.explore).any()
        assert (roles_now.exploit | roles_now.explore).sum(dim=(1, 2)).tolist() == [3, 1]
        seen += roles_now.explore
    assert seen[0].tolist() == [[pytest.approx(30, abs=14), 0], [0, pytest.approx(30, abs=14)]]


def test_assign_counts_round_half_up_and_keeps_one_to_exploit() -> None:
    utilities = torch.rand(4, 2, 5, generator=seeded())
    exploit = roles.assign(utilities, [1, 5, 10, 0], 0.3, seeded()).exploit
    assert exploit.sum(dim=(1, 2)).tolist() == [1, 2, 3, 0]
    none = roles.assign(utilities, [1, 5, 10, 0], 0.0, seeded())
    assert not none.exploit.any()
    assert none.explore.sum(dim=(1, 2)).tolist() == [1, 5, 10, 0]


def test_assign_gives_equal_utilities_to_the_lower_index_and_repeats_by_seed() -> None:
    utilities = torch.ones(1, 30, 64)  # so many that a sort which is not stable mixes them
    first, second = (roles.assign(utilities, [60], 0.5, seeded(3)) for _ in range(2))
    assert first.exploit.flatten().nonzero().flatten().tolist() == list(range(30))
    assert torch.equal(first.explore, second.explore)


def test_assign_is_the_exact_solution() -> None:
    utilities = torch.rand(5, 3, 4, generator=seeded(1))
    chosen = roles.assign(utilities, [4] * 5, 1.0, seeded()).exploit
    best = utilities.flatten(1).topk(4).values.sum(dim=1)
    assert torch.allclose((utilities * chosen).sum(dim=(1, 2)), best)


def test_assign_of_a_thousand_participants_is_quick() -> None:
    utilities = torch.rand(1000, 27, 64, generator=seeded())
    start = time.process_time()
    chosen = roles.assign(utilities, torch.full((1000,), 128), 0.5, seeded())
    assert time.process_time() - start < 2.0
    assert (chosen.exploit.sum(dim=(1, 2)) == 64).all()


def test_exploration_rotates_to_the_oldest() -> None:
    ages = torch.tensor([[[0, 7, 7, 3]]])
    explore = roles.assign(torch.tensor([[[9.0, 1, 1, 1]]]), [3], 0.34, seeded(), ages=ages).explore
    assert explore.flatten().tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("utilities", "budgets", "message"),
    [
        (torch.ones(2, 3), [1, 1], r"\(2, 'layers', 'experts'\), got \(2, 3\)"),
        (torch.ones(2, 1, 3), [1], r"\(1, 'layers', 'experts'\), got \(2, 1, 3\)"),
        (torch.ones(2, 1, 3), [1, 4], r"budgets\[1\] must be in 0..3 \(all experts\), got 4"),
        (torch.ones(2, 1, 3), [1, -1], r"budgets\[1\]"),
        (torch.tensor([[[1.0, 2]], [[math.nan, 1]]]), [1, 1], r"participants \[1\] are not"),
    ],
)
def test_assign_names_what_is_wrong(utilities: torch.Tensor, budgets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roles.assign(utilities, budgets, 0.5, seeded())


def two_rounds() -> roles.RoleState:
    """Two participants, one layer of four experts; participant 1 stays away from round 2."""
    nan = math.nan
    state = roles.RoleState.start(torch.tensor([[[0.4, 0.3, 0.2, 0.1]], [[0.25, 0.25, 0.25, 0.25]]]))
    state = roles.update(state, torch.tensor([[[8.0, nan, 4.0, nan]], [[nan, 6.0, nan, nan]]]))
    return roles.update(state, torch.tensor([[[nan, 3.0, nan, nan]], [[nan, nan, nan, nan]]]))


def test_unmeasured_utilities_keep_their_ratio_to_the_measured_ones() -> None:
    state = two_rounds()
    now = roles.current_utilities(state)
    # Participant 0 measured 8, 3, 4 where its first utilities were 1, 0.75, 0.5: a factor of 15 / 2.25.
    assert now[0, 0].tolist() == pytest.approx([8.0, 3.0, 4.0, 0.25 * 15 / 2.25])
    assert now[1, 0].tolist() == pytest.approx([6.0, 6.0, 6.0, 6.0])
    start = roles.RoleState.start(torch.tensor([[[0.4, 0.1]]]))
    assert roles.current_utilities(start).flatten().tolist() == pytest.approx([1.0, 0.25])


def test_state_knows_how_old_its_utilities_are() -> None:
    assert roles.ages(two_rounds())[0, 0].tolist() == [2, 1, 2, 3]


def test_a_lying_participant_is_bounded_and_named() -> None:
    state = roles.RoleState.start(torch.full((3, 1, 4), 0.25))
    nan, inf = math.nan, math.inf
    sent = torch.tensor([[[1.0, 2.0, 3.0, 2.0]], [[1e30, -5.0, inf, nan]], [[nan, nan, nan, nan]]])
    asked = torch.ones(3, 1, 4, dtype=torch.bool)
    asked[2] = False
    state = roles.update(state, sent, asked=asked, bound=100.0)
    assert [(f.participant, f.kind, f.count) for f in state.faults] == [
        (1, "infinite", 1), (1, "negative", 1), (1, "missing", 1), (1, "huge", 1),
    ]  # fmt: skip
    assert state.measured[1, 0, 0] == 300.0
    assert state.measured[1, 0, 1:].isnan().all()
    assert torch.isfinite(roles.current_utilities(state)).all()
    assert roles.update(state, torch.full((3, 1, 4), nan)).faults == ()


def test_a_utility_nobody_asked_for_is_ignored() -> None:
    state = roles.RoleState.start(torch.full((1, 1, 2), 0.5))
    asked = torch.tensor([[[True, False]]])
    state = roles.update(state, torch.tensor([[[1.0, 2.0]]]), asked=asked)
    assert state.faults == (roles.Fault(0, "unasked", 1),)
    assert state.measured[0, 0, 1].isnan()


def test_update_names_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 2\), got \(1, 2\)"):
        roles.update(roles.RoleState.start(torch.full((1, 1, 2), 0.5)), torch.ones(1, 2))


def test_an_honest_wide_range_is_not_cut() -> None:
    state = roles.RoleState.start(torch.full((2, 1, 4), 0.25))
    sent = torch.tensor([[[1e-9, 1e-6, 1e-3, 50.0]], [[1e-8, 1e-7, 1e-2, 220.0]]])
    assert roles.update(state, sent).faults == ()


def measured_state() -> roles.RoleState:
    """One participant, four experts: first utilities 1, 0.75, 0.5, 0.25; the last two measured at 8 and 4."""
    state = roles.RoleState.start(torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]))
    return roles.update(state, torch.tensor([[[math.nan, math.nan, 8.0, 4.0]]]))


def test_what_experts_are_chosen_by() -> None:
    state, chance = measured_state(), seeded()
    # 8 and 4 where the first ones were 0.5 and 0.25: a factor of 16.
    assert roles.priorities(state, "flux", chance).flatten().tolist() == [16.0, 12.0, 8.0, 4.0]
    assert torch.equal(roles.priorities(state, "utility", chance), roles.priorities(state, "flux", chance))
    assert roles.priorities(state, "frequency", chance).flatten().tolist() == [1.0, 0.75, 0.5, 0.25]
    first, second = (roles.priorities(state, "random", chance) for _ in range(2))
    assert not torch.equal(first, second)


def test_missing_counts_what_is_due_of_the_optional() -> None:
    state, nan = roles.RoleState.start(torch.full((2, 1, 4), 0.5)), math.nan
    asked = torch.tensor([[[True, False, False, False]]]).repeat(2, 1, 1)
    optional = torch.tensor([[[False, True, True, False]]]).repeat(2, 1, 1)
    sent = torch.tensor([[[1.0, 2.0, nan, nan]], [[nan, nan, 3.0, 4.0]]])
    state = roles.update(state, sent, asked=asked, optional=optional, at_least=torch.tensor([1, 2]))
    assert [(f.participant, f.kind, f.count) for f in state.faults] == [(1, "missing", 2), (1, "unasked", 1)]


def test_only_flux_is_given_probes() -> None:
    assert roles.num_probed(RolesConfig(probes_per_round=None), 5) == 5
    assert roles.num_probed(RolesConfig(probes_per_round=3), 5) == 3
    assert roles.num_probed(RolesConfig(probes_per_round=3, explore_by="backward"), 5) == 5
    assert roles.num_probed(RolesConfig(assignment="utility"), 5) == 0
