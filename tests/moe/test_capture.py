"""What capture records, and that it leaves no trace."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fluxlib.moe import compact, find
from fluxlib.moe.capture import capture, find_attention, received
from fluxlib.moe.compact import LayerPlan


def test_attention_received_is_a_mean_over_heads_and_visible_queries() -> None:
    weights = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]])
    heads = torch.stack([weights, torch.eye(3)[None]], dim=1)
    causal = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    torch.testing.assert_close(received(weights[None], causal), torch.tensor([[1.75 / 3, 0.75 / 2, 0.5]]))
    torch.testing.assert_close(received(heads, causal), torch.tensor([[2.75 / 6, 1.75 / 4, 0.75]]))
    padded = causal.clone()
    padded[:, 2] = padded[:, :, 2] = False
    torch.testing.assert_close(received(weights[None], padded), torch.tensor([[0.75, 0.5, 0.0]]))


def test_routing_and_attention_of_every_layer(tiny: SimpleNamespace, architecture: str) -> None:
    model, batch = tiny.build(architecture), tiny.batch()
    found, before = find.layers(model), model.config._attn_implementation
    expected = model(**batch).logits
    with capture(model, attention=True) as seen:
        output = model(**batch)
        model(**batch)
    token = batch["attention_mask"] == 1  # at padding eager and sdpa may differ
    torch.testing.assert_close(output.logits[token], expected[token], rtol=1e-3, atol=1e-4)
    for layer, record in zip(found, seen.layers, strict=True):
        assert len(record.top_k_index) == len(record.attention) == 2
        assert record.top_k_index[0].shape == record.top_k_weights[0].shape == (24, layer.top_k)
        attention = record.attention[0]
        assert attention.shape == (2, 12)
        assert (attention[batch["attention_mask"] == 1] > 0).all()
        assert (attention[batch["attention_mask"] == 0] == 0).all()
    seen.clear()
    assert not seen.layers[0].top_k_index
    assert model.config._attn_implementation == before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_attention_equals_the_models_own_weights(tiny: SimpleNamespace, architecture: str) -> None:
    """Rows of attention weights add up to one, so counts times means must add up to the number of queries."""
    model, batch = tiny.build(architecture), tiny.batch(rows=1)
    with capture(model, attention=True) as seen:
        model(**batch)
    window = 8 if architecture == "llama4" else 12
    for record in seen.layers:
        visible = torch.ones(12, 12).tril() * (torch.arange(12)[:, None] // window == torch.arange(12) // window)
        totals = [(record.attention[0][0] * v.sum(0)).sum() for v in (visible, torch.ones(12, 12).tril())]
        if architecture == "gpt_oss":  # its attention sinks keep part of every row
            assert (record.attention[0] > 0).all()
        else:
            assert any(torch.isclose(total, torch.tensor(12.0), atol=1e-4) for total in totals)


def test_padding_changes_nothing_for_the_tokens(tiny: SimpleNamespace) -> None:
    model, batch = tiny.build("olmoe"), tiny.batch()
    alone = {name: value[1:, :8] for name, value in batch.items()}
    records = []
    for part in (batch, alone):
        with capture(model, attention=True) as seen:
            model(**part)
        records.append(seen.layers[1].attention[0][-1, :8])
    torch.testing.assert_close(records[0], records[1])


def test_a_customised_model_shows_original_experts(tiny: SimpleNamespace) -> None:
    model, batch = tiny.build("mixtral"), tiny.batch()
    with capture(model) as before:
        model(**batch)
    compact.customize(model, [LayerPlan((0,), ((1, 2, 3, 4, 5),)), LayerPlan(tuple(range(6)))])
    with capture(model.model) as after:
        model(**batch)
    assert torch.equal(before.layers[0].top_k_index[0], after.layers[0].top_k_index[0])


def test_hooks_go_when_the_model_fails(tiny: SimpleNamespace) -> None:
    model = tiny.build("mixtral")
    with pytest.raises(IndexError), capture(model, attention=True):
        model(input_ids=torch.full((1, 3), 10_000))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation != "eager"


def test_a_layer_without_attention_is_named(tiny: SimpleNamespace) -> None:
    model = tiny.build("mixtral")
    layer = find.layers(model)[0]
    for decoder in model.model.layers:
        decoder.mixer, decoder.self_attn = decoder.self_attn, nn.Identity()
        del decoder.self_attn
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: found no attention module"):
        find_attention(model, layer)
