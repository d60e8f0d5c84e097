"""Error feedback: what rounding takes from a change is not lost but late."""

from __future__ import annotations

import torch
from flwr.app import RecordDict

from fluxlib.federation.client import feedback
from fluxlib.federation.protocol import wire
from fluxlib.federation.protocol.messages import TrainReport
from fluxlib.methods.base import Update, Work

KEY = (0, 1)


def send(changes: dict, state: RecordDict) -> dict[str, torch.Tensor]:
    """One round: what arrives at the server."""
    total = feedback.add_residual(changes, state)
    update = Update(total, torch.zeros(1, 2), torch.zeros(1, 2), 0.0, 1, Work(2))
    sent = TrainReport(0, 1, 0, "", update=update).to_records("int8")["arrays"]
    feedback.keep_residual(total, sent, "int8", state)
    return {name: wire.decode(array, "int8", (3, 50)) for name, array in sent.items()}


def test_sums_of_what_arrives_stay_within_one_rounding_of_what_was_sent() -> None:
    state, chance = RecordDict(), torch.Generator().manual_seed(0)
    arrived, sent = torch.zeros(3, 50), torch.zeros(3, 50)
    for _ in range(20):
        change = torch.randn(3, 50, generator=chance)
        change[:, 0] = 0.004  # far below one step of its block
        arrived += send({KEY: {"w": change}}, state)["0.1.w"]
        sent += change
    assert (arrived - sent).abs().max() < 0.05
    assert (arrived[:, 0] - 0.08).abs().max() < 0.05
    torch.testing.assert_close(arrived + wire.decode(state["residual"]["0.1.w"]), sent)


def test_an_expert_that_is_not_tuned_keeps_its_residual() -> None:
    state = RecordDict()
    send({KEY: {"w": torch.linspace(0, 1, 150).view(3, 50)}}, state)
    before = wire.decode(state["residual"]["0.1.w"])
    send({(0, 0): {"w": torch.ones(3, 50)}}, state)
    assert torch.equal(wire.decode(state["residual"]["0.1.w"]), before)
    assert set(state["residual"]) == {"0.1.w", "0.0.w"}
