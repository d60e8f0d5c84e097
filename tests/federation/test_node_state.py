"""A participant's state on its disk: what is written, what a restart finds, and what damage costs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors import SafetensorError

from fluxlib.config import RunConfig
from fluxlib.federation import LocalGrid, Output, RunResult
from fluxlib.federation.client import background_profile, client_app, local_copy, node_state
from fluxlib.federation.protocol import wire
from fluxlib.federation.server.rounds import serve
from fluxlib.federation.store import tensor_file
from fluxlib.merging.slots import NOWHERE, Slots
from fluxlib.methods.base import ParticipantState

Make = Callable[..., RunConfig]


def arrays(**values: float) -> Any:
    return wire.make_record({name: wire.encode(torch.full((3, 5), value)) for name, value in values.items()})


@pytest.fixture
def state() -> RecordDict:
    plain = ConfigRecord({"version": 3, "digest": "ab", "raw": b"\x00\x01", "list": [1, 2]})
    return RecordDict({"held": plain, "experts": arrays(a=1.0, b=2.0), "m": MetricRecord({"x": 0.5})})


def test_what_is_kept_comes_back(state: RecordDict, tmp_path: Path) -> None:
    node_state.keep(tmp_path / "state", state)
    found = RecordDict()
    assert node_state.restore(tmp_path / "state", found) and found == state
    assert not node_state.restore(tmp_path / "nothing", RecordDict())


def test_merged_slots_come_back() -> None:
    state, place = RecordDict(), torch.tensor([[0, 0, NOWHERE]])
    stacks = {"down_proj": torch.randn(1, 2, 3)}
    slots = Slots(4, place, torch.rand(1, 3), torch.tensor([1.5]), stacks)
    node_state.save_state(state, ParticipantState(None, 5, slots))
    found = node_state.load_state(node_state.from_tensors(node_state.to_tensors(state))).slots
    assert found is not None and found.made == 4
    assert all(torch.equal(getattr(found, name), getattr(slots, name)) for name in ("place", "weight", "total"))
    assert torch.equal(found.stacks["down_proj"], stacks["down_proj"])
    node_state.save_state(state, ParticipantState(None, 6))
    assert node_state.load_state(state).slots is None


def flipped(data: bytes, at: int) -> bytes:
    return bytes(byte ^ (i == at % len(data)) for i, byte in enumerate(data))


def test_no_flipped_bit_is_taken_for_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tensor_file.write_tensors(path, {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor(3)}, '{"c": 1}')
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(flipped(data, at))
        with pytest.raises((OSError, ValueError, SafetensorError)):
            tensor_file.read_tensors(path)
    path.write_bytes(data)
    tensors, about = tensor_file.read_tensors(path)
    assert tensors["a"].tolist() == [1, 1] and tensors["b"].item() == 3 and about == '{"c": 1}'


@pytest.mark.parametrize(
    "damage", [lambda data: b"12", lambda data: data[:-5], lambda data: data[10:], lambda data: flipped(data, -5)]
)
def test_damage_is_noticed_and_the_file_is_usable_again(
    state: RecordDict, tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state"
    node_state.keep(path, state)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert not node_state.restore(path, RecordDict())
    assert "starts anew" in caplog.text
    found = RecordDict()
    node_state.keep(path, state)
    assert node_state.restore(path, found) and found == state


def test_a_full_disk_costs_a_warning(
    state: RecordDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state"
    node_state.keep(path, state)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "save_file", full)
    with caplog.at_level(logging.WARNING):
        node_state.keep(path, RecordDict({"experts": arrays(a=9.0)}))
    assert "No space left" in caplog.text
    found = RecordDict()
    assert node_state.restore(path, found) and found == state


def run(config: RunConfig, app: ClientApp | None = None, **node: Any) -> RunResult:
    local_copy.workspace.cache_clear()
    grid = LocalGrid(app or client_app.app, config.federation.participants, node_config=lambda _: node)
    return serve(grid, config, Output())


def restarting(after_round: int, damage: Callable[[Path], Any] | None = None, folder: Path | None = None) -> ClientApp:
    """A client app whose nodes lose what is in their memory after one round, and perhaps some of their node_state."""

    def handle(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if message.metadata.message_type == "train" and message.content["config"]["round"] == after_round:
            context.state = RecordDict()
            if damage and folder and context.node_config["partition-id"] == 1:
                damage(folder / "participant-1" / node_state.STATE)
        return reply

    app = ClientApp()
    app.query("join")(handle)
    app.query("profile")(handle)
    app.train()(handle)
    return app


def same(one: RunResult, other: RunResult, *columns: str) -> None:
    for name in ("metric", "loss", "train_loss", "uplink_bytes", *columns):
        assert one.rounds[name].tolist()[1:] == other.rounds[name].tolist()[1:], name
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "coded": {"wire.uplink": "int8", "wire.max_staleness": 2},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_restarted_node_goes_on_from_its_disk(make_config: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    config = make_config({"method": "flux"} | options)
    folder = {node_state.STATE_DIR: str(tmp_path)}
    found = run(config, restarting(1), **folder)
    same(found, run(config), "downlink_bytes", "device_s")
    assert (found.participants["rejected"] == "").all()


def flip(path: Path) -> None:
    path.write_bytes(flipped(path.read_bytes(), -5))


def test_a_damaged_disk_costs_a_full_download(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    found = run(config, restarting(2, flip, tmp_path), **{node_state.STATE_DIR: str(tmp_path)})
    plain = run(config)
    assert (found.participants["rejected"] == "").all()
    assert found.rounds["downlink_bytes"].iloc[3] > plain.rounds["downlink_bytes"].iloc[3]


def test_another_run_on_the_same_disk_starts_from_the_base(make_config: Make, tmp_path: Path) -> None:
    folder = {node_state.STATE_DIR: str(tmp_path)}
    run(make_config({"method": "flux", "seed": 1}), **folder)
    config = make_config({"method": "flux", "wire.uplink": "int8"})
    run(config, **folder)
    same(run(config, **folder), run(config))


def test_a_profile_after_the_reply_gives_the_same_numbers(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def at_once(folder: Path, state: RecordDict) -> None:
        if background_profile.PENDING in state:
            made.append(folder)
            background_profile.main(folder)

    monkeypatch.setattr(background_profile, "start", at_once)
    config = make_config({"method": "flux"})
    node = {node_state.STATE_DIR: str(tmp_path), background_profile.BACKGROUND: True}
    same(run(config, **node), run(config), "downlink_bytes", "device_s")
    assert len(made) == 9
    monkeypatch.setattr(background_profile, "start", lambda folder, state: None)  # the process died at once
    node[node_state.STATE_DIR] = str(tmp_path / "other")
    same(run(config, **node), run(config), "downlink_bytes", "device_s")


def test_a_real_process_profiles_while_the_others_work(make_config: Make, tmp_path: Path) -> None:
    config = make_config({"method": "flux", "federation.participants": 2, "federation.rounds": 2})
    node = {node_state.STATE_DIR: str(tmp_path), background_profile.BACKGROUND: True}
    same(run(config, **node), run(config), "downlink_bytes", "device_s")
    logs = [path.read_text() for path in tmp_path.glob("participant-*/profile.log")]
    assert len(logs) == 2 and not any("Traceback" in text for text in logs)
    result = RecordDict()
    assert node_state.restore(tmp_path / "participant-0" / background_profile.RESULT, result)
    assert node_state.load_state(result).profile_round >= 1
