"""Profiles of tiny random models, checked by hand where hands suffice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from fluxlib import profiling
from fluxlib.models import LlamaMoeConfig, LlamaMoeForCausalLM
from fluxlib.moe import find
from fluxlib.moe.capture import capture
from fluxlib.profiling import Profile

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(kind: str = "olmoe", num_layers: int = 2, scale: float = 0.5) -> nn.Module:
    sizes = {**SIZES, **SPECIAL, "num_hidden_layers": num_layers}
    if kind == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(**sizes, intermediate_size=12, num_experts=8, num_experts_per_tok=2))
    else:
        widths = [[12] * 6] * num_layers
        config = LlamaMoeConfig(**sizes, intermediate_size=72, num_experts=6, num_selects=2, size_experts=widths)
        model = LlamaMoeForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, scale, generator=generator)
    return model.eval()


def batch(lengths: tuple[int, ...] = (9, 5, 7), seed: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def weights(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


@pytest.mark.parametrize("kind", ["olmoe", "llama_moe"])
def test_profile_counts_real_tokens_only(kind: str) -> None:
    model, data = build(kind), batch()
    found = profiling.profile(model, [data], bits=16)
    with capture(model) as seen, torch.no_grad():
        model(**data)
    for layer, record in enumerate(seen.layers):
        chosen = record.top_k_index[0].view(3, 9, 2)
        for expert in range(found.tokens.shape[1]):
            hits = (chosen == expert).any(dim=2) & data["attention_mask"].bool()
            assert found.tokens[layer, expert] == hits.sum()
    assert found.num_tokens == 21
    assert (found.tokens.sum(dim=1) == 42).all()
    assert torch.allclose(found.frequency.sum(dim=1), torch.ones(2))


def test_padding_and_batching_change_nothing() -> None:
    model, data = build(), batch()
    whole = profiling.profile(model, [data], bits=16)
    alone = [
        {name: rows[i : i + 1, : int(data["attention_mask"][i].sum())] for name, rows in data.items()} for i in range(3)
    ]
    parts = profiling.profile(model, alone, bits=16)
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.allclose(whole.attention, parts.attention, atol=1e-6)


def test_attention_is_what_the_routed_tokens_receive() -> None:
    """One layer: the mean over heads of the attention column, over the later queries, over an expert's tokens."""
    model, data = build(num_layers=1), batch((6, 6))
    found = profiling.profile(model, [data], bits=16)
    model.set_attn_implementation("eager")
    with capture(model) as seen, torch.no_grad():
        attention = model(**data, output_attentions=True).attentions[0].mean(dim=1)
    received = attention.tril().sum(dim=1) / torch.arange(6, 0, -1)
    chosen = seen.layers[0].top_k_index[0].view(2, 6, 2)
    for expert in range(8):
        hits = (chosen == expert).any(dim=2)
        expected = float(received[hits].mean()) if hits.any() else 0.0
        assert float(found.attention[0, expert]) == pytest.approx(expected, abs=1e-6)


