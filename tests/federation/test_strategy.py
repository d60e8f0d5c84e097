"""The strategy against hand-made replies."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fluxlib import federation
from fluxlib.config import RunConfig
from fluxlib.federation import LocalGrid
from fluxlib.federation.client import client_app
from fluxlib.federation.protocol.messages import TrainReport
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.protocol.wire import encode_changes
from fluxlib.federation.server.join import join
from fluxlib.federation.server.strategy import FluxStrategy
from fluxlib.methods.base import Update, Work
from fluxlib.roles import Roles

Make = Callable[..., RunConfig]


@pytest.fixture
def strategy(make_config: Make, store: ExpertStore) -> FluxStrategy:
    config = make_config({"federation.rounds": 2})
    grid = LocalGrid(client_app.app, config.federation.participants)
    made = FluxStrategy(grid, config, store)
    made.members = join(grid, config, store)
    return made


def receive(strategy: FluxStrategy, number: int) -> Iterator[Message]:
    strategy.assign(number, strategy.sample(number))
    return strategy.receive(number)


def weights(strategy: FluxStrategy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in strategy.store.model.parameters()])


def test_rounds_alone_train_the_same_model_as_a_run(strategy: FluxStrategy) -> None:
    losses = [strategy.run_round(number).train_loss for number in (1, 2)]
    expected = federation.run(strategy.config)
    assert torch.equal(weights(strategy), torch.cat([p.detach().flatten() for p in expected.model.parameters()]))
    assert losses == expected.rounds["train_loss"].tolist()[1:]


def test_a_second_reply_and_a_strangers_are_counted_and_left_out(strategy: FluxStrategy) -> None:
    replies = list(receive(strategy, 1))
    other = deepcopy(strategy)
    strategy.aggregate(1, replies)
    stranger = Message(replies[0].content, reply_to=strategy.grid.create_message(RecordDict(), "train", 99, "1"))
    result = other.aggregate(1, [*replies, replies[1], stranger])
    assert torch.equal(weights(strategy), weights(other))
    assert result.num_rejected == 2 and sorted(result.extra) == [(-1, "unknown"), (1, "duplicate")]


def test_a_reply_of_the_round_before_is_stale_and_gets_everything_next(strategy: FluxStrategy) -> None:
    late = list(receive(strategy, 1))
    strategy.aggregate(1, map(copy, late))
    replies = list(receive(strategy, 2))
    before = weights(strategy).clone()
    result = strategy.aggregate(2, [late[0], *replies[1:]])
    assert not torch.equal(weights(strategy), before)
    assert [part.rejected for part in result.participants] == ["stale", "", ""]
    first, *_ = strategy.sample(2)
    message = strategy._message("train", 2, strategy.current[first])
    assert message.content["config"]["since"] == -1


def test_the_server_holds_one_reply_at_a_time(strategy: FluxStrategy) -> None:
    alive: list[weakref.ref[Message]] = []
    most = 0

    def watched() -> Iterator[Message]:
        nonlocal most
        for reply in receive(strategy, 1):
            alive.append(weakref.ref(reply))
            most = max(most, sum(ref() is not None for ref in alive))
            yield reply

    strategy.aggregate(1, watched())
    assert len(alive) == 3 and most <= 2


def test_an_experts_mean_is_weighted_by_its_own_tokens_not_by_samples(strategy: FluxStrategy) -> None:
    replies = list(receive(strategy, 1))
    before = {name: tensor.clone() for name, tensor in strategy.store.tensors((0, 1)).items()}
    chosen = torch.zeros(2, 4, dtype=torch.bool)
    chosen[0, 1] = True
    tokens, samples, changes = (1.0, 0.0, 3.0), (2, 1, 0), (4.0, 100.0, 8.0)
    for part, reply in zip(strategy.current.values(), replies, strict=True):
        one, part.roles = part.participant, Roles(chosen, ~chosen)
        counts = torch.full((2, 4), 2.0)  # of the other experts; this one's alone counts
        counts[0, 1] = tokens[one]
        change = {(0, 1): {name: torch.full_like(tensor, changes[one]) for name, tensor in before.items()}}
        update = Update(change, torch.full((2, 4), torch.nan), counts, 1.0, samples[one], Work(8))
        report = TrainReport(one, 1, part.held, update=update)
        reply.content = report.to_records(encode_changes(change, "float32", {})[0])
    assert not strategy.aggregate(1, replies).num_rejected
    for name, tensor in strategy.store.tensors((0, 1)).items():
        torch.testing.assert_close(tensor - before[name], torch.full_like(tensor, 7.0), rtol=1e-4, atol=1e-4)


def profiled_by(profile: Callable[[Message, Context], Message], config: RunConfig, store: ExpertStore) -> FluxStrategy:
    app = ClientApp()
    app.query("join")(client_app.app)
    app.query("profile")(profile)
    app.train()(client_app.app)
    strategy = FluxStrategy(LocalGrid(app, config.federation.participants), config, store)
    strategy.members = join(strategy.grid, config, store)
    return strategy


def test_a_first_profile_is_asked_for_once_and_stays(make_config: Make, store: ExpertStore) -> None:
    config = make_config({"method": "fake-profiling", "federation.rounds": 3})
    asked: list[int] = []

    def profile(message: Message, context: Context) -> Message:
        asked.append(context.node_id)
        return client_app.app(message, context)

    strategy = profiled_by(profile, config, store)
    strategy.run_round(1)
    first = strategy.role_state.first.clone()
    assert not torch.equal(first, torch.ones_like(first)) and sorted(asked) == [2, 3, 4]
    strategy.run_round(2)
    assert torch.equal(strategy.role_state.first, first) and len(asked) == 3


@pytest.mark.parametrize(
    "damage",
    [
        {"shape": [1, 8]},
        {"frequency": torch.tensor([0.25] * 7 + [-1]).numpy().tobytes()},
        {"work": '{"num_experts": 8, "profile_tokens": 2.5}'},
        {"work": '{"num_experts": 8, "profile_tokens": 1000000000000000}'},
        {"work": "{"},
        {"phases": '{"\\ud800": "x"}'},
    ],
)
def test_a_damaged_profile_costs_its_utilities_alone(
    make_config: Make, store: ExpertStore, damage: dict[str, Any]
) -> None:
    def profile(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if context.node_id == 3:
            reply.content["config"].update(damage)
        return reply

    strategy = profiled_by(profile, make_config({"method": "fake-profiling", "federation.rounds": 1}), store)
    assert not strategy.run_round(1).num_rejected
    assert [bool((row == 1).all()) for row in strategy.role_state.first] == [False, True, False]
    assert strategy.profiled == {0, 2}


def test_nothing_is_applied_when_too_few_replies_are_good(strategy: FluxStrategy) -> None:
    replies, before = list(receive(strategy, 1)), weights(strategy).clone()
    with pytest.raises(federation.RunFailed, match="1 of 3 replies were good.*2 missing"):
        strategy.aggregate(1, replies[:1])
    assert torch.equal(weights(strategy), before) and strategy.store.version == 0
