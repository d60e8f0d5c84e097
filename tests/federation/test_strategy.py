"""The strategy against hand-made replies."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from copy import copy, deepcopy

import pytest
import torch
from flwr.app import Message, RecordDict

from fluxlib import federation
from fluxlib.config import RunConfig
from fluxlib.federation import LocalGrid
from fluxlib.federation.client import client_app
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.server.join import join
from fluxlib.federation.server.strategy import FluxStrategy

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
    (first, *_) = strategy.requests(2, strategy.sample(2))
    assert first.content["config"]["since"] == -1


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


def test_nothing_is_applied_when_too_few_replies_are_good(strategy: FluxStrategy) -> None:
    replies, before = list(receive(strategy, 1)), weights(strategy).clone()
    with pytest.raises(federation.RunFailed, match="1 of 3 replies were good.*2 missing"):
        strategy.aggregate(1, replies[:1])
    assert torch.equal(weights(strategy), before) and strategy.store.version == 0
