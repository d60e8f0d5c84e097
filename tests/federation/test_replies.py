"""Every reason to refuse a reply, by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict

from fluxlib.config import make_config
from fluxlib.federation import LocalGrid
from fluxlib.federation.client import client_app
from fluxlib.federation.protocol import messages
from fluxlib.federation.protocol.messages import TrainReport
from fluxlib.federation.protocol.sync import ExpertStore, ModelVersion
from fluxlib.federation.protocol.wire import encode_changes
from fluxlib.federation.server.validation import (
    REASONS,
    Expected,
    Rejected,
    believable,
    most_counts,
    read_reply,
)
from fluxlib.methods.base import Update, Work

Change = Callable[[RecordDict], Any]


@pytest.fixture
def expected(store: ExpertStore) -> Expected:
    assigned = torch.zeros(2, 4, dtype=torch.bool)
    assigned[0, 1] = assigned[1, 2] = True
    return Expected(1, 3, ModelVersion(store.version, store.digest), "float32", assigned, store.shapes)


def good(expected: Expected, **changes: Any) -> Update:
    shapes = expected.shapes
    weights = {key: {n: torch.ones(s) for n, s in shapes[key].items()} for key in ((0, 1), (1, 2))}
    tokens, utilities = torch.ones(2, 4), torch.full((2, 4), math.nan)
    return replace(Update(weights, utilities, tokens, 1.0, 5, Work(8)), **changes)


def content_of(expected: Expected, update: Update, **header: Any) -> RecordDict:
    report = TrainReport(expected.participant, expected.round, expected.held, update=update)
    return replace(report, **header).to_records(encode_changes(update.changes, "float32", {})[0])


def reply_with(content: RecordDict | Error) -> Message:
    return Message(content, reply_to=LocalGrid(client_app.app, 1).create_message(RecordDict(), "train", 3, "3"))


def refused(content: RecordDict | Error, expected: Expected) -> str:
    with pytest.raises(Rejected) as caught:
        read_reply(reply_with(content), expected)
    return caught.value.reason


def test_a_good_reply_is_read(expected: Expected) -> None:
    report = read_reply(reply_with(content_of(expected, good(expected))), expected)
    assert set(report.update.changes) == {(0, 1), (1, 2)}


def test_a_reply_may_leave_out_experts_and_even_all(expected: Expected) -> None:
    assert read_reply(reply_with(content_of(expected, good(expected, changes={}))), expected).num_bytes == 0


def test_an_error_is_named_with_its_reason(expected: Expected) -> None:
    with pytest.raises(Rejected, match="error: it broke"):
        read_reply(reply_with(Error(2, "it broke")), expected)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"round": 2}, "stale"),
        ({"held": ModelVersion(5)}, "stale"),
        ({"held": ModelVersion(0, "0" * 64)}, "stale"),
        ({"participant": 0}, "unknown"),
    ],
)
def test_who_when_and_on_what_must_be_as_asked(expected: Expected, header: dict[str, Any], reason: str) -> None:
    assert refused(content_of(expected, good(expected), **header), expected) == reason


def test_asking_for_everything_twice_is_stale(expected: Expected) -> None:
    assert refused(messages.resync_request(), expected) == "stale"


def _drop(name: str) -> Change:
    return lambda content: content.pop(name)


def _set(record: str, key: str, value: Any) -> Change:
    return lambda content: content[record].__setitem__(key, value)


def _truncate(content: RecordDict) -> None:
    array = content["arrays"]["0.1.down_proj"]
    array.data = array.data[:-8]


@pytest.mark.parametrize(
    "damage",
    [
        _drop("arrays"),
        _drop("config"),
        _drop("metrics"),
        _truncate,
        _set("arrays", "no.key", Array(torch.ones(2).numpy())),
        _set("arrays", "0.1.down_proj", Array(torch.ones(8, 4).double().numpy())),
        _set("arrays", "0.1.down_proj", Array("float32", (8, 4), "pickle", b"\x80\x04.")),
        _set("config", "work", "not json"),
        _set("config", "work", '{"num_experts": 8, "surprise": 1}'),
        _set("config", "shape", [2, 400]),
        _set("config", "tokens", b"abc"),
        _set("config", "round", "three"),
        lambda content: content.__setitem__("config", ConfigRecord({"status": "done"})),
    ],
)
def test_damaged_records_are_malformed(expected: Expected, damage: Change) -> None:
    content = content_of(expected, good(expected))
    damage(content)
    assert refused(content, expected) == "malformed"


def _tensors(expected: Expected, key: tuple[int, int], **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    shapes = expected.shapes.get(key, expected.shapes[0, 0])
    return {name: torch.ones(shape) for name, shape in shapes.items()} | changes


@pytest.mark.parametrize(
    ("key", "changes", "reason"),
    [
        ((0, 9), {}, "unknown_expert"),
        ((7, 0), {}, "unknown_expert"),
        ((0, 1), {"extra": torch.ones(1)}, "unknown_expert"),
        ((0, 0), {}, "unassigned_expert"),
        ((0, 1), {"down_proj": torch.ones(4, 8)}, "wrong_shape"),
        ((0, 1), {"down_proj": torch.full((8, 4), math.nan)}, "not_finite"),
        ((0, 1), {"down_proj": torch.full((8, 4), -math.inf)}, "not_finite"),
    ],
)
def test_changes_must_be_of_assigned_experts_and_finite(
    expected: Expected, key: tuple[int, int], changes: dict[str, torch.Tensor], reason: str
) -> None:
    update = good(expected)
    update.changes[key] = _tensors(expected, key, **changes)
    assert refused(content_of(expected, update), expected) == reason


def test_half_an_expert_is_incomplete(expected: Expected) -> None:
    update = good(expected)
    del update.changes[0, 1]["down_proj"]
    assert refused(content_of(expected, update), expected) == "incomplete"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": math.nan}, "not_finite"),
        ({"loss": math.inf}, "not_finite"),
        ({"tokens": torch.full((2, 4), math.nan)}, "not_finite"),
        ({"utilities": torch.full((2, 4), math.inf)}, "not_finite"),
        ({"tokens": torch.full((2, 4), -1.0)}, "negative"),
        ({"utilities": torch.full((2, 4), -1.0)}, "negative"),
        ({"num_samples": -1}, "negative"),
        ({"tokens": torch.ones(2, 3), "utilities": torch.ones(2, 3)}, "wrong_shape"),
    ],
)
def test_numbers_beside_the_changes_are_checked_too(expected: Expected, changes: dict[str, Any], reason: str) -> None:
    assert refused(content_of(expected, good(expected, **changes)), expected) == reason


def test_reasons_have_a_description_and_others_do_not_exist() -> None:
    assert all(REASONS.values())
    with pytest.raises(ValueError, match="allowed are error"):
        Rejected("bad luck", "")


def test_what_is_no_believable_change() -> None:
    assert believable(torch.full((10, 10), -1e4)) and believable(torch.empty(0))
    for value in (math.nan, math.inf, -math.inf, 3e38, -1e7):
        assert not believable(torch.tensor([0.0, value, 1.0]))


@pytest.mark.parametrize(
    ("record", "key", "value"),
    [
        ("metrics", "num-examples", math.inf),
        ("config", "participant", math.inf),
        ("config", "work", "[" * 100_000),
        ("config", "work", '{"num_experts": 8, "train_tokens": 3.5}'),
        ("config", "work", '{"num_experts": 8, "train_tokens": 1e3}'),
        ("config", "participant", 1.0),
        ("config", "round", "3"),
        ("config", "version", 0.0),
        ("config", "stale", [0.5, 1.5, 2.5]),
        ("config", "stale", [1]),
        ("metrics", "num-examples", 5.0),
        ("metrics", "loss", [1.0]),
        ("arrays", "0." + "1" * 5000 + ".w", Array(torch.ones(1).numpy())),
        ("config", "work", '{"num_experts": 8, "train_tokens": "x"}'),
        ("config", "work", '{"num_experts": 8, "offloaded": 3}'),
        ("config", "phases", "[1]"),
        ("config", "phases", '{"train": "x"}'),
        ("config", "phases", '{"train": NaN}'),
    ],
)
def test_an_account_that_no_table_could_hold_is_malformed(
    expected: Expected, record: str, key: str, value: Any
) -> None:
    content = content_of(expected, good(expected))
    content[record][key] = value  # type: ignore[index]
    assert refused(content, expected) == "malformed"


@pytest.mark.parametrize("count", [-1, 10**16])
def test_a_count_that_no_round_has_is_refused(expected: Expected, count: int) -> None:
    content = content_of(expected, good(expected))
    content["config"]["work"] = json.dumps({"num_experts": 8, "train_tokens": count})
    assert refused(content, expected) == "not_finite"


@pytest.mark.parametrize("data", [b"PK\x03\x04garbage", b"\x93NUMPY", b""])
def test_bytes_that_are_no_array_are_malformed(expected: Expected, data: bytes) -> None:
    content = content_of(expected, good(expected))
    name = next(iter(content["arrays"]))
    content["arrays"][name] = Array("float32", content["arrays"][name].shape, "numpy.ndarray", data)
    assert refused(content, expected) == "malformed"


@pytest.mark.parametrize(
    "more",
    [
        {"tokens": torch.full((2, 4), 161.0)},
        {"num_samples": 9},
        {"work": Work(0)},
        {"work": Work(7)},
        {"work": Work(9)},
        *({"work": replace(Work(8), **{name: count})} for name, count in (
            ("num_tuned", 9), ("num_uploaded", 9), ("train_steps", 5), ("train_samples", 9), ("train_tokens", 161),
            ("routed_tokens", 10**15), ("profile_samples", 3), ("profile_tokens", 41), ("probe_samples", 10**15),
            ("weight_bits", 0), ("weight_bits", 33), ("download_bits", 0.5), ("upload_bits", 33.0),
        )),
    ],
    ids=str,
)  # fmt: skip
def test_more_than_was_asked_for_is_refused(expected: Expected, more: dict[str, Any]) -> None:
    """Four steps of two samples of twenty tokens, a profile of one batch, eight experts."""
    asked = make_config({"training.local_steps": 4, "training.batch_size": 2, "training.max_tokens": 20})
    asked = asked.updated({"profiling.batches": 1})
    some = replace(expected, most=most_counts(asked, 8))
    full = good(expected, tokens=torch.full((2, 4), 160.0), num_samples=8)
    work = Work(8, num_tuned=8, train_steps=4, train_samples=8, train_tokens=160, profile_samples=2, profile_tokens=40)
    assert read_reply(reply_with(content_of(expected, replace(full, work=work))), some).update.num_samples == 8
    assert refused(content_of(expected, good(expected, **more)), some) == "not_finite"


def test_what_is_said_of_a_reply_is_short_and_can_be_printed(expected: Expected) -> None:
    content = content_of(expected, good(expected))
    content["config"]["phases"] = '{"' + "x" * 10_000 + '\\ud800": -1}'  # type: ignore[index]
    content["config"]["work"] = '{"\\ud800' + "x" * 10_000 + '": 1, "num_experts": 8}'  # type: ignore[index]
    for bad in (content, Error(2, "\ud800" + "y" * 10_000)):
        with pytest.raises(Rejected) as caught:
            read_reply(reply_with(bad), expected)
        assert len(str(caught.value).encode()) < 400
