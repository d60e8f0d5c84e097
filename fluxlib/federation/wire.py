"""How an expert's tensors look on the wire: Flower arrays, byte for byte those of ``numpy.save``.

An expert travels as one :class:`flwr.app.Array` per tensor under the key ``"<layer>.<expert>.<name>"``. Flower's own
conversion costs 40 microseconds a tensor, mostly header parsing; this one costs about a tenth and reads and writes
the same bytes, so Flower's mods and other engines see ordinary arrays.

* :func:`encode`, :func:`decode`   tensor to array and back
* :func:`num_bytes`                payload of an array, headers excluded: what the tables call bytes
* :func:`digest`, :func:`tensors_digest`   SHA-256 of an expert in its wire form
* :func:`share`                    the same arrays behind new containers, for messages passed by reference
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fluxlib.methods.base import ExpertKey

WireType = Literal["float32", "bfloat16"]
WIRE_TYPES: tuple[WireType, ...] = ("float32", "bfloat16")
"""``float32``: exact. ``bfloat16``: half the bytes, sent as a ``uint16`` view because NumPy has no bfloat16."""

_NUMPY_NAME = {"float32": "float32", "bfloat16": "uint16"}
_STYPE = "numpy.ndarray"


class WireError(ValueError):
    """Bytes that are not what they claim to be; the message names the tensor."""


@lru_cache(maxsize=65536)
def key_name(key: ExpertKey, tensor: str) -> str:
    """``(3, 7), "down_proj"`` to ``"3.7.down_proj"``."""
    return f"{key[0]}.{key[1]}.{tensor}"


@lru_cache(maxsize=65536)
def parse_name(name: str) -> tuple[ExpertKey, str]:
    """``"3.7.down_proj"`` to ``((3, 7), "down_proj")``.

    Raises:
        WireError: another form of key.
    """
    layer, _, rest = name.partition(".")
    expert, _, tensor = rest.partition(".")
    if not (layer.isdecimal() and expert.isdecimal() and tensor):
        raise WireError(f"array key is {name!r}, allowed is '<layer>.<expert>.<tensor>'")
    return (int(layer), int(expert)), tensor


def encode(tensor: Tensor, wire: WireType = "float32") -> Array:
    """A Flower array with its own copy of ``tensor``'s values, rounded to ``wire``."""
    values = wire_view(tensor, wire)
    data = b"".join((_header(values.dtype.str, values.shape), values.data.cast("B")))
    return _shell({"dtype": _NUMPY_NAME[wire], "shape": values.shape, "stype": _STYPE, "data": data})


def make_record(arrays: dict[str, Array]) -> ArrayRecord:
    """An ``ArrayRecord`` of ``arrays``.

    Flower checks every item on its way in, at 20 microseconds each; these are known to be arrays under text keys.
    """
    record = ArrayRecord()
    record.__dict__["_data"].update(arrays)
    return record


def decode(array: Array, wire: WireType = "float32") -> Tensor:
    """The tensor of ``array``, in memory of its own; float32 or bfloat16 on the CPU.

    Raises:
        WireError: another type than ``wire``, or bytes that do not fit the stated shape.
    """
    expected = _NUMPY_NAME[wire]
    if array.dtype != expected or array.stype != _STYPE:
        raise WireError(f"array is {array.dtype} ({array.stype}), allowed is {expected} ({_STYPE}) for {wire}")
    values = _values(array).copy()
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if wire == "bfloat16" else tensor


def wire_view(tensor: Tensor, wire: WireType) -> np.ndarray:
    """``tensor`` in its wire form as a contiguous NumPy array; shares memory where no conversion is needed."""
    if wire == "bfloat16":
        return tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()


def num_bytes(array: Array) -> int:
    """Bytes of the tensor itself: elements times their size."""
    return math.prod(array.shape) * _itemsize(array.dtype)


def record_bytes(record: Mapping[str, Array]) -> int:
    """Bytes of all tensors of a record, without headers and keys."""
    return sum(num_bytes(array) for array in record.values())


def digest(tensors: Mapping[str, Array]) -> bytes:
    """SHA-256 over an expert's tensors in wire form, in order of their names; 32 bytes."""
    return _combine({name: _array_digest(array) for name, array in tensors.items()})


def tensors_digest(tensors: Mapping[str, Tensor], wire: WireType) -> bytes:
    """What :func:`digest` gives for the same tensors once encoded, without encoding them."""
    return _combine({name: _sha256(wire_view(tensor, wire)) for name, tensor in tensors.items()})


def share(content: RecordDict) -> RecordDict:
    """``content`` behind new containers: values are the same immutable bytes, so nothing is copied.

    Replacing a record, an array or an array's fields on one side is not seen on the other.
    """
    shared = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            shared[name] = make_record({key: _shell(array.__dict__) for key, array in record.items()})
        else:
            shared[name] = record.copy()
            for key, value in record.items():
                if isinstance(value, list):
                    shared[name][key] = list(value)
    return shared


def _shell(fields: dict[str, Any]) -> Array:
    """An array with these fields; Flower's constructor costs ten times as much and copies nothing either."""
    array = Array.__new__(Array)
    array.__dict__.update(fields)
    return array


def _sha256(values: np.ndarray) -> bytes:
    return hashlib.sha256(values.data.cast("B")).digest()


def _combine(parts: Mapping[str, bytes]) -> bytes:
    return hashlib.sha256(b"".join(name.encode() + b"\0" + parts[name] for name in sorted(parts))).digest()


def _array_digest(array: Array) -> bytes:
    # Bytes are immutable, so the digest stays right as long as the array holds the same bytes object. It is kept
    # on the array because in process the same array reaches every participant; it never travels.
    known = array.__dict__.get("_fluxlib_digest")
    if known is None or known[0] is not array.data:
        known = (array.data, hashlib.sha256(memoryview(array.data)[_data_offset(array) :]).digest())
        array.__dict__["_fluxlib_digest"] = known
    return known[1]


def _values(array: Array) -> np.ndarray:
    header = _header(np.dtype(array.dtype).str, tuple(array.shape))
    if array.data.startswith(header):
        try:
            return np.frombuffer(array.data, array.dtype, offset=len(header)).reshape(array.shape)
        except ValueError as error:
            raise WireError(f"array of shape {tuple(array.shape)} has {len(array.data)} bytes: {error}") from None
    try:
        values = np.load(io.BytesIO(array.data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise WireError(f"array of shape {tuple(array.shape)} cannot be read: {error}") from None
    if str(values.dtype) != array.dtype or values.shape != tuple(array.shape):
        raise WireError(f"array claims {array.dtype}{tuple(array.shape)}, its bytes hold {values.dtype}{values.shape}")
    return np.ascontiguousarray(values)


def _data_offset(array: Array) -> int:
    header = _header(np.dtype(array.dtype).str, tuple(array.shape))
    return len(header) if array.data.startswith(header) else 0


@lru_cache(maxsize=64)
def _itemsize(dtype: str) -> int:
    return np.dtype(dtype).itemsize


@lru_cache(maxsize=4096)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()
