"""How an expert's tensors look on the wire: Flower arrays, byte for byte those of ``numpy.save``.

An expert travels as one :class:`flwr.app.Array` per tensor under the key ``"<layer>.<expert>.<name>"``. Flower's own
conversion costs 40 microseconds a tensor, mostly header parsing; this one costs about a tenth and reads and writes
the same bytes, so Flower's mods and other engines see ordinary arrays.

* :func:`encode`, :func:`decode`   tensor to array and back
* :func:`lend`                     the same as encode, but bytes are made only for who asks for them
* :func:`num_bytes`                payload of an array, headers excluded: what the tables call bytes
* :func:`digest`, :func:`tensors_digest`   SHA-256 of an expert in its wire form
* :func:`share`                    the same arrays behind new containers, for messages passed by reference
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fluxlib.methods.base import ExpertKey
from fluxlib.moe.packing import Packed

Form = Literal["float32", "bfloat16", "int8", "int4"]
FORMS: tuple[Form, ...] = get_args(Form)
"""``float32``: exact. ``bfloat16``: half the bytes, sent as a ``uint16`` view because NumPy has no bfloat16.
``int8``, and ``int4`` for experts that are only merged: codes and a scale per block (:mod:`fluxlib.moe.packing`),
sent as plain bytes."""

BLOCK = 64
"""Values per scale of the coded types."""

_NUMPY_NAME = {"float32": "float32", "bfloat16": "uint16", "int8": "uint8", "int4": "uint8"}
_CODE_BITS = {"int8": 8, "int4": 4}
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


def encode(tensor: Tensor, wire: Form = "float32") -> Array:
    """A Flower array with its own copy of ``tensor``'s values, rounded to ``wire``."""
    values = wire_view(tensor, wire)
    data = b"".join((_header(values.dtype.str, values.shape), values))  # type: ignore[arg-type]
    return _shell({"dtype": _NUMPY_NAME[wire], "shape": values.shape, "stype": _STYPE, "data": data})


class LentArray(Array):
    """An array whose bytes are made when somebody asks for them; in process nobody does.

    ``data`` is what the bytes of an ordinary array are, so every engine and mod can use it, or put others in its place.
    """

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """Bytes of ``numpy.save``."""
        fields = self.__dict__
        if fields["data"] is None:
            fields["data"] = encode(fields["tensor"]).data
        return fields["data"]  # type: ignore[no-any-return]

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["data"], self.__dict__["tensor"] = value, None

    def __reduce__(self) -> tuple[Any, ...]:
        """An ordinary array, for an engine that copies it into another process."""
        return _shell, ({"dtype": self.dtype, "shape": self.shape, "stype": self.stype, "data": self.data},)


LentArray.__qualname__ = "Array"  # Flower names the type of what it sends by this


def lend(tensor: Tensor, wire: Form = "float32") -> Array:
    """:func:`encode` without a copy where none is needed; ``tensor`` must not change any more."""
    if wire != "float32" or tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return encode(tensor, wire)
    array = LentArray.__new__(LentArray)
    array.__dict__.update(dtype="float32", shape=tuple(tensor.shape), stype=_STYPE, data=None, tensor=tensor.detach())
    return array


def make_record(arrays: dict[str, Array]) -> ArrayRecord:
    """An ``ArrayRecord`` of ``arrays``.

    Flower checks every item on its way in, at 20 microseconds each; these are known to be arrays under text keys.
    """
    record = ArrayRecord()
    record.__dict__["_data"].update(arrays)
    return record


def decode(array: Array, wire: Form = "float32", shape: Sequence[int] | None = None) -> Tensor:
    """The tensor of ``array`` on the CPU, float32 or bfloat16; not to be written to if the array was lent.

    Args:
        shape: of the tensor; the coded types do not carry it.

    Raises:
        WireError: another type than ``wire``, or bytes that do not fit the stated shape.
    """
    expected = _NUMPY_NAME[wire]
    if any(size < 0 for size in array.shape):
        raise WireError(f"array claims shape {tuple(array.shape)}")
    if array.dtype != expected or array.stype != _STYPE:
        raise WireError(f"array is {array.dtype} ({array.stype}), allowed is {expected} ({_STYPE}) for {wire}")
    lent = array.__dict__.get("tensor")
    if lent is not None:
        return lent if lent.shape == array.shape else _misfit(array, lent)  # type: ignore[no-any-return]
    values = torch.from_numpy(_values(array).copy())
    if wire in _CODE_BITS:
        return _decode_bytes(values, wire, tuple(shape or ()))
    return values.view(torch.bfloat16) if wire == "bfloat16" else values


