"""What other engines do to messages and states: everything goes through bytes, and the numbers stay the same."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fluxlib import federation
from fluxlib.config import RunConfig
from fluxlib.federation import LocalGrid


def through_bytes(content: RecordDict) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(recorddict_to_proto(content).SerializeToString()))


@pytest.mark.parametrize("method", ["fake", "flux", "fmd"])
def test_messages_and_states_may_be_serialised_at_every_step(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = make_config({"method": method, "federation.rounds": 2})
    expected = federation.run(config)
    deliver = LocalGrid._deliver

    def over_the_wire(grid: LocalGrid, message: Message, timeout: float | None) -> Message | None:
        message.content = through_bytes(message.content)
        reply = deliver(grid, message, timeout)
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
