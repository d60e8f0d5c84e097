"""How an expert's tensors travel: as Flower arrays, byte for byte those of ``numpy.save``.

An expert is one :class:`flwr.app.Array` per tensor under the key ``"<layer>.<expert>.<tensor>"``, so Flower's mods and
other engines see ordinary arrays. Flower's own conversion costs 40 microseconds a tensor, this one a tenth of that.

Three forms: ``float32``, exact; ``bfloat16``, half the bytes, sent as a ``uint16`` view because NumPy has no bfloat16;
``int8``, codes and a scale per block (:mod:`fluxlib.moe.packing`), sent as plain bytes.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fluxlib.config import WireType as Form
from fluxlib.io import brief, shown
from fluxlib.methods.base import ExpertKey
from fluxlib.moe.packing import BLOCK, SCALE_BITS, Packed

Experts = Mapping[ExpertKey, Mapping[str, Tensor]]
"""Tensors, or changes of them, of some experts by name."""

Shapes = Mapping[ExpertKey, Mapping[str, tuple[int, ...]]]
"""Shapes of the tensors of every expert of a model."""

_NUMPY_NAME = {"float32": "float32", "bfloat16": "uint16", "int8": "uint8"}
_CODE_BITS = 8
_STYPE = "numpy.ndarray"

T = TypeVar("T")


class WireError(ValueError):
    """Bytes that are not what they claim to be; the message names the tensor."""


@lru_cache(maxsize=65536)
def key_name(key: ExpertKey, tensor: str) -> str:
    """``(3, 7), "down_proj"`` to ``"3.7.down_proj"``."""
    return f"{key[0]}.{key[1]}.{tensor}"


@lru_cache(maxsize=65536)
def parse_name(name: str) -> tuple[ExpertKey, str]:
    """``"3.7.down_proj"`` to ``((3, 7), "down_proj")``; WireError for another form of key."""
    layer, _, rest = name.partition(".")
    expert, _, tensor = rest.partition(".")
    if not (layer.isdecimal() and expert.isdecimal() and tensor):
        raise WireError(f"array key is {shown(name)}, allowed is '<layer>.<expert>.<tensor>'")
    return (int(layer), int(expert)), tensor


def by_expert(entries: Mapping[str, T]) -> dict[ExpertKey, dict[str, T]]:
    """What has the names of :func:`key_name`, by expert and then by tensor; WireError for another form of name."""
    grouped: dict[ExpertKey, dict[str, T]] = {}
    for name, entry in entries.items():
        key, tensor = parse_name(name)
        grouped.setdefault(key, {})[tensor] = entry
    return grouped


def bits_per_weight(wire: Form) -> float:
    """What a weight of a real model takes on the link, for the device clock; its own type has 16 bits."""
    return _CODE_BITS + SCALE_BITS if wire == "int8" else 16.0


def encode(tensor: Tensor, wire: Form = "float32") -> Array:
    """A Flower array with its own copy of ``tensor``'s values, rounded to ``wire``."""
    if wire == "int8":
        packed = Packed(tensor.detach().to("cpu", torch.float32)[None], _CODE_BITS)
        parts = (packed.codes, packed.scale_bits, packed.unit_bits)
        values = torch.cat([part.flatten().view(torch.uint8) for part in parts]).numpy()
    elif wire == "bfloat16":
        values = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
    else:
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    data = b"".join((_header(values.dtype.str, values.shape), values))  # type: ignore[arg-type]
    return make_array(_NUMPY_NAME[wire], values.shape, _STYPE, data)


