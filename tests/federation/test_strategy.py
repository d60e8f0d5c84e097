"""The strategy against hand-made replies, and inside Flower's own loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fluxlib import federation, methods
from fluxlib.config import RunConfig
from fluxlib.federation import LocalGrid
from fluxlib.federation.client import client_app
from fluxlib.federation.protocol import wire
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.server.budgets import make_budgets
from fluxlib.federation.server.joining import join
from fluxlib.federation.server.strategy import FluxStrategy

Make = Callable[..., RunConfig]


@pytest.fixture
def config(make_config: Make) -> RunConfig:
    return make_config({"federation.rounds": 2})


@pytest.fixture
def grid(config: RunConfig) -> Iterator[LocalGrid]:
    with LocalGrid(client_app.app, config.federation.participants).identity() as found:
        yield found


@pytest.fixture
def strategy(config: RunConfig, store: ExpertStore, grid: LocalGrid) -> FluxStrategy:
    made = FluxStrategy(config, methods.get(config.method), store, make_budgets(config, *store.shape))
    made.roster.enrol(join(grid, config, store))
    return made


def replies_of(strategy: FluxStrategy, grid: LocalGrid) -> list[Message]:
    return list(grid.send_and_receive(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)))


def weights(strategy: FluxStrategy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in strategy.store.model.parameters()])


def test_flowers_own_loop_trains_the_same_model(strategy: FluxStrategy, grid: LocalGrid, config: RunConfig) -> None:
    result = strategy.start(grid, ArrayRecord(), num_rounds=2)
    expected = federation.run(config)
    assert torch.equal(weights(strategy), torch.cat([p.detach().flatten() for p in expected.model.parameters()]))
    losses = [result.train_metrics_clientapp[number]["train_loss"] for number in (1, 2)]
    assert losses == expected.rounds["train_loss"].tolist()[1:]
    for name, array in result.arrays.items():
        key, tensor = wire.parse_name(name)
        assert torch.equal(wire.decode(array), strategy.store.tensors(key)[tensor])


def test_the_order_of_a_list_of_replies_does_not_matter(strategy: FluxStrategy, grid: LocalGrid) -> None:
    replies, base = replies_of(strategy, grid), weights(strategy).clone()
    other = deepcopy(strategy)
    strategy.aggregate_train(1, replies)
    other.aggregate_train(1, list(reversed(replies)))
    assert torch.equal(weights(strategy), weights(other))
    assert not torch.equal(weights(strategy), base)


def test_a_second_reply_and_a_strangers_are_counted_and_left_out(strategy: FluxStrategy, grid: LocalGrid) -> None:
    replies = replies_of(strategy, grid)
    other = deepcopy(strategy)
    strategy.aggregate_train(1, replies)
    stranger = Message(replies[0].content, reply_to=Message(RecordDict(), 99, "train", group_id="1"))
    other.aggregate_train(1, [*replies, replies[1], stranger])
    assert torch.equal(weights(strategy), weights(other))
    assert other.last is not None and other.last.num_rejected == 2
    assert sorted(other.last.extra) == [(-1, "unknown"), (1, "duplicate")]


def test_a_reply_of_the_round_before_is_stale_and_gets_everything_next(strategy: FluxStrategy, grid: LocalGrid) -> None:
    late = replies_of(strategy, grid)
    strategy.aggregate_train(1, late)
    messages = list(strategy.configure_train(2, ArrayRecord(), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    before = weights(strategy).clone()
    strategy.aggregate_train(2, [late[0], *replies[1:]])
    assert strategy.last is not None and not torch.equal(weights(strategy), before)
    assert [outcome.rejected for outcome in strategy.last.participants] == ["stale", "", ""]
    (first, *_) = strategy.configure_train(2, ArrayRecord(), ConfigRecord(), grid)
    assert first.content["config"]["from_version"] == -1


def test_the_server_holds_one_reply_at_a_time(strategy: FluxStrategy, grid: LocalGrid) -> None:
    alive: list[weakref.ref[Message]] = []
    most = 0

    def watched() -> Iterator[Message]:
        nonlocal most
        for reply in grid.send_and_receive(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)):
            alive.append(weakref.ref(reply))
            most = max(most, sum(ref() is not None for ref in alive))
            yield reply

    strategy.aggregate_train(1, watched())
    assert len(alive) == 3 and most <= 2


def test_nothing_is_applied_when_too_few_replies_are_good(strategy: FluxStrategy, grid: LocalGrid) -> None:
    replies, before = replies_of(strategy, grid), weights(strategy).clone()
    with pytest.raises(federation.RunFailed, match="1 of 3 replies were good.*2 missing"):
        strategy.aggregate_train(1, replies[:1])
    assert torch.equal(weights(strategy), before) and strategy.store.version == 0