def shape_of(data: bytes, dtype: str) -> tuple[int, ...]:
    """Shape that the header of an array's bytes states.

    Raises:
        WireError: bytes of something else.
    """
    try:
        buffer = io.BytesIO(data)
        np.lib.format.read_magic(buffer)
        shape, _, found = np.lib.format.read_array_header_1_0(buffer)
    except ValueError as error:
        raise WireError(f"{len(data)} bytes are no array: {error}") from None
    if found != np.dtype(dtype):
        raise WireError(f"array claims {dtype}, its bytes hold {found}")
    return tuple(shape)


def is_coded(wire: Form) -> bool:
    """Whether arrays of this type hold codes instead of numbers."""
    return wire in _CODE_BITS


def bits_per_weight(wire: Form) -> float:
    """What a weight of a real model takes on the link, for the device clock; its own type has 16 bits."""
    return _CODE_BITS[wire] + 16 / BLOCK if wire in _CODE_BITS else 16.0


def wire_view(tensor: Tensor, wire: Form) -> np.ndarray:
    """``tensor`` in its wire form as a contiguous NumPy array; shares memory where no conversion is needed."""
    if wire in _CODE_BITS:
        return _encode_bytes(tensor, wire)
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


def tensors_digest(tensors: Mapping[str, Tensor], wire: Form = "float32") -> bytes:
    """What :func:`digest` gives for the same tensors once encoded, without encoding them."""
    return _combine({name: _sha256(wire_view(tensor, wire)) for name, tensor in tensors.items()})


def share(content: RecordDict) -> RecordDict:
    """``content`` behind new containers: values are the same immutable bytes, so nothing is copied.

    Replacing a record, an array or an array's fields on one side is not seen on the other.
    """
    shared = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            shared[name] = make_record({key: _twin(array) for key, array in record.items()})
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


def _twin(array: Array) -> Array:
    twin = object.__new__(type(array))
    twin.__dict__.update(array.__dict__)
    return twin


def _misfit(array: Array, lent: Tensor) -> Tensor:
    raise WireError(f"array claims {array.dtype}{tuple(array.shape)}, it holds {tuple(lent.shape)}")


def _encode_bytes(tensor: Tensor, wire: Form) -> np.ndarray:
    packed = Packed(tensor.detach().to("cpu", torch.float32)[None], _CODE_BITS[wire], BLOCK)
    parts = (packed.codes, packed.scale_bits, packed.unit_bits)
    return torch.cat([part.flatten().view(torch.uint8) for part in parts]).numpy()


def _decode_bytes(data: Tensor, wire: Form, shape: tuple[int, ...]) -> Tensor:
    blocks = -(-math.prod(shape) // BLOCK)
    sizes = [blocks * BLOCK * _CODE_BITS[wire] // 8, 2 * blocks, 4]
    if data.dim() != 1 or len(data) != sum(sizes):
        raise WireError(f"{data.numel()} bytes, allowed are {sum(sizes)} for {wire} values of shape {shape}")
    codes, scales, unit = (part.clone()[None] for part in data.split(sizes))
    packed = Packed(torch.empty(0, *shape), _CODE_BITS[wire], BLOCK)
    packed.codes, packed.scale_bits, packed.unit_bits = codes, scales.view(torch.int16), unit.view(torch.int32)[0]
    return packed.read(0)


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
    if math.prod(array.shape) * np.dtype(array.dtype).itemsize > len(array.data):
        raise WireError(f"array of shape {tuple(array.shape)} has {len(array.data)} bytes")
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
