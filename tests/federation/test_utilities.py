"""Utilities that lie, lack or come late: bounded, and reported in the run's own tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from fluxlib import federation, methods, records
from fluxlib.config import RunConfig
from fluxlib.federation.client import client_app

from .conftest import FAKE
from .test_run import NODE, wrapped

Make = Callable[..., RunConfig]


def run(make_config: Make, monkeypatch: pytest.MonkeyPatch, change: Callable[[float], float]) -> Any:
    """A run in which participant 1 changes each utility that it measured."""
    honest = replace(FAKE, name="honest", utilities=True, explores=True)
    monkeypatch.setitem(methods.METHODS, honest.name, honest)

    def lie(request: Message, reply: Message, context: Context) -> Message:
        if context.node_id == NODE:
            values = np.frombuffer(reply.content["config"]["utilities"], np.float32)
            told = np.array([change(v) if v == v else v for v in values], np.float32)
            reply.content["config"]["utilities"] = told.tobytes()
        return reply

    monkeypatch.setattr(client_app, "app", wrapped(lie))
    return federation.run(make_config({"method": honest.name, "federation.participants": 4, "federation.rounds": 2}))


def faults(result: Any) -> dict[int, set[str]]:
    rows = result.participants
    kinds = {p: {k for text in part["utility_faults"] for k in text.split() if k.isalpha()}
             for p, part in rows.groupby("participant")}  # fmt: skip
    return {int(p): found for p, found in kinds.items()}


def test_a_huge_utility_is_cut_and_named_in_the_table(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(make_config, monkeypatch, lambda value: 1e12)
    assert faults(result) == {0: set(), 1: {"huge"}, 2: set(), 3: set()}
    assert (result.participants["rejected"] == "").all()


def test_a_utility_that_never_comes_is_missing(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(make_config, monkeypatch, lambda value: math.nan)
    assert faults(result) == {0: set(), 1: {"missing"}, 2: set(), 3: set()}
    # 8 experts, half of them in the budget: all of what was tuned or is probed lacks.
    rows = result.participants[result.participants["participant"] == 1]
    assert set(rows["utility_faults"]) == {"4 missing"}


@pytest.mark.parametrize(("value", "reason"), [(-1.0, "negative"), (math.inf, "not_finite")])
def test_impossible_utilities_refuse_the_reply(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, value: float, reason: str
) -> None:
    result = run(make_config, monkeypatch, lambda _: value)
    assert result.participants.groupby("participant")["rejected"].first().tolist() == ["", reason, "", ""]


def test_a_method_without_utilities_is_not_accused(make_config: Make) -> None:
    result = federation.run(make_config({"federation.participants": 4, "federation.rounds": 1}))
    assert (result.participants["utility_faults"] == "").all()


def test_the_table_names_the_experts_of_each_role(make_config: Make) -> None:
    row = federation.run(make_config({"federation.rounds": 1})).participants.iloc[0]
    exploited, explored = (records.read_experts(row[name]) for name in ("exploited", "explored"))
    assert len(exploited) == row["num_tuned"] and len(explored) == row["num_explored"]
    assert not set(exploited) & set(explored)
    assert all(0 <= layer < 2 and 0 <= expert < 4 for layer, expert in exploited + explored)