def decode(array: Array, wire: Form = "float32", shape: Sequence[int] = ()) -> Tensor:
    """The tensor of ``array`` on the CPU, float32 or bfloat16; of ``shape``, which int8 does not carry.

    WireError: another type than ``wire``, or bytes that do not fit the stated shape.
    """
    values = read_array(array, _NUMPY_NAME[wire])
    if wire != "int8":
        return values.view(torch.bfloat16) if wire == "bfloat16" else values
    blocks = -(-math.prod(shape) // BLOCK)
    sizes = [blocks * BLOCK * _CODE_BITS // 8, 2 * blocks, 4]
    if values.dim() != 1 or len(values) != sum(sizes):
        raise WireError(f"{values.numel()} bytes, allowed are {sum(sizes)} for int8 values of shape {tuple(shape)}")
    codes, scales, unit = (part.clone()[None] for part in values.split(sizes))
    packed = Packed(torch.empty(0, *shape), _CODE_BITS)
    packed.codes, packed.scale_bits, packed.unit_bits = codes, scales.view(torch.int16), unit.view(torch.int32)[0]
    return packed.read(0)


def read_array(array: Array, *allowed: str) -> Tensor:
    """The values of ``array``; its header is compared, never interpreted.

    WireError: a type that is not ``allowed``, or bytes that do not fit the stated shape.
    """
    name, stated, data = array.dtype, tuple(array.shape), array.data
    if name not in allowed or array.stype != _STYPE:
        raise WireError(f"array is {shown(name)} ({shown(array.stype)}), allowed is {', '.join(allowed)} ({_STYPE})")
    header, size = _header(np.dtype(name).str, stated), num_bytes(array)
    if any(length < 0 for length in stated) or not data.startswith(header) or len(data) != len(header) + size:
        raise WireError(f"array claims {name}{brief(stated)}, its {len(data)} bytes are something else")
    return torch.from_numpy(np.frombuffer(data, name, offset=len(header)).reshape(stated).copy())


def moved(changes: Experts) -> dict[ExpertKey, Mapping[str, Tensor]]:
    """The experts among ``changes`` that did change: those without a token did not, and do not travel."""
    return {key: tensors for key, tensors in changes.items() if any(bool(tensor.any()) for tensor in tensors.values())}


def whole(changes: Experts, assigned: Tensor, wire: Form, shapes: Shapes) -> Experts:
    """``changes`` in order, with zeros (in no memory) for ``assigned`` experts, bool ``[L, E]``, that did not come."""
    zero = torch.zeros((), dtype=torch.bfloat16 if wire == "bfloat16" else torch.float32)
    keys = sorted({*changes, *((layer, expert) for layer, expert in assigned.nonzero().tolist())})
    return {key: changes.get(key) or {name: zero.expand(s) for name, s in shapes[key].items()} for key in keys}


@torch.no_grad()
def encode_changes(changes: Experts, wire: Form, residual: Mapping[str, Array]) -> tuple[ArrayRecord, dict[str, Array]]:
    """A reply's changes as they travel, and what rounding took from them.

    Error feedback: what ``int8`` rounds off a change is added to the next change of the same expert; an expert that is
    not among ``changes`` keeps its residual. ``bfloat16`` rounds each number by at most 1/256 of itself, which costs
    nothing that could be measured, and has no residual.
    """
    sent, residual = ArrayRecord(), dict(residual)
    for key, tensors in changes.items():
        for name, tensor in tensors.items():
            label = key_name(key, name)
            if wire != "int8":
                sent[label] = encode(tensor, wire)
                continue
            total = tensor.cpu() + decode(residual[label]) if label in residual else tensor
            sent[label] = encode(total, wire)
            residual[label] = encode(total.cpu().float() - decode(sent[label], wire, total.shape))
    return sent, residual


def decode_changes(arrays: ArrayRecord, wire: Form, shapes: Shapes) -> dict[ExpertKey, dict[str, Tensor]]:
    """Inverse of :func:`encode_changes`, WireError for anything else; int8 needs ``shapes``.

    A tensor that the model does not have comes back empty where it cannot be read: its name is what will be refused.
    """
    found: dict[ExpertKey, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        key, part = parse_name(name)
        shape = shapes.get(key, {}).get(part)
        unknown = wire == "int8" and shape is None
        found.setdefault(key, {})[part] = torch.zeros(0) if unknown else decode(array, wire, shape or ())
    return found


def make_array(dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> Array:
    """A Flower array of these very bytes; its constructor's checks cost more than all the rest."""
    array = Array.__new__(Array)
    vars(array).update(dtype=dtype, shape=shape, stype=stype, data=data)
    return array


def make_record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """An ``ArrayRecord`` of these very arrays; Flower's constructor would make new ones, not hashed yet."""
    record = ArrayRecord()
    record.update(arrays)
    return record


def num_bytes(array: Array) -> int:
    """Bytes of the tensor itself: elements times their size."""
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def record_bytes(record: Mapping[str, Array]) -> int:
    """Bytes of all tensors of a record, without headers and keys."""
    return sum(num_bytes(array) for array in record.values())


def digest(tensors: Mapping[str, Array]) -> bytes:
    """SHA-256 over an expert's tensors as they travel, in order of their names; 32 bytes."""
    total = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        # Each array's is kept on it as long as its bytes are the same: in process it reaches every participant.
        known = vars(array).get("_sha256")
        if known is None or known[0] is not array.data:
            known = vars(array)["_sha256"] = (array.data, hashlib.sha256(array.data).digest())
        total.update(name.encode() + b"\0" + known[1])
    return total.digest()


@lru_cache(maxsize=4096)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()
