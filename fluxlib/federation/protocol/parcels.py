"""Small arrays in one parcel, between machines: Flower sends every array in requests of its own.

An expert of a small model is three arrays of a few kilobytes, and a round has hundreds. On a SuperLink each is written
into a database and signed for by itself, which takes longer than the way. So the server packs what it sends, and who
got parcels answers with parcels. Arrays of :data:`LARGE` bytes travel by themselves, so that nobody holds a large model
twice. In process nothing is packed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from pydantic import NonNegativeInt, TypeAdapter

from fluxlib.federation.protocol.wire import WireError, make_array, make_record
from fluxlib.io import brief, reading

MARK = "parcels"
"""Name of the record that says that a message has parcels, and that the reply may have them too."""
LARGE = 16 * 2**20
_STYPE = "fluxlib.parcel"
_LENGTH = 8
"""Bytes of a parcel's first number: how long its list of contents is."""
_CONTENTS = TypeAdapter(list[tuple[str, str, tuple[NonNegativeInt, ...], str, NonNegativeInt]])
"""Name, type, shape and form of each array, and its bytes."""


def pack(content: RecordDict) -> RecordDict:
    """A message's content with its arrays in parcels."""
    packed = {
        name: make_record(dict(_packed(record))) if isinstance(record, ArrayRecord) else record
        for name, record in content.items()
    }
    return RecordDict({**packed, MARK: ConfigRecord({"large": LARGE})})


@reading("parcels", WireError)
def unpack(content: RecordDict) -> RecordDict:
    """Inverse of :func:`pack`; content that was not packed as it is. WireError: bytes are not what a parcel lists."""
    if MARK not in content:
        return content
    records = {name: record for name, record in content.items() if name != MARK}
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            records[name] = make_record(dict(_unpacked(record)))
    return RecordDict(records)


def use_parcels(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod of the client app: the app and all other mods see ordinary arrays."""
    packed = MARK in message.content
    message.content = unpack(message.content)
    reply = call_next(message, context)
    if packed and reply.has_content():
        reply.content = pack(reply.content)
    return reply


def _packed(record: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    waiting: dict[str, Array] = {}
    size, number = 0, 0
    for name, array in record.items():
        if waiting and size + len(array.data) > LARGE:
            yield f"parcel.{number}", _parcel(waiting)
            waiting, size, number = {}, 0, number + 1
        if len(array.data) >= LARGE:
            yield name, array
        else:
            waiting[name] = array
            size += len(array.data)
    if waiting:
        yield f"parcel.{number}", _parcel(waiting)


def _parcel(arrays: Mapping[str, Array]) -> Array:
    listed = [[name, a.dtype, list(a.shape), a.stype, len(a.data)] for name, a in arrays.items()]
    index = json.dumps(listed).encode()
    data = b"".join([len(index).to_bytes(_LENGTH, "little"), index, *(array.data for array in arrays.values())])
    return make_array("uint8", (len(data),), _STYPE, data)


def _unpacked(record: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    for name, array in record.items():
        if array.stype != _STYPE:
            yield name, array
            continue
        data, start = array.data, _LENGTH + int.from_bytes(array.data[:_LENGTH], "little")
        listed = _CONTENTS.validate_json(data[_LENGTH:start], strict=True)
        if start + sum(size for *_, size in listed) != len(data):
            raise WireError(f"{brief(name)} has {len(data)} bytes, its list of contents says otherwise")
        for label, dtype, shape, stype, size in listed:
            if stype == _STYPE or size < math.prod(shape) * np.dtype(dtype).itemsize:
                raise ValueError(f"{label!r} of type {dtype!r} ({stype!r}) has shape {shape} in {size} bytes")
            yield label, make_array(dtype, shape, stype, data[start : start + size])
            start += size
