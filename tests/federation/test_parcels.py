"""Arrays in parcels: the same arrays come out, and bytes that lie are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fluxlib import federation
from fluxlib.federation.client import client_app
from fluxlib.federation.protocol import parcels
from fluxlib.federation.protocol.wire import WireError, encode, make_record


def content(*lengths: int) -> RecordDict:
    arrays = {f"0.{n}.down_proj": encode(torch.arange(float(length))) for n, length in enumerate(lengths)}
    return RecordDict({"arrays": make_record(arrays), "config": ConfigRecord({"round": 3})})


def test_what_was_packed_comes_out_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcels, "LARGE", 1000)
    sent = content(4, 60, 300, 2, 100, 100)  # bytes: 128 of header and 4 a number
    packed = parcels.pack(sent)
    assert list(packed["arrays"]) == ["parcel.0", "0.2.down_proj", "parcel.1", "parcel.2"]
    opened = parcels.unpack(packed)
    assert list(opened) == ["arrays", "config"] and opened["config"] == sent["config"]
    assert list(opened["arrays"]) == list(sent["arrays"])
    for name, array in sent["arrays"].items():
        got = opened["arrays"][name]
        assert (got.dtype, tuple(got.shape), got.stype, got.data) == (
            array.dtype, tuple(array.shape), array.stype, array.data,
        )  # fmt: skip


def test_content_that_was_not_packed_stays_as_it_is() -> None:
    sent = content(3)
    assert parcels.unpack(sent) is sent


@pytest.mark.parametrize(
    ("listed", "body", "said"),
    [
        ("nothing", b"", "parcels: .*Invalid JSON"),
        ([["a", "float32", [1], "numpy.ndarray"]], b"", "parcels: .* Field required"),
        ([["a", "float32", [1], "fluxlib.parcel", 4]], b"1234", "'a' of type 'float32'"),
        ([["a", "f4,(", [1], "numpy.ndarray", 4]], b"1234", "parcels: "),
        ([["a", "float32", [-1], "numpy.ndarray", 4]], b"1234", "greater than or equal to 0"),
        ([["a", "float32", [9], "numpy.ndarray", 4]], b"1234", "in 4 bytes"),
        ([["a", "float32", [1], "numpy.ndarray", 4]], b"12345", "says otherwise"),
    ],
)
def test_bytes_that_lie_are_refused(listed: Any, body: bytes, said: str) -> None:
    index = json.dumps(listed).encode() if listed != "nothing" else b"nothing"
    data = len(index).to_bytes(8, "little") + index + body
    array = Array(dtype="uint8", shape=(len(data),), stype="fluxlib.parcel", data=data)
    with pytest.raises(WireError, match=said):
        parcels.unpack(RecordDict({"arrays": ArrayRecord({"parcel.0": array}), parcels.MARK: ConfigRecord()}))


def test_who_gets_parcels_answers_with_parcels() -> None:
    grid = federation.LocalGrid(client_app.app, 1)
    seen = []

    def app(message: Message, context: Context) -> Message:
        seen.append(list(message.content["arrays"]))
        return Message(content(2, 2), reply_to=message)

    for sent, names in ((content(1), ["0.0.down_proj", "0.1.down_proj"]), (parcels.pack(content(1)), ["parcel.0"])):
        message = grid.create_message(sent, "train", 2, "1")
        reply = parcels.use_parcels(message, Context(1, 2, {}, RecordDict(), {}), app)
        assert list(reply.content["arrays"]) == names
    assert seen == [["0.0.down_proj"]] * 2
