"""The two models as transformers models: backends, cache, checkpointing, refused configurations."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from fluxlib.models import DeepseekMoeConfig, LlamaMoeConfig
from fluxlib.models.deepseek_moe import DeepseekMoeGate

SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "eos_token_id": None}
CASES = {
    "llama_moe": LlamaMoeConfig(**SIZES, intermediate_size=64, num_experts=8, num_selects=3),
    "llama_moe_linear": LlamaMoeConfig(
        **SIZES, intermediate_size=64, num_experts=8, num_selects=3, gate_network="linear", gate_add_noise=False
    ),
    "deepseek": DeepseekMoeConfig(
        **SIZES, intermediate_size=48, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=3
    ),
    "deepseek_every_second": DeepseekMoeConfig(
        **SIZES,
        intermediate_size=48,
        moe_intermediate_size=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_layer_freq=2,
        first_k_dense_replace=0,
        n_shared_experts=None,
        norm_topk_prob=True,
        num_key_value_heads=2,
    ),
}


@pytest.fixture(params=list(CASES))
def model(request):
    model = AutoModelForCausalLM.from_config(CASES[request.param])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.fixture
def batch(input_ids):
    mask = torch.ones_like(input_ids)
    mask[1, 7:] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_grouped_is_the_default_and_equals_eager(model, batch):
    assert model.config._experts_implementation == "grouped_mm"
    loss, grads = gradients(model, batch)
    model.set_experts_implementation("eager")
    eager_loss, eager_grads = gradients(model, batch)
    torch.testing.assert_close((loss, grads), (eager_loss, eager_grads), rtol=1e-4, atol=1e-6)
    untouched = {name for name, _ in model.named_parameters()} - grads.keys()
    assert all("weight_noise" in name for name in untouched)


def test_attention_backends_and_gradient_checkpointing_agree(model, batch):
    loss, grads = gradients(model, batch)
    model.set_attn_implementation("eager")
    attentions = model(batch["input_ids"], output_attentions=True).attentions
    assert len(attentions) == 3 and attentions[0].shape == (2, 4, 11, 11)
    model.train()
    model.gradient_checkpointing_enable()
    again, checkpointed = gradients(model, batch | {"use_cache": False})
    torch.testing.assert_close((loss, grads), (again, checkpointed), rtol=1e-4, atol=1e-6)


def test_generation_with_cache_equals_without(model, input_ids):
    with_cache = model.generate(input_ids[:1], max_new_tokens=9, do_sample=False)
    without = model.generate(input_ids[:1], max_new_tokens=9, do_sample=False, use_cache=False)
    assert with_cache.shape == (1, 20) and torch.equal(with_cache, without)


def test_training_mode_routes_as_evaluation_does(model, batch):
    with torch.no_grad():
        assert torch.equal(model.train()(**batch).logits, model.eval()(**batch).logits)


def test_a_hook_on_the_gate_sees_logits_weights_and_choice(model, input_ids):
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    seen = []
    handles = [block.gate.register_forward_hook(lambda *call: seen.append(call[2])) for block in blocks]
    model(input_ids)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(blocks)
    for logits, weights, index in seen:
        assert logits.shape == (22, 8) and logits.requires_grad
        assert weights.shape == index.shape == (22, 3)
        assert torch.equal(index, logits.topk(3).indices)


def test_llama_weights_are_a_scaled_softmax_over_the_kept(input_ids):
    config = LlamaMoeConfig(
        **SIZES, intermediate_size=64, num_experts=8, num_selects=3, score_scale_factor=[1.0, 2.0, 5.0]
    )
    model = AutoModelForCausalLM.from_config(config)
    for layer, scale in enumerate((1.0, 2.0, 5.0)):
        _, weights, _ = model.model.layers[layer].mlp.gate(torch.randn(4, 32))
        torch.testing.assert_close(weights.sum(-1), torch.full((4,), scale))


def test_bfloat16(model, input_ids):
    logits = model.bfloat16()(input_ids).logits
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


def test_transformers_knows_both_by_their_type():
    assert isinstance(AutoConfig.for_model("llama_moe"), LlamaMoeConfig)
    assert isinstance(AutoConfig.for_model("deepseek"), DeepseekMoeConfig)
    assert LlamaMoeConfig().num_experts_per_tok == 4 and DeepseekMoeConfig().num_experts == 64


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (LlamaMoeConfig, {"multiply_gate_scores": False}, "multiply_gate_scores must be one of"),
        (LlamaMoeConfig, {"gate_type": "SwitchBalancedGate"}, "gate_type must be one of"),
        (LlamaMoeConfig, {"calculator_type": "SwitchDropTokenCalculator"}, "calculator_type must be one of"),
        (LlamaMoeConfig, {"add_weight_norm": True}, "add_weight_norm must be one of"),
        (LlamaMoeConfig, {"gate_use_softmax": False}, "gate_use_softmax must be one of"),
        (LlamaMoeConfig, {"num_selects": 17}, r"num_selects must lie in 1\.\.num_experts=16, got 17"),
        (LlamaMoeConfig, {"num_experts": 7}, "intermediate_size 11008 is not divisible by num_experts 7"),
        (
            LlamaMoeConfig,
            {"rope_scaling": {"type": "ntk", "factor": 2.0}},
            "rope_type must be one of default,.*got 'ntk'",
        ),
        (LlamaMoeConfig, {"hidden_act": "nope"}, "hidden_act must be one of .*silu.*, got 'nope'"),
        (DeepseekMoeConfig, {"hidden_act": "nope"}, "hidden_act must be one of .*silu.*, got 'nope'"),
        (LlamaMoeConfig, {"size_experts": [[600, 776] + [688] * 14] * 32}, "unequal experts"),
        (LlamaMoeConfig, {"score_scale_factor": [1.0]}, "score_scale_factor lists 1 factors for 32 layers"),
        (DeepseekMoeConfig, {"scoring_func": "sigmoid"}, "scoring_func must be one of softmax"),
        (DeepseekMoeConfig, {"num_experts_per_tok": 65}, r"num_experts_per_tok must lie in 1\.\.n_routed"),
        (DeepseekMoeConfig, {"moe_layer_freq": 0}, "moe_layer_freq must be at least 1"),
    ],
)
def test_refuses_other_mathematics_by_name(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


@pytest.mark.parametrize(
    ("config_class", "name", "value"),
    [
        (LlamaMoeConfig, "num_experts", "6"),
        (LlamaMoeConfig, "score_scale_factor", "4.0"),
        (LlamaMoeConfig, "gate_add_noise", "no"),
        (DeepseekMoeConfig, "n_routed_experts", "64"),
        (DeepseekMoeConfig, "norm_topk_prob", "no"),
        (DeepseekMoeConfig, "moe_layer_freq", 1.0),
    ],
)
def test_refuses_values_of_another_type_by_name(config_class, name, value):
    with pytest.raises(StrictDataclassError, match=f"field '{name}'"):
        config_class(**{name: value})


def test_what_a_configuration_leaves_out_is_what_the_original_takes():
    config = LlamaMoeConfig()
    assert (config.max_position_embeddings, config.rms_norm_eps, config.score_scale_factor) == (2048, 1e-6, 1.0)
    assert DeepseekMoeConfig().max_position_embeddings == 2048


def test_in_16_bit_the_gate_chooses_among_rounded_probabilities():
    config = DeepseekMoeConfig(hidden_size=16, n_routed_experts=16, num_experts_per_tok=2, num_attention_heads=2)
    gate = DeepseekMoeGate(config).bfloat16()
    gate.weight.data = torch.eye(16, dtype=torch.bfloat16)  # the logits are the hidden state
    hidden = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)).bfloat16() / 4
    _, weights, index = gate(hidden)
    rounded = hidden.float().softmax(-1).bfloat16()
    expected = rounded.topk(2, dim=-1)
    assert torch.equal(index, expected.indices) and torch.equal(weights, expected.values)
    assert not torch.equal(index, hidden.float().softmax(-1).topk(2, dim=-1).indices), "no two of them are equal"


def test_dynamic_rope_follows_from_the_batch_alone():
    config = LlamaMoeConfig(
        **SIZES, intermediate_size=64, num_experts=8, max_position_embeddings=8,
        rope_scaling={"type": "dynamic", "factor": 2.0},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    lengths = (5, 12, 20)
    with torch.no_grad():
        before = [model(torch.arange(length)[None]).logits for length in lengths]
        after = [model(torch.arange(length)[None]).logits for length in reversed(lengths)]
    for one, other in zip(before, reversed(after), strict=True):
        assert torch.equal(one, other)
