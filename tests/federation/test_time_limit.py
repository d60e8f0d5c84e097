"""A call that hangs is given up, ended where it can be, and harms nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fluxlib import federation
from fluxlib.config import RunConfig
from fluxlib.federation.client import client_app, local_copy


def test_what_is_in_time_comes_back_or_raises() -> None:
    assert client_app.in_time(None, divmod, 7, 2) == client_app.in_time(30, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        client_app.in_time(30, divmod, 7, 0)


def test_a_hung_call_is_given_up_and_its_thread_ends() -> None:
    state = {"steps": 0, "ended": False}

    def hang() -> None:
        try:
            while True:
                try:
                    state["steps"] += 1
                    time.sleep(0.001)
                except Exception:  # what a careless participant does
                    continue
        finally:
            state["ended"] = True

    with pytest.raises(client_app.TimeLimitExceeded, match="longer than the 0.05 s it may take"):
        client_app.in_time(0.05, hang)
    for thread in threading.enumerate():
        if thread.name == "limited":
            thread.join(10)
    assert state["ended"]


@pytest.mark.parametrize("where", ["before", "within"])
def test_a_participant_that_hangs_costs_its_reply_and_nothing_else(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It wakes up after it was given up, and would go on with a model that others use by then."""
    from fluxlib import methods

    config = make_config({"federation.round_timeout_s": 2.0, "federation.min_replies_frac": 0.5})
    plain = methods.METHODS["fake"].train
    calls: list[int] = []
    hung = threading.Event()

    def wait() -> None:
        hung.set()
        end = time.monotonic() + 3
        while time.monotonic() < end:
            time.sleep(0.01)

    def train(model: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            if where == "within":
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.zero_()
            wait()
        return plain(model, *rest)

    import dataclasses

    monkeypatch.setitem(methods.METHODS, "fake", dataclasses.replace(methods.METHODS["fake"], train=train))
    result = federation.run(config)
    assert hung.is_set()
    people = result.participants
    assert people.query("rejected != ''")[["round", "participant", "rejected"]].values.tolist() == [[2, 1, "missing"]]

    def lost(model: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the reply is lost in another way")
        return plain(model, *rest)

    calls.clear()
    local_copy.workspace.cache_clear()
    monkeypatch.setitem(methods.METHODS, "fake", dataclasses.replace(methods.METHODS["fake"], train=lost))
    other = federation.run(config)
    for a, b in zip(result.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
