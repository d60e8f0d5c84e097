"""Messages: what is read is what was written, and nothing else travels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fluxlib.config import RunConfig
from fluxlib.federation import LocalGrid
from fluxlib.federation.client import client_app, participant
from fluxlib.federation.client.local_data import load_task
from fluxlib.federation.client.node_state import load_state, save_state
from fluxlib.federation.protocol.messages import Instruction, ProfileReport, TrainReport
from fluxlib.federation.protocol.sync import ExpertStore, ModelVersion
from fluxlib.federation.protocol.wire import Form, WireError, encode_changes
from fluxlib.methods.base import Budget, ParticipantState, Update, Work
from fluxlib.profiling import Profile
from fluxlib.roles import Roles


def test_an_instruction_is_read_as_it_was_written(store: ExpertStore, make_config: Callable[..., RunConfig]) -> None:
    exploit = torch.tensor([[True, False, False, True], [False, True, False, False]])
    instruction = Instruction(make_config(), 3, 1, store.delta(), Roles(exploit, ~exploit), Budget(3, 5))
    again = Instruction.from_records(instruction.to_records())
    assert again.config == make_config()
    assert again.roles is not None and again.budget == Budget(3, 5)
    assert torch.equal(again.roles.exploit, exploit) and torch.equal(again.roles.explore, ~exploit)
    assert (again.round, again.participant, again.delta) == (3, 1, instruction.delta)


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_a_report_is_read_as_it_was_written(wire: Form) -> None:
    update = Update(
        changes={(0, 3): {"w": torch.tensor([[0.5, -1.25]])}, (1, 0): {"w": torch.ones(1, 2)}},
        utilities=torch.tensor([[1.0, torch.nan]]),
        tokens=torch.tensor([[7, 0]]),
        loss=2.5,
        num_samples=12,
        work=Work(8, num_tuned=2, hidden_profile=True),
        phases_s={"train": 0.5},
    )
    held = ModelVersion(3, "d" * 64, frozenset({(0, 1, 2)}))
    content = TrainReport(1, 4, held, update=update).to_records(encode_changes(update.changes, wire, {})[0])
    again = TrainReport.from_records(content, wire, {})
    assert (again.participant, again.round, again.held) == (1, 4, held)
    assert again.num_bytes == (16 if wire == "float32" else 8)
    assert set(again.update.changes) == set(update.changes)
    assert torch.equal(again.update.changes[0, 3]["w"].float(), update.changes[0, 3]["w"])
    assert torch.equal(again.update.utilities.isnan(), update.utilities.isnan())
    assert torch.equal(again.update.tokens, update.tokens.float())
    assert (again.update.work, again.update.loss, again.update.phases_s) == (update.work, 2.5, {"train": 0.5})


def test_a_profile_report_is_read_as_it_was_written() -> None:
    frequency = torch.tensor([[0.25, 0.75]])
    report = ProfileReport(0, 1, ModelVersion(), frequency, Work(2, profile_samples=3), {"profile": 1.0})
    again = ProfileReport.from_records(report.to_records())
    assert torch.equal(again.frequency, frequency)
    assert (again.work, again.phases_s) == (report.work, {"profile": 1.0})


def test_a_participants_state_survives_in_records() -> None:
    profile = Profile(torch.tensor([[0.25, 0.75]]), torch.tensor([[1, 3]]), torch.rand(1, 2), 17, ((2, 1, 8, 4),))
    state = RecordDict()
    save_state(state, ParticipantState(profile, 5))
    again = load_state(state)
    assert again.profile is not None and again.profile_round == 5
    for name in ("frequency", "tokens", "attention"):
        assert torch.equal(getattr(again.profile, name), getattr(profile, name))
        assert getattr(again.profile, name).dtype == getattr(profile, name).dtype
    assert (again.profile.num_tokens, again.profile.fingerprint) == (17, ((2, 1, 8, 4),))
    save_state(state, ParticipantState(None, 6))
    assert load_state(state) == ParticipantState(None, 6)
    assert load_state(RecordDict()) == ParticipantState()


@pytest.mark.parametrize("bit", range(0, 8 * 128, 5))
def test_a_flipped_bit_in_a_kept_arrays_header_is_an_error_of_our_own(bit: int) -> None:
    """``numpy.load`` parses the header as Python, and raises what its tokenizer raises."""
    frequency = torch.tensor([[0.25, 0.75]])
    state = RecordDict()
    save_state(state, ParticipantState(Profile(frequency, frequency.long(), frequency, 17)))
    array = state["profile"]["frequency"]
    data = bytearray(array.data)
    data[bit // 8] ^= 1 << bit % 8
    array.data = bytes(data)
    with pytest.raises(WireError, match="a participant's state: array claims"):
        load_state(state)


def test_a_state_that_is_something_else_is_an_error_of_our_own() -> None:
    for values in ({}, {"profile": "[1]", "profile_round": 1}, {"profile": "{}", "profile_round": 0.5}):
        state = RecordDict({"participant": ConfigRecord(values), "profile": ArrayRecord()})  # type: ignore[arg-type]
        with pytest.raises(WireError, match="a participant's state"):
            load_state(state)


def test_no_text_and_no_sample_leaves_a_participant(
    make_config: Callable[..., RunConfig], store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Message] = []
    deliver = LocalGrid._deliver

    def watch(grid: LocalGrid, message: Message) -> Message | None:
        reply = deliver(grid, message)
        sent.append(reply)
        return reply

    monkeypatch.setattr(LocalGrid, "_deliver", watch)
    from fluxlib import federation

    config = make_config({"method": "fake-profiling", "federation.rounds": 1})
    federation.run(config)
    assert {reply.metadata.message_type for reply in sent} == {"query.join", "query.profile", "train"}
    samples = load_task(config)[0].train
    texts = [sample.prompt for sample in samples] + [sample.response for sample in samples]
    allowed = {
        "arrays": None,
        "metrics": {"loss", "num-examples"},
        "config": {"participant", "round", "version", "digest", "frozen_digest", "stale", "device",
                   "shape", "frequency", "utilities", "tokens", "work", "phases"},
    }  # fmt: skip
    for reply in sent:
        for name, record in reply.content.items():
            keys = allowed[name]
            assert keys is None or set(record) <= keys
            assert not any(text in str(value) for value in record.values() for text in texts if len(text) > 8)


def test_a_node_refuses_a_message_for_another(make_config: Callable[..., RunConfig], store: ExpertStore) -> None:
    grid = LocalGrid(client_app.app, 3)
    instruction = Instruction(make_config(), 1, 2, store.delta())
    (reply,) = grid.send_and_receive([grid.create_message(instruction.to_records(), "train", 2, "1")])
    assert "message is for participant 2, this is 0" in str(reply.error.reason)


def test_a_node_without_a_partition_says_so(make_config: Callable[..., RunConfig], store: ExpertStore) -> None:
    instruction = Instruction(make_config(), 1, 0, store.delta())
    message = LocalGrid(client_app.app, 1).create_message(instruction.to_records(), "train", 2, "1")
    with pytest.raises(participant.ParticipantError, match="partition-id"):
        client_app.app(message, Context(1, 2, {}, RecordDict(), {}))
