"""Arrays on the wire: the bytes of ``numpy.save``, nothing shared, nothing believed."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from fluxlib.federation.protocol import wire


@pytest.mark.parametrize("shape", [(3,), (4, 6), (2, 3, 5)])
def test_bytes_are_those_of_flowers_own_conversion(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, flowers = wire.encode(tensor), Array(tensor.numpy())
    assert (ours.dtype, tuple(ours.shape), ours.stype, ours.data) == (
        flowers.dtype, tuple(flowers.shape), flowers.stype, flowers.data
    )  # fmt: skip
    assert torch.equal(wire.decode(flowers), tensor)
    assert ours.object_id == flowers.object_id


def test_a_transposed_view_travels_like_its_copy() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal(wire.decode(wire.encode(tensor)), tensor)


def test_bfloat16_halves_the_bytes_and_rounds_once() -> None:
    tensor = torch.tensor([[1.0, 1.0 + 2**-9, -3.14159]])
    array = wire.encode(tensor, "bfloat16")
    assert (array.dtype, wire.num_bytes(array), wire.num_bytes(wire.encode(tensor))) == ("uint16", 6, 12)
    assert torch.equal(wire.decode(array, "bfloat16"), tensor.to(torch.bfloat16))


def test_decoded_memory_is_ones_own() -> None:
    array = wire.encode(torch.zeros(4))
    wire.decode(array).add_(1)
    assert wire.decode(array).sum() == 0


def test_records_are_those_that_flower_would_make() -> None:
    arrays = {"0.1.w": wire.encode(torch.ones(2)), "0.2.w": wire.encode(torch.ones(3))}
    assert wire.make_record(arrays) == ArrayRecord(arrays)
    assert wire.record_bytes(wire.make_record(arrays)) == 20


@pytest.mark.parametrize("name", ["3.7", "a.1.w", "1.-2.w", "", "1.2."])
def test_keys_have_one_form(name: str) -> None:
    with pytest.raises(wire.WireError, match="layer"):
        wire.parse_name(name)


def test_keys_may_hold_a_dotted_tensor_name() -> None:
    assert wire.parse_name(wire.key_name((3, 7), "up.bias")) == ((3, 7), "up.bias")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (Array("float32", (9,), "numpy.ndarray", wire.encode(torch.ones(2)).data), "claims"),
        (Array("float32", (2,), "numpy.ndarray", wire.encode(torch.ones(2)).data[:-3]), "something else"),
        (Array("float32", (2,), "numpy.ndarray", b"rubbish"), "its 7 bytes"),
        (Array("float32", (-1, -2), "numpy.ndarray", wire.encode(torch.ones(2)).data), "claims"),
        (Array("float32", (2,), "other", wire.encode(torch.ones(2)).data), "other"),
        (Array(np.ones(2)), "float64"),
    ],
    ids=["shape", "truncated", "rubbish", "negative", "type", "dtype"],
)
def test_bytes_that_are_not_what_they_claim_are_refused(array: Array, message: str) -> None:
    with pytest.raises(wire.WireError, match=message):
        wire.decode(array)


def test_an_object_array_is_never_unpickled() -> None:
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(wire.WireError, match="something else"):
        wire.decode(Array("float32", (1,), "numpy.ndarray", buffer.getvalue()))


@pytest.mark.parametrize("kind", get_args(wire.Form))
def test_an_expert_has_the_same_digest_on_both_sides(kind: wire.Form) -> None:
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(4)}
    arrays = {name: wire.encode(tensor, kind) for name, tensor in reversed(tensors.items())}
    again = {name: wire.encode(tensor, kind) for name, tensor in tensors.items()}
    assert wire.digest(arrays) == wire.digest(again)
    arrays["a"].data = wire.encode(torch.zeros(4), kind).data
    assert wire.digest(arrays) != wire.digest(again)


# Error feedback: what rounding takes from a change is not lost but late.


def test_sums_of_what_arrives_stay_within_one_rounding_of_what_was_sent() -> None:
    chance, residual = torch.Generator().manual_seed(0), {}
    arrived, sent = torch.zeros(3, 50), torch.zeros(3, 50)
    for _ in range(20):
        change = torch.randn(3, 50, generator=chance)
        change[:, 0] = 0.004  # far below one step of its block
        record, residual = wire.encode_changes({(0, 1): {"w": change}}, "int8", residual)
        arrived += wire.decode_changes(record, "int8", {(0, 1): {"w": (3, 50)}})[0, 1]["w"]
        sent += change
    assert (arrived - sent).abs().max() < 0.05
    assert (arrived[:, 0] - 0.08).abs().max() < 0.05
    torch.testing.assert_close(arrived + wire.decode(residual["0.1.w"]), sent)


def test_an_expert_that_is_not_tuned_keeps_its_residual() -> None:
    _, first = wire.encode_changes({(0, 1): {"w": torch.linspace(0, 1, 150).view(3, 50)}}, "int8", {})
    _, second = wire.encode_changes({(0, 0): {"w": torch.ones(3, 50)}}, "int8", first)
    assert set(second) == {"0.1.w", "0.0.w"} and second["0.1.w"] is first["0.1.w"]
    assert wire.encode_changes({(0, 0): {"w": torch.ones(3, 50)}}, "float32", {})[1] == {}


@pytest.mark.parametrize("kind", get_args(wire.Form))
def test_whatever_is_sent_arrives_within_one_rounding(kind: wire.Form) -> None:
    values = st.lists(st.floats(-(2.0**40), 2.0**40, width=32) | st.just(0.0), min_size=1, max_size=150)

    @given(values, st.booleans())
    def case(numbers: list[float], upright: bool) -> None:
        sent = torch.tensor(numbers).view((-1, 1) if upright else (1, -1))
        arrived = wire.decode(wire.encode(sent, kind), kind, sent.shape)
        assert arrived.shape == sent.shape
        if kind == "int8":  # half a step of 127 in its block; a scale is a part of the largest one, in 16 bits
            blocks = torch.nn.functional.pad(sent.flatten(), (0, -sent.numel() % wire.BLOCK)).view(-1, wire.BLOCK)
            bound = (blocks.abs().amax(dim=1) / 120 + sent.abs().max() * 1e-7).repeat_interleave(wire.BLOCK)
            assert ((arrived - sent).flatten().abs() <= bound[: sent.numel()]).all()
        else:
            assert torch.equal(arrived, sent.to(arrived.dtype))

    case()