def test_gate_is_the_share_of_squared_gate_weights() -> None:
    model, data = build(), batch()
    found = profiling.profile(model, [data], bits=16)
    with capture(model) as seen, torch.no_grad():
        model(**data)
    real = data["attention_mask"].bool().flatten()
    for layer, record in enumerate(seen.layers):
        index, weight = record.top_k_index[0][real].flatten(), record.top_k_weights[0][real].flatten()
        squares = torch.zeros(8).index_add(0, index, weight.square())
        assert torch.allclose(found.gate[layer], squares / squares.sum(), atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_model_is_bit_identical_afterwards(bits: int) -> None:
    model = build().train()
    before, trainable = weights(model), [p.requires_grad for p in model.parameters()]
    profiling.profile(model, [batch()], bits=bits)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert trainable == [p.requires_grad for p in model.parameters()]
    assert model.training
    assert type(find.layers(model)[0].experts).__name__ == "OlmoeExperts"


def test_more_bits_are_closer_to_the_truth() -> None:
    model, data = build(num_layers=3), [batch((20, 20, 20, 20), seed=s) for s in range(4)]
    truth = profiling.profile(model, data, bits=16)
    error = {b: profiling.frequency_error(profiling.profile(model, data, bits=b), truth) for b in (2, 4, 8)}
    assert error[2] > error[4] > error[8] >= 0
    assert profiling.frequency_error(truth, truth) == 0


def profile_of(frequency: list[list[float]]) -> Profile:
    values = torch.tensor(frequency)
    counts = (values * 100).long()
    return Profile(values, counts, torch.zeros_like(values), 100)


def test_error_measures_by_hand() -> None:
    truth = profile_of([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]])
    other = profile_of([[0.4, 0.3, 0.1, 0.2], [0.25, 0.25, 0.25, 0.25]])
    assert profiling.frequency_error(other, truth) == pytest.approx((0.1 + 0.1 + 0.2) / 2)
    first = profile_of([[0.4, 0.3, 0.2, 0.1]])
    assert profiling.rank_correlation(first, first) == pytest.approx(1.0)
    assert profiling.rank_correlation(profile_of([[0.1, 0.2, 0.3, 0.4]]), first) == pytest.approx(-1.0)
    assert profiling.rank_correlation(profile_of([[0.3, 0.4, 0.1, 0.2]]), first) == pytest.approx(0.6)
    assert profiling.top_overlap(other, truth, 2) == 1.0
    assert profiling.top_overlap(profile_of([[0.1, 0.2, 0.3, 0.4]]), first, 2) == 0.0


def test_expected_error_by_hand() -> None:
    """Two samples that each send all tokens to one expert: residuals of one token, standard errors of a half."""
    counts = torch.tensor([[[2, 0]], [[0, 2]]])
    assert profiling.expected_error(counts) == pytest.approx(math.sqrt(2 / math.pi) * (0.5 + 0.5))
    alike = torch.tensor([[[3, 1]], [[6, 2]], [[3, 1]]])
    assert profiling.expected_error(alike) == pytest.approx(0.0)
    assert math.isnan(profiling.expected_error(counts[:1]))


def test_the_expected_error_is_that_of_fresh_samples() -> None:
    """Topics decide: over many draws of 20 samples its mean is within a tenth of the true mean error."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    truth = topics.mean(dim=0)
    expected, found = [], []
    for _ in range(300):
        topic = torch.randint(0, 2, (20,), generator=generator)
        chosen = torch.multinomial(topics[topic], 30, replacement=True, generator=generator)
        counts = torch.nn.functional.one_hot(chosen, 3).sum(dim=1)[:, None, :]
        expected.append(profiling.expected_error(counts))
        share = counts.sum(dim=0)[0] / counts.sum()
        found.append(float((share - truth).abs().sum()))
    assert sum(expected) == pytest.approx(sum(found), rel=0.1)


def test_a_profile_of_another_model_is_refused() -> None:
    found = profiling.profile(build(), [batch()], bits=16)
    profiling.check_fits(found, build())
    with pytest.raises(ValueError, match="profile is of another model"):
        profiling.check_fits(found, build("llama_moe"))
    assert found.sampling_error > 0


def test_experts_never_used_have_no_frequency_and_no_attention() -> None:
    model = build()
    gate = model.model.layers[0].mlp.gate
    gate.weight.data[2:] = 0
    gate.weight.data[:2] = 0
    found = profiling.profile(model, [batch()], bits=16)
    unused = found.tokens[0] == 0
    assert unused.sum() == 6
    assert (found.frequency[0, unused] == 0).all()
    assert (found.attention[0, unused] == 0).all()
    assert torch.isfinite(found.attention).all()


def test_wrong_input_is_named() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"bits must be one of \(2, 3, 4, 8, 16\), got 5"):
        profiling.profile(model, [batch()], bits=5)
    empty = batch()
    empty["attention_mask"] = torch.zeros_like(empty["attention_mask"])
    with pytest.raises(ValueError, match="3 samples of padding only"):
        profiling.profile(model, [empty])
    with pytest.raises(ValueError, match="0 samples"):
        profiling.profile(model, [])


@pytest.mark.parametrize("bits", [4, 16])
def test_a_broken_expert_is_named_and_the_model_restored(bits: int) -> None:
    model = build()
    model.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layer 1 .*experts \[3\] hold NaN"):
        profiling.profile(model, [batch()], bits=bits)
    assert type(find.layers(model)[0].experts).__name__ == "OlmoeExperts"
