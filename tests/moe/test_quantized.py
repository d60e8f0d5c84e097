"""Few-bit experts: memory, error, gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fluxlib.moe import compact, find, quantized
from fluxlib.moe.compact import LayerPlan
from fluxlib.moe.packing import BITS, Packed, PackedNF4, _decode, _pack, levels, quantize_tensor
from fluxlib.moe.quantized import QuantizedExperts
from fluxlib.moe.replace import restoring

# Relative error on normally distributed values, at most.
ERROR = {2: 0.345, 3: 0.185, 4: 0.09, 8: 0.0065}


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", BITS)
def test_error_and_memory_per_width(bits: int) -> None:
    stack = _normal(3, 96, 40) * torch.tensor([1.0, 1e-6, 1e4])[:, None, None]
    packed = quantize_tensor(stack, bits)
    blocks = 96 * 40 // 64
    assert packed.num_bytes == 3 * (96 * 40 * bits // 8 + 2 * blocks + 4)
    for expert in range(3):
        restored = packed.read(expert)
        assert (restored - stack[expert]).norm() < ERROR[bits] * stack[expert].norm()
        assert packed.read(expert, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [Packed, PackedNF4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_four_bit_codes_keep_the_same_promises(kind: type[Packed], dtype: torch.dtype) -> None:
    """The library's own code and bitsandbytes' kernels: memory, error, blocks of one expert alone, bad values."""
    pytest.importorskip("bitsandbytes")
    stack = (_normal(3, 96, 50) * torch.tensor([1.0, 1e-3, 1e2])[:, None, None]).to(dtype)  # 75 blocks each
    packed = kind(stack, 4)
    assert packed.num_bytes == 3 * (96 * 50 // 2 + 2 * 75 + 4)
    for expert in range(3):
        restored = packed.read(expert)
        assert (restored.dtype, restored.shape) == (dtype, stack.shape[1:])
        assert (restored.float() - stack[expert].float()).norm() < 0.1 * stack[expert].float().norm()
    before = packed.read(0)
    packed.write(1, stack[0] * 5)
    assert (packed.read(1) - stack[0] * 5).float().norm() < 0.1 * (stack[0] * 5).float().norm()
    assert torch.equal(packed.read(0), before)
    packed.to(torch.float16)
    assert torch.equal(packed.read(0), before)
    assert packed.read(2, torch.float16).dtype == torch.float16
    packed.write(2, stack[2] * float("nan"))
    assert torch.isfinite(packed.unit).tolist() == [True, True, False]
    odd = kind(stack[:, :1, :7], 4)  # one block, not full
    assert odd.read(1).shape == (1, 7)


def test_a_model_computes_with_either_code(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    model, batch = tiny.build("mixtral"), tiny.batch()
    expected, made = model(**batch).logits, []
    for kind in (Packed, PackedNF4):
        monkeypatch.setattr(quantized, "quantize_tensor", kind)
        with restoring(quantized.quantize(model, 4)):
            made.append(model(**batch).logits)
        assert (made[-1] - expected).norm() < 0.3 * expected.norm()
    assert not torch.equal(*made)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packing_is_lossless_and_eight_codes_fill_b_bytes(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    packed = _pack(codes, bits)
    assert (packed.dtype, len(packed)) == (torch.uint8, 8 * bits)
    assert torch.equal(_decode(packed, bits), torch.tensor(levels(bits))[codes])
    word = sum(int(code) << (bits * i) for i, code in enumerate(codes[:8]))
    assert bytes(packed[:bits].tolist()) == word.to_bytes(bits, "little")


def test_levels_are_the_known_ones_for_a_normal_variable() -> None:
    """Max, Quantizing for minimum distortion, 1960, table I."""
    torch.testing.assert_close(
        torch.tensor(levels(2)), torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), atol=1e-3, rtol=0
    )
    assert levels(3)[-1] == pytest.approx(2.152, abs=1e-3)
    assert levels(4)[-1] == pytest.approx(2.733, abs=1e-3)


def test_an_outlier_costs_its_own_block_only() -> None:
    stack = _normal(1, 1, 640)
    plain = quantize_tensor(stack, 4).read(0)
    stack[0, 0, 3] = 30.0
    restored = quantize_tensor(stack, 4).read(0)
    assert abs(restored[0, 3] - 30) < 2.0
    torch.testing.assert_close(restored[0, 64:], plain[0, 64:], rtol=2e-3, atol=2e-3)


def test_zeros_short_blocks_and_bad_values() -> None:
    packed = quantize_tensor(torch.zeros(2, 3, 7), 4)
    assert (packed.read(1) == 0).all()
    odd = _normal(1, 3, 7)
    assert quantize_tensor(odd, 8).read(0).shape == (3, 7)
    odd[0, 0, 0] = float("nan")
    assert torch.isnan(quantize_tensor(odd, 4).unit).all()
    with pytest.raises(ValueError, match=r"bits: expected one of \(2, 3, 4, 8\), got 5"):
        quantize_tensor(odd, 5)


def test_experts_do_not_share_blocks() -> None:
    stack = _normal(2, 5, 9)
    packed = quantize_tensor(stack, 4)
    before = packed.read(0)
    packed.write(1, stack[1] * 100)
    assert torch.equal(packed.read(0), before)


def test_a_quantized_model_equals_one_with_dequantized_weights(tiny: SimpleNamespace, architecture: str) -> None:
    model, twin, batch = tiny.build(architecture), tiny.build(architecture), tiny.batch()
    for layer in find.layers(twin):
        module = QuantizedExperts(layer.experts, 4)
        for expert in range(layer.num_experts):
            find.write_expert(layer.experts, expert, module.expert_tensors(expert))
    expected = model(**batch).logits
    with restoring(quantized.quantize(model, 4)):
        output = model(**batch)
        assert all(isinstance(layer.experts, QuantizedExperts) for layer in find.layers(model))
        assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(output.logits, twin(**batch).logits, rtol=1e-3, atol=1e-4)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize(("at_once", "expected"), [(1, [[1], [1], [6], [6]]), (2, [[1, 6], [1, 6]])])
def test_large_experts_are_dequantized_alone_small_ones_together(
    at_once: int, expected: list[list[int]], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized.quantize(tiny.build("olmoe"))
    read: list[list[int]] = []
    plain = Packed.read
    monkeypatch.setattr(QuantizedExperts, "at_once", at_once)
    monkeypatch.setattr(Packed, "read", lambda self, some, dtype=None: read.append(some) or plain(self, some, dtype))
    experts = find.layers(model)[0].experts
    experts(torch.randn(4, 16), torch.tensor([[1, 6]] * 4), torch.ones(4, 2))
    assert read == expected


def test_what_was_read_ahead_is_forgotten_when_it_is_written(tiny: SimpleNamespace) -> None:
    experts = find.layers(quantized.quantize(tiny.build("olmoe")))[0].experts
    experts.fetch(1, [6], torch.float32)
    experts.requantize(6, {name: tensor * 2 for name, tensor in experts.expert_tensors(6).items()})
    found = experts.fetch(6, [], torch.float32)
    assert all(torch.equal(found[name], tensor) for name, tensor in experts.expert_tensors(6).items())


def test_straight_through_gradients_are_those_of_the_dequantized_weights(tiny: SimpleNamespace) -> None:
    model, batch = tiny.build("qwen2_moe"), tiny.batch()
    twin = tiny.build("qwen2_moe")
    quantized.quantize(model, 4)
    for ours, theirs in zip(find.layers(model), find.layers(twin), strict=True):
        ours.experts.collects_gradients = True
        for expert in range(8):
            find.write_expert(theirs.experts, expert, ours.experts.expert_tensors(expert))
    compact.customize(twin, [LayerPlan(tuple(range(8)))] * 2)
    model(**batch).loss.backward()
    twin(**batch).loss.backward()
    for ours, theirs in zip(find.layers(model), find.layers(twin), strict=True):
        for expert in range(8):
            for name, gradient in ours.experts.grads(expert).items():
                torch.testing.assert_close(gradient, theirs.experts.grads(expert)[name], rtol=1e-4, atol=1e-6)
    experts = find.layers(model)[0].experts
    stepped = {n: t - 0.5 * experts.grads(3)[n] for n, t in experts.expert_tensors(3).items()}
    other, expected = experts.expert_tensors(2), QuantizedExperts(experts.original, 4)
    experts.requantize(3, stepped)
    expected.requantize(3, stepped)
    for name in stepped:
        assert torch.equal(experts.expert_tensors(3)[name], expected.expert_tensors(3)[name])
        assert torch.equal(experts.expert_tensors(2)[name], other[name])
    experts.zero_grad()
    assert not experts.grads(3)["down_proj"].any()


def test_changing_the_models_type_leaves_the_codes_alone(tiny: SimpleNamespace) -> None:
    model = quantized.quantize(tiny.build("mixtral"))
    before = find.layers(model)[0].experts.expert_tensors(0)["down_proj"]
    model.to(torch.bfloat16)
    assert torch.equal(find.layers(model)[0].experts.expert_tensors(0)["down_proj"], before)


def test_quantizing_twice_or_in_five_bits_is_refused(tiny: SimpleNamespace) -> None:
    model = tiny.build("mixtral")
    with pytest.raises(ValueError, match="got 5"):
        quantized.quantize(model, 5)
    assert all(p.requires_grad for p in model.parameters())
    quantized.quantize(model)
    with pytest.raises(ValueError, match=r"restore\(model\) first"):
        quantized.quantize(model)
