"""Whole runs with every way of sending experts: bytes, faults, and going on after a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fluxlib import federation
from fluxlib.config import RunConfig
from fluxlib.config import make_config as checked_config
from fluxlib.federation.client import client_app
from fluxlib.io import ConfigError

Make = Callable[..., RunConfig]

OPTIONS: dict[str, dict[str, Any]] = {
    "int8 up": {"wire.uplink": "int8"},
    "int8 down": {"wire.downlink": "int8"},
    "stale": {"wire.max_staleness": 2},
    "all": {"wire.max_staleness": 2, "wire.uplink": "int8", "wire.downlink": "int8"},
}


class Killed(BaseException):
    """Stands for the process's end."""


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def option(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def same(one: federation.RunResult, other: federation.RunResult) -> None:
    keep = [name for name in one.rounds.columns if not name.endswith("wall_s") and name != "peak_memory_bytes"]
    pd.testing.assert_frame_equal(one.rounds[keep], other.rounds[keep], check_exact=True)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fewer_bytes_less_time_nothing_refused_nearly_the_same_model(make_config: Make, option: dict[str, Any]) -> None:
    plain, found = (federation.run(make_config({"method": "flux", "clock.link": "100mbps"} | o)) for o in ({}, option))
    assert (found.participants["rejected"] == "").all()
    link = ["download_device_s", "upload_device_s"]
    assert found.participants[link].sum().sum() < plain.participants[link].sum().sum()
    for direction in ("uplink", "downlink"):
        less = f"wire.{direction}" in option or (direction == "downlink" and "wire.max_staleness" in option)
        name = f"{direction}_bytes"
        assert (found.rounds[name].sum() < plain.rounds[name].sum()) == less
    for a, b in zip(found.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_a_killed_run_ends_as_an_uninterrupted_one(make_config: Make, option: dict[str, Any], tmp_path: Path) -> None:
    def kill(row: dict[str, Any]) -> None:
        if row["round"] == 2:
            raise Killed

    people = {"federation.rounds": 4, "federation.participants": 4, "federation.participants_per_round": 3}
    config = make_config(option | people)
    with pytest.raises(Killed):
        federation.run(config, on_round=kill, out=tmp_path)
    same(federation.run(config, out=tmp_path), federation.run(config))


def test_a_participant_that_lost_its_state_recovers(
    make_config: Make, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = ClientApp()
    original = client_app.app

    def forgetful(message: Message, context: Context) -> Message:
        reply = original(message, context)
        if context.node_id == 3 and message.content["config"]["round"] == 2:
            for name in ("held", "experts"):
                del context.state[name]
        return reply

    app.query("join")(forgetful)
    app.query("profile")(original)
    app.train()(forgetful)
    monkeypatch.setattr(client_app, "app", app)
    result = federation.run(make_config(option))
    assert (result.participants["rejected"] == "").all()
    sent = result.participants.query("round == 3").set_index("participant")["downlink_bytes"]
    assert sent[2 - 1] > sent[0]


def test_what_is_no_wire_type_is_refused_by_name() -> None:
    for name in ("wire.uplink", "wire.downlink"):
        with pytest.raises(ConfigError, match=f"{name}: Input should be 'float32', 'bfloat16' or 'int8', got 'int1'"):
            checked_config({name: "int1"})
    with pytest.raises(ConfigError, match="wire.max_staleness: Input should be greater than or equal to 0"):
        checked_config({"wire.max_staleness": -1})
