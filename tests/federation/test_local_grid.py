"""The in-process grid behaves as a Flower engine does: contexts, errors, isolation."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fluxlib.federation import LocalGrid
from fluxlib.federation.engines.grid import RAISED


def counting_app() -> ClientApp:
    """Replies with how often this node was called, and where it is."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen = int(context.state["count"]["n"]) + 1 if "count" in context.state else 1
        context.state["count"] = ConfigRecord({"n": seen})
        if message.content["config"].get("fail"):
            raise RuntimeError("out of memory")
        where = [context.node_config["partition-id"], context.node_config["num-partitions"]]
        return Message(RecordDict({"config": ConfigRecord({"seen": seen, "where": where})}), reply_to=message)

    return app


@pytest.fixture
def grid() -> LocalGrid:
    return LocalGrid(counting_app(), 3, node_config=lambda i: {"device": f"d{i}"})


def request(grid: LocalGrid, node: int, **config: float) -> Message:
    return grid.create_message(RecordDict({"config": ConfigRecord(dict(config))}), "train", node, "1")


def test_it_is_a_flower_grid(grid: LocalGrid) -> None:
    assert isinstance(grid, Grid)
    assert [node.node_id for node in grid.get_nodes()] == list(grid.get_node_ids()) == [2, 3, 4]
    assert grid.context(3).node_config == {"partition-id": 1, "num-partitions": 3, "device": "d1"}


def test_replies_come_in_order_and_carry_what_they_answer(grid: LocalGrid) -> None:
    messages = [request(grid, node) for node in (4, 2)]
    replies = list(grid.send_and_receive(messages))
    assert [reply.metadata.src_node_id for reply in replies] == [4, 2]
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]
    assert [list(reply.content["config"]["where"]) for reply in replies] == [[2, 3], [0, 3]]
    assert {reply.metadata.group_id for reply in replies} == {"1"}


def test_replies_are_made_one_at_a_time(grid: LocalGrid) -> None:
    replies = grid.send_and_receive(request(grid, node) for node in (2, 3, 4))
    next(iter(replies))
    assert "count" in grid.context(2).state
    assert "count" not in grid.context(3).state


def test_state_lasts_and_is_each_nodes_own(grid: LocalGrid) -> None:
    seen = [r.content["config"]["seen"] for r in grid.send_and_receive([request(grid, n) for n in (2, 2, 3, 2)])]
    assert seen == [1, 2, 1, 3]


def test_an_exception_becomes_an_error_reply_and_the_state_stays(grid: LocalGrid) -> None:
    first, failed, last = grid.send_and_receive([request(grid, 2), request(grid, 2, fail=1), request(grid, 2)])
    assert failed.has_error() and not failed.has_content()
    assert failed.error.code == RAISED
    assert "RuntimeError: out of memory" in str(failed.error.reason)
    assert failed.metadata.src_node_id == 2
    assert (first.content["config"]["seen"], last.content["config"]["seen"]) == (1, 2)


def test_an_unknown_node_and_an_unknown_action_are_error_replies(grid: LocalGrid) -> None:
    stranger = grid.create_message(RecordDict(), "train", 99, "1")
    action = grid.create_message(RecordDict(), "train.dance", 2, "1")
    reasons = [str(reply.error.reason) for reply in grid.send_and_receive([stranger, action])]
    assert "node_id is 99, allowed are 2 to 4" in reasons[0]
    assert "dance" in reasons[1]


def test_push_and_pull(grid: LocalGrid) -> None:
    ids = list(grid.push_messages([request(grid, 2), request(grid, 3)]))
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(ids[1:])] == [3]
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(ids)] == [2]


def test_neither_side_reaches_into_the_other() -> None:
    app, kept = ClientApp(), {}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        message.content["arrays"]["new"] = Array(torch.ones(1).numpy())
        answer = ArrayRecord({"w": Array(torch.zeros(2).numpy())})
        kept["answer"] = answer
        content = RecordDict({"arrays": answer, "metrics": MetricRecord({"loss": 1.0})})
        return Message(content, reply_to=message)

    grid = LocalGrid(app, 1)
    sent = ArrayRecord({"w": Array(torch.ones(2).numpy())})
    (reply,) = grid.send_and_receive([grid.create_message(RecordDict({"arrays": sent}), "train", 2, "1")])
    del kept["answer"]["w"]
    assert list(sent) == ["w"] and sent["w"].numpy().tolist() == [1, 1]
    assert reply.content["arrays"]["w"].numpy().tolist() == [0, 0]
