"""What other engines do to messages and states: everything goes through bytes, and the numbers stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from flwr.app import Message

from fluxlib import federation
from fluxlib.config import RunConfig
from fluxlib.federation import LocalGrid


def through_bytes(content: Any) -> Any:
    """Flower's own way: what a record holds travels by itself, and is put together again."""
    children = {name: through_bytes(child) for name, child in (content.children or {}).items()}
    return type(content).inflate(content.deflate(), children or None)


@pytest.mark.parametrize("method", ["fake", "flux", "fmd"])
def test_messages_and_states_may_be_serialised_at_every_step(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = make_config({"method": method, "federation.rounds": 2})
    expected = federation.run(config)
    deliver = LocalGrid._deliver

    def over_the_wire(grid: LocalGrid, message: Message) -> Message | None:
        message.content = through_bytes(message.content)
        reply = deliver(grid, message)
        assert reply is not None
        reply.content = through_bytes(reply.content)
        context = grid.context(message.metadata.dst_node_id)
        context.state = through_bytes(context.state)
        return reply

    monkeypatch.setattr(LocalGrid, "_deliver", over_the_wire)
    found = federation.run(config)
    for one, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)
    same = ["round", "metric", "loss", "train_loss", "device_s", "uplink_bytes", "downlink_bytes", "num_rejected"]
    pd.testing.assert_frame_equal(found.rounds[same], expected.rounds[same], check_exact=True)
