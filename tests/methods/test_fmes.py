"""FMES: who is tuned, who is kept, who is dropped."""

import pytest
import torch
from torch import nn

from fluxlib import methods, roles, seeding
from fluxlib.methods import fmes
from fluxlib.methods.base import Budget, LocalData, LocalRound, ParticipantState, Update
from fluxlib.methods.local import profile
from fluxlib.roles import Roles

from .conftest import CONFIG

LAYERS, EXPERTS, TOP_K = 4, 16, 4


def choose(frequency: torch.Tensor, *budgets: int) -> roles.Roles:
    state = roles.RoleState.start(frequency)
    return fmes.assign(state, [Budget(n, 0) for n in budgets], 0.3, seeding.generator(0), CONFIG)


def train(model: nn.Module, data: LocalData, exploit: torch.Tensor) -> tuple[Update, ParticipantState]:
    given, budget = Roles(exploit, ~exploit), Budget(int(exploit.sum()), 0)
    return fmes.train(model, LocalRound(ParticipantState(), given, budget, data, CONFIG, 3, seeding.generator(0)))


def first(*counts: int) -> torch.Tensor:
    """Mask with the first ``counts[l]`` experts of each layer."""
    return torch.arange(EXPERTS) < torch.tensor(counts)[:, None]


def test_each_participant_tunes_what_it_uses_most_whatever_epsilon_is() -> None:
    frequency = torch.tensor([[[0.5, 0.3, 0.2], [0.4, 0.35, 0.25]], [[0.1, 0.1, 0.8], [0.6, 0.3, 0.1]]])
    found = choose(frequency, 3, 2)
    assert found.exploit[0].tolist() == [[True, False, False], [True, True, False]]
    assert found.exploit[1].tolist() == [[False, False, True], [True, False, False]]
    assert torch.equal(found.explore, ~found.exploit)


def test_a_layer_keeps_top_k_experts_and_drops_the_rest(model: nn.Module) -> None:
    frequency = torch.arange(EXPERTS).flip(0).float().repeat(LAYERS, 1)
    plans = fmes.make_plans(model, frequency, first(6, 4, 1, 0))
    assert [len(plan.tuned) for plan in plans] == [6, 4, 1, 0]
    assert [plan.groups for plan in plans] == [(), (), ((1,), (2,), (3,)), ((0,), (1,), (2,), (3,))]
    assert [len(plan.dropped) for plan in plans] == [10, 12, 12, 12]


def test_no_token_reaches_a_dropped_expert_and_none_is_lost(model: nn.Module, data: LocalData) -> None:
    exploit = first(6, 4, 5, 4)
    update, _ = train(model, data, exploit)
    assert int(update.tokens[~exploit].sum()) == 0
    tokens = sum(int(batch["attention_mask"].sum()) for batch in data.train)
    assert update.tokens.sum(1).tolist() == [TOP_K * tokens] * LAYERS
    assert sorted(update.changes) == [tuple(key) for key in exploit.nonzero().tolist()]
    assert (update.work.num_tuned, update.work.num_frozen, update.work.tuned_tokens) == (
        19,
        0,
        int(update.tokens.sum()),
    )


def test_frozen_experts_are_counted_and_not_uploaded(model: nn.Module, data: LocalData) -> None:
    update, _ = train(model, data, first(4, 4, 4, 1))
    assert (update.work.num_tuned, update.work.num_frozen) == (13, 3)
    assert update.work.tuned_tokens < update.work.routed_tokens == update.work.slot_tokens


def test_with_everything_tuned_it_is_fmd(model: nn.Module, data: LocalData) -> None:
    everything = first(*[EXPERTS] * LAYERS)
    given = Roles(everything, ~everything)
    update, _ = train(model, data, everything)
    run = methods.get("fmd").train
    local = LocalRound(ParticipantState(), given, Budget(64, 0), data, CONFIG, 1, seeding.generator(0))
    full, _ = run(model, local)
    for key, tensors in full.changes.items():
        assert all(torch.equal(tensor, update.changes[key][name]) for name, tensor in tensors.items())


def test_it_reports_how_often_the_full_model_uses_every_expert(model: nn.Module, data: LocalData) -> None:
    update, state = train(model, data, first(4, 4, 4, 4))
    expected = profile(model, data, CONFIG)
    assert state.profile is not None and state.profile_round == 3
    torch.testing.assert_close(state.profile.frequency, expected.frequency)
    assert update.utilities.max() == 1.0
    torch.testing.assert_close(update.utilities / update.utilities.sum(), expected.frequency / LAYERS)


@pytest.mark.parametrize("known", [True, False])
def test_a_profile_is_made_first_only_where_there_is_none(model: nn.Module, data: LocalData, known: bool) -> None:
    exploit = first(4, 4, 4, 4)
    state = train(model, data, exploit)[1] if known else ParticipantState()
    given = Roles(exploit, ~exploit)
    update, _ = fmes.train(model, LocalRound(state, given, Budget(16, 0), data, CONFIG, 4, seeding.generator(0)))
    assert ("first_profile" in update.phases_s) is not known
