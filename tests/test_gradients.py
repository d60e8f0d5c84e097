"""Gradient norms of experts: exact against autograd, probes against exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from fluxlib import gradients, models, tasks
from fluxlib.models import DeepseekMoeConfig, DeepseekMoeForCausalLM, LlamaMoeConfig, LlamaMoeForCausalLM
from fluxlib.moe import compact, find
from fluxlib.tasks.batches import make_batch

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = ("olmoe", "llama_moe", "deepseek", "gpt_oss")


def build(kind: str = "olmoe", dtype: torch.dtype = torch.float64, scale: float = 0.4) -> nn.Module:
    sizes = {**SIZES, **SPECIAL, "num_hidden_layers": 3}
    model: nn.Module
    if kind == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(**sizes, intermediate_size=12, num_experts=8, num_experts_per_tok=2))
    elif kind == "llama_moe":
        own = {"intermediate_size": 72, "num_experts": 6, "num_selects": 2, "size_experts": [[12] * 6] * 3}
        model = LlamaMoeForCausalLM(LlamaMoeConfig(**sizes, **own))
    elif kind == "deepseek":
        own = {"moe_intermediate_size": 12, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3}
        model = DeepseekMoeForCausalLM(DeepseekMoeConfig(**sizes, **own, intermediate_size=24, first_k_dense_replace=1))
    elif kind == "llama4":
        own = {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "interleave_moe_layer_step": 1}
        model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **own, intermediate_size=12, intermediate_size_mlp=24))
    else:
        own = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
        model = GptOssForCausalLM(GptOssConfig(**sizes, **own, intermediate_size=12))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(float(parameter.dim() == 1), scale, generator=generator)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def batch(lengths: tuple[int, ...] = (9, 5, 7, 2)) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def all_experts(model: nn.Module) -> list[tuple[int, int]]:
    return [(layer.index, e) for layer in find.layers(model) for e in range(layer.num_experts)]


def by_autograd(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    model.zero_grad()
    model(**data).loss.backward()
    found = []
    for layer in find.layers(model):
        stacks = [getattr(layer.experts, n).grad for n in find.read_layout(layer.experts).names]
        found.append(sum(stack.flatten(1).square().sum(dim=1) for stack in stacks))
    model.zero_grad()
    return torch.cat(found).float()


@pytest.mark.parametrize("kind", KINDS)
def test_true_norms_are_those_of_autograd(kind: str) -> None:
    model, data = build(kind), batch()
    found = gradients.true_norms(model, data, all_experts(model))
    torch.testing.assert_close(found, by_autograd(model, data), rtol=1e-5, atol=1e-12)


def customized(model: nn.Module) -> nn.Module:
    """Per layer: experts 0 and 1 tuned, 2 frozen alone, the others in two groups."""
    plan = compact.LayerPlan(tuned=(0, 1), groups=((2,), (3, 4), (5, 6, 7)))
    return compact.customize(model, [plan] * 3)


def test_frozen_experts_of_a_customised_model_have_norms() -> None:
    """Expert 2 is frozen: its norm is what it would be if it were tuned."""
    model, data = build(), batch()
    plan = compact.LayerPlan(tuned=(0, 1, 2), groups=((3, 4), (5, 6, 7)))
    compact.customize(model, [plan] * 3)
    model(**data).loss.backward()
    expected = [
        sum(float(g.square().sum()) for g in layer.experts.grads(expert).values())
        for layer in find.layers(model)
        for expert in (0, 1, 2)
    ]
    compact.restore(model, write=False)
    customized(model)
    found = gradients.true_norms(model, data, [(layer, e) for layer in range(3) for e in (0, 1, 2)])
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-12)
    assert all(p.requires_grad for p in find.layers(model)[0].experts.parameters())


def assert_unbiased(estimates: Tensor, truth: Tensor) -> None:
    """Mean within three standard errors; p^2 is chi-squared: it deviates by the root of 2 times its mean at most."""
    assert (truth > 0).all()
    assert ((estimates.mean(dim=0) - truth).abs() <= 3 * truth * (2 / len(estimates)) ** 0.5).all()


@pytest.mark.parametrize("options", [{"guided": False}, {}])
def test_probes_are_unbiased(options: dict) -> None:
    """Mean of many probes within three standard errors of the truth, for twelve experts in three layers."""
    model, data = build(), batch((14, 12, 13, 10))
    experts = [(layer, e) for layer in range(3) for e in (0, 2, 5, 7)]
    truth = gradients.true_norms(model, data, experts)
    estimates = torch.stack([gradients.probe_norms(model, data, experts, 1, s, **options) for s in range(20)])
    assert_unbiased(estimates, truth)


def test_probes_are_unbiased_on_a_mini_model() -> None:
    """The twelve experts of largest gradient of mini-llama-moe, on four questions."""
    model, tokenizer = models.load("mini-llama-moe")
    data = make_batch(tasks.load("mini-gsm8k", seed=0).train[:4], tokenizer, 64)
    every = all_experts(model)
    norms = gradients.true_norms(model, data, every)
    chosen = norms.argsort(descending=True)[:12]
    experts = [every[i] for i in chosen.tolist()]
    for guided in (False, True):
        found = [gradients.probe_norms(model, data, experts, 1, s, guided=guided) for s in range(12)]
        assert_unbiased(torch.stack(found), norms[chosen])


def test_probes_of_a_customised_model_are_unbiased() -> None:
    model, data = customized(build()), batch((14, 12, 13, 10))
    experts = [(layer, e) for layer in range(3) for e in (0, 2)]
    truth = gradients.true_norms(model, data, experts)
    estimates = torch.stack([gradients.probe_norms(model, data, experts, 1, s) for s in range(20)])
    assert_unbiased(estimates, truth)


@pytest.mark.parametrize("kind", [*KINDS, "llama4"])
def test_a_probe_is_the_derivative_along_its_direction(kind: str) -> None:
    """Against autograd: the gradient times the very direction the probe drew, at every depth."""
    from fluxlib import seeding
    from fluxlib.gradients import local, probes

    model, data = build(kind, scale=0.2), batch()
    for layer in find.layers(model):
        model.zero_grad()
        model(**data).loss.backward()
        tensors = {n: getattr(layer.experts, n).grad[1] for n in find.read_layout(layer.experts).names}
        gradient = local.to_matrices(tensors, find.read_layout(layer.experts), torch.float64)
        direction = probes.draw(gradient, seeding.generator(0, layer.index, 1, 0))
        expected = float(local.dot(gradient, direction)) ** 2
        found = gradients.probe_norms(model, data, [(layer.index, 1)], guided=False)
        assert float(found) == pytest.approx(expected, rel=2e-2, abs=1e-7)


def test_the_guide_leaves_nothing_to_chance_in_the_last_layer() -> None:
    model, data = build(), batch()
    experts = [(2, e) for e in range(8)]
    truth = gradients.true_norms(model, data, experts)
    torch.testing.assert_close(gradients.probe_norms(model, data, experts), truth, rtol=1e-2, atol=1e-6)


def test_the_cost_counts_the_layers_above() -> None:
    """Three layers: a probe of the first runs two thirds of the model, twice; one of the last runs the head."""
    model = build()
    assert gradients.probe_cost(model, [(0, 1)]) == pytest.approx(1 + 2 * 2 / 3)
    assert gradients.probe_cost(model, [(2, 1), (1, 0)], num_probes=3, sides=1) == pytest.approx(1 + 3 * 1 / 3)
    assert gradients.probe_cost(model, []) == 0


def test_probes_repeat_by_seed_and_average() -> None:
    model, data, experts = build(), batch(), [(1, 0), (0, 3)]
    first = gradients.probe_norms(model, data, experts, seed=3)
    assert torch.equal(first, gradients.probe_norms(model, data, experts, seed=3))
    assert not torch.equal(first, gradients.probe_norms(model, data, experts, seed=4))
    assert torch.equal(first.flip(0), gradients.probe_norms(model, data, experts[::-1], seed=3))
    many = gradients.probe_norms(model, data, experts, num_probes=8, seed=3)
    assert (many > 0).all()


def test_one_sided_probes_are_close_to_two_sided_ones() -> None:
    model, data, experts = build(), batch(), [(0, 0), (1, 2)]
    two, one = (gradients.probe_norms(model, data, experts, sides=sides, sigma=1e-4) for sides in (2, 1))
    torch.testing.assert_close(one, two, rtol=5e-2, atol=0)


@pytest.mark.parametrize("custom", [False, True])
def test_after_probing_every_weight_is_bit_identical(custom: bool) -> None:
    model, data = build(dtype=torch.float32), batch()
    if custom:
        customized(model)
    model.train()
    block = find.layers(model)[1].block
    block.forward = block.forward  # one of its own, which is to come back
    before = [(name, tensor.clone()) for name, tensor in model.state_dict().items()]
    trainable = [p.requires_grad for p in model.parameters()]
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    gradients.probe_norms(model, data, [(0, 0), (1, 1), (2, 2)], num_probes=2)
    gradients.true_norms(model, data, [(0, 0), (1, 1), (2, 2)])
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before)
    assert trainable == [p.requires_grad for p in model.parameters()]
    assert forwards == [m.__dict__.get("forward") for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert model.training


@pytest.mark.parametrize("kind", [*KINDS, "llama4"])
def test_patching_in_the_same_output_is_the_same_loss(kind: str) -> None:
    from fluxlib.gradients.patching import CachedForward, scored_tokens

    model, data = build(kind, dtype=torch.float32, scale=0.2), batch()
    found = find.layers(model)
    cached = CachedForward(model, data, found)
    with torch.no_grad():
        loss = float(model(**data).loss)
    samples = torch.tensor([2, 0, 3, 1])
    for layer in found:
        again = cached.losses(layer, samples, cached.output_of(layer, samples))
        assert float(again.sum() / scored_tokens(data["labels"]).sum()) == pytest.approx(loss, rel=1e-6)


def test_a_patched_pass_computes_only_the_layers_above() -> None:
    from fluxlib.gradients.patching import CachedForward

    model, data = build(), batch()
    found = find.layers(model)
    cached = CachedForward(model, data, found)
    ran: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "lm_head")):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    cached.losses(found[1], torch.arange(4), cached.output_of(found[1], torch.arange(4)))
    assert ran == ["model.layers.2.self_attn.q_proj", "lm_head"]


def test_experts_that_no_token_reaches_have_no_gradient() -> None:
    model, data = build(), batch()
    model.model.layers[0].mlp.gate.weight.data.zero_()
    experts = [(0, e) for e in range(8)]
    assert (gradients.true_norms(model, data, experts) == 0).sum() == 6
    assert (gradients.probe_norms(model, data, experts) == 0).sum() == 6


def test_norms_of_nothing_are_nothing() -> None:
    model, data = build(), batch()
    assert gradients.true_norms(model, data, []).shape == (0,)
    assert gradients.probe_norms(model, data, []).shape == (0,)


@pytest.mark.parametrize("function", [gradients.true_norms, gradients.probe_norms])
def test_wrong_input_is_named(function) -> None:
    model, data = build(), batch()
    with pytest.raises(ValueError, match=r"MoE layers 0..2, got \(3, 0\)"):
        function(model, data, [(3, 0)])
    with pytest.raises(ValueError, match=r"layer 1 has 0..7, got 8"):
        function(model, data, [(1, 8)])
    with pytest.raises(ValueError, match="at least one scored token, got 4 samples"):
        function(model, {**data, "labels": torch.full_like(data["labels"], -100)}, [(0, 0)])
    with pytest.raises(ValueError, match=r"4 of layer 0 is merged with others: \[3, 4\]"):
        function(customized(model), data, [(0, 4)])


def test_probes_name_a_wrong_number_of_sides() -> None:
    with pytest.raises(ValueError, match="sides must be 1 or 2"):
        gradients.probe_norms(build(), batch(), [(0, 0)], sides=3)


def test_a_model_without_experts_is_named() -> None:
    with pytest.raises(ValueError, match="no MoE layer"):
        gradients.probe_norms(nn.Linear(2, 2), batch(), [(0, 0)])
