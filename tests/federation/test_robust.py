"""Robust aggregation: what a bad change can and cannot do; and why Flower's own mods cannot clip some experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod

from fluxlib import federation
from fluxlib.config import RunConfig
from fluxlib.federation import LocalGrid
from fluxlib.federation.client import client_app
from fluxlib.federation.server.aggregation import RobustAggregate, clip, trimmed_mean

RULES = ("trimmed_mean", "median")

TOKENS = torch.ones(2, 4)


def combined(kind: str, *values: float, trim: float = 0.2) -> float:
    found = RobustAggregate(kind, trim)
    for value in values:
        found.add({(0, 1): {"w": torch.full((2,), value)}}, TOKENS)
    return float(found.result()[0, 1]["w"][0])


def test_trimmed_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 5.0], [2.0, 4.0], [9.0, -50.0], [3.0, 6.0]])
    assert trimmed_mean(values, 1).tolist() == [2.5, 4.5]
    assert trimmed_mean(values, 0).tolist() == [3.75, -8.75]


@pytest.mark.parametrize("kind", RULES)
def test_one_liar_among_five_moves_nothing_far(kind: str) -> None:
    assert 0.9 <= combined(kind, 1.0, 1.1, 1e6, 0.9, 1.0) <= 1.1


def test_medians_and_trimmed_means_by_hand() -> None:
    assert combined("median", 1.0, 2.0, 50.0) == 2.0
    assert combined("median", 1.0, 2.0, 4.0, 50.0) == 3.0
    assert combined("trimmed_mean", 0.0, 1.0, 2.0, 3.0, 50.0) == 2.0


def test_with_two_tuners_nobody_can_tell_and_with_one_it_is_taken_as_it_is() -> None:
    assert combined("median", 1.0, 3.0) == combined("trimmed_mean", 1.0, 3.0) == 2.0
    assert all(combined(kind, 7.0) == 7.0 for kind in RULES)


def test_each_expert_is_combined_over_those_who_tuned_it() -> None:
    found = RobustAggregate("median", 0.2)
    found.add({(0, 0): {"w": torch.ones(1)}, (1, 2): {"w": torch.tensor([5.0])}}, TOKENS)
    found.add({(0, 0): {"w": torch.ones(1) * 3}}, TOKENS)
    assert {key: float(t["w"]) for key, t in found.result().items()} == {(0, 0): 2.0, (1, 2): 5.0}


def test_the_norm_that_is_clipped_is_of_all_experts_together() -> None:
    changes = {(0, 1): {"w": torch.tensor([3.0, 0.0])}, (1, 2): {"w": torch.tensor([0.0, 4.0])}}
    clipped = clip(changes, 2.5)
    assert clipped[0, 1]["w"].tolist() == [1.5, 0.0] and clipped[1, 2]["w"].tolist() == [0.0, 2.0]
    assert clip(changes, 5.0) is changes and clip(changes, None) is changes and clip({}, 1.0) == {}


@pytest.mark.parametrize(
    "options",
    [{"aggregation.clip_norm": 0.05}, {"aggregation.rule": "median"}, {"aggregation.rule": "trimmed_mean"}],
    ids=str,
)
def test_runs_go_through_and_repeat_with_every_option(
    make_config: Callable[..., RunConfig], options: dict[str, Any]
) -> None:
    plain, one, other = (federation.run(make_config({"federation.rounds": 2} | o)) for o in ({}, options, options))
    assert (one.participants["rejected"] == "").all()
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(one.model.parameters(), plain.model.parameters(), strict=True))


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod, LocalDpMod(1.0, 1.0, 1.0, 1e-5)])
def test_flowers_mods_refuse_a_reply_with_some_experts(mod: Any) -> None:
    """Why they are not used: they compare the reply's arrays with the request's, one by one."""

    def app(message: Message, context: Context) -> Message:
        arrays = ArrayRecord({"0.1.w": Array(torch.ones(2).numpy())})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"loss": 1.0})}), reply_to=message)

    arrays = ArrayRecord({f"0.{e}.w": Array(torch.zeros(2).numpy()) for e in (0, 1)})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"clipping_norm": 1.0})})
    message = LocalGrid(client_app.app, 1).create_message(content, "train", 2, "1")
    reply = mod(message, Context(1, 2, {}, RecordDict(), {}), app)
    assert reply.has_error() and "expects the keys in the ArrayRecord of the reply" in str(reply.error.reason)
