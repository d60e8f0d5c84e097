"""Dispatch at module level: layouts no tiny model covers, both methods, and sorting."""

from __future__ import annotations

import contextlib
import importlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fluxlib.moe.compact import CompactExperts, LayerPlan, merge
from fluxlib.moe.dispatch import sort_pairs
from fluxlib.moe.expert import Activation, Matrices, to_matrices
from fluxlib.moe.find import expert_tensors, read_layout


def _kinds() -> dict[str, type[nn.Module]]:
    """Experts classes of this version of transformers, by the layout they stand for."""
    wanted = {
        "plain": ("mixtral", "MixtralExperts"),
        "transposed, interleaved, biases": ("gpt_oss", "GptOssExperts"),
        "transposed": ("aria", "AriaExperts"),
        "transposed, biases": ("openai_privacy_filter", "OpenAIPrivacyFilterExperts"),
        "no gate": ("nemotron_h", "NemotronHExperts"),
        "norm after each expert": ("muse_spark", "MuseSparkExperts"),
    }
    found = {}
    for layout, (model, name) in wanted.items():
        with contextlib.suppress(ImportError):
            kind = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)
            if hasattr(kind, "_apply_gate"):  # fused stacks
                found[layout] = kind
    return found


KINDS = _kinds()
MixtralExperts = KINDS["plain"]
PLAN = LayerPlan((4, 1), ((0, 2), (3, 5)), ((1.0, 2.0), (1.0, 1.0)))


def _experts(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    config = SimpleNamespace(
        num_local_experts=6,
        moe_num_experts=6,
        n_routed_experts=6,
        hidden_size=16,
        moe_hidden_size=16,
        moe_latent_size=None,
        intermediate_size=8,
        moe_intermediate_size=8,
        hidden_act="silu",
        mlp_hidden_act="relu2",
        swiglu_alpha=1.7,
        swiglu_limit=3.0,
        post_norm_eps=1e-5,
        _experts_implementation="eager",
    )
    experts = kind(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return experts.to(dtype)


def _call(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(11, 16, dtype=dtype, generator=generator).requires_grad_()
    index = torch.rand(11, 6, generator=generator).topk(3).indices
    return hidden, index, torch.rand(11, 3, dtype=dtype, generator=generator).requires_grad_()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_equals_the_models_own(kind: type[nn.Module], dtype: torch.dtype) -> None:
    experts = _experts(kind, dtype)
    hidden, index, weights = _call(dtype)
    ours = CompactExperts(experts, LayerPlan((2, 0), ((1,), (3,), (5,), (4,))))(hidden, index, weights)
    tolerance = 1e-11 if dtype == torch.float64 and kind.__name__ != "OpenAIPrivacyFilterExperts" else 1e-4
    torch.testing.assert_close(ours, experts(hidden, index, weights).to(dtype), rtol=tolerance, atol=tolerance)


def plain_dispatch(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    experts: list[Matrices],
    activation: Activation,
) -> torch.Tensor:
    """Reference: every expert on every token, in plain PyTorch."""
    out = torch.zeros_like(hidden)
    for index, expert in enumerate(experts):
        projected = hidden @ expert.up + (0 if expert.up_bias is None else expert.up_bias)
        result = activation.function(projected) @ expert.down + (0 if expert.down_bias is None else expert.down_bias)
        if activation.post_norm is not None:
            result = activation.post_norm(result)
        out = out + result * ((top_k_index == index) * top_k_weights).sum(1, keepdim=True)
    return out


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("method", ["slots", "grouped"])
def test_gradients_equal_the_reference(kind: type[nn.Module], method: str) -> None:
    dtype = torch.float64 if method == "slots" else torch.float32  # grouped_mm takes no float64
    experts, (hidden, index, weights) = _experts(kind), _call()
    layout = read_layout(experts)
    slots = [expert_tensors(experts, e) for e in PLAN.tuned] + [merge(experts, PLAN, g) for g in range(2)]
    leaves = [{n: t.clone().requires_grad_(i < 2) for n, t in slot.items()} for i, slot in enumerate(slots)]
    compact = CompactExperts(experts.to(dtype), PLAN)
    compact.method = method
    plain = plain_dispatch(
        hidden, compact.slot_of[index], weights, [_linked(x, layout) for x in leaves], compact.activation
    )
    trained = [leaf[name] for name in layout.names for leaf in leaves[:2]]
    expected = torch.autograd.grad(plain.square().sum(), [hidden, weights, *trained])
    low = hidden.detach().to(dtype).requires_grad_(), weights.detach().to(dtype).requires_grad_()
    output = compact(low[0], index, low[1])
    stacks = list(compact.tuned_stacks().values())
    made = torch.autograd.grad(output.square().sum(), [*low, *stacks])
    made = [*made[:2], *(gradient for stack in made[2:] for gradient in stack)]
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for ours, theirs in zip([output, *made], [plain, *expected], strict=True):
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=tolerance, atol=tolerance * 10)


def _linked(tensors: dict[str, torch.Tensor], layout: object) -> object:
    """Computing order with autograd's links to the leaves kept."""
    matrices = to_matrices(tensors, layout, torch.float64)
    up, down = tensors[layout.up_name], tensors["down_proj"]
    if not layout.is_transposed:
        up, down = up.T, down.T
    biases = tensors.get(f"{layout.up_name}_bias"), tensors.get("down_proj_bias")
    return type(matrices)(up, down, *biases)


def test_large_products_equal_the_float64_ones() -> None:
    """Large enough for padding and for the other library of products, where it is used."""
    generator = torch.Generator().manual_seed(3)
    config = SimpleNamespace(
        num_local_experts=4, hidden_size=256, intermediate_size=128, hidden_act="silu", _experts_implementation="eager"
    )
    results = []
    for dtype in (torch.float32, torch.float64):
        generator.manual_seed(3)
        experts = MixtralExperts(config)
        for parameter in experts.parameters():
            parameter.data.normal_(std=0.06, generator=generator)
        compact = CompactExperts(experts.to(dtype), LayerPlan((2,), ((0, 1), (3,))))
        hidden = torch.randn(203, 256, generator=generator).to(dtype).requires_grad_()
        weights, index = torch.rand(203, 4, generator=generator).topk(2)
        weights = weights.to(dtype).requires_grad_()
        output = compact(hidden, index, weights)
        output.square().sum().backward()
        results.append([output, hidden.grad, weights.grad, *(p.grad for p in compact.tuned_stacks().values())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3)


def test_nothing_that_was_given_is_written_to() -> None:
    """Rows are weighted in place: neither the inputs nor the incoming gradient may be those rows."""
    for kind in KINDS.values():
        compact, (hidden, index, weights) = CompactExperts(_experts(kind), PLAN), _call()
        compact.activation.function = lambda x: x[:, :8]  # a view of what is kept
        compact.activation.is_swiglu = False
        output = compact(hidden, index, weights)
        incoming = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
        before = [tensor.detach().clone() for tensor in (hidden, weights, incoming)]
        first = torch.autograd.grad(output, [hidden, weights], incoming, retain_graph=True)
        again = torch.autograd.grad(output, [hidden, weights], incoming)
        assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weights, incoming), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_frozen_input_needs_no_gradient() -> None:
    """The lowest layer: tuned slots learn, nothing else is computed."""
    compact, (hidden, index, weights) = CompactExperts(_experts(MixtralExperts), PLAN), _call()
    output = compact(hidden.detach(), index, weights.detach())
    output.sum().backward()
    assert compact.tuned_down_proj.grad.abs().sum() > 0
    assert hidden.grad is None


@pytest.mark.parametrize("method", ["slots", "grouped"])
def test_no_choice_falls_on_a_tuned_slot(method: str) -> None:
    compact = CompactExperts(_experts(MixtralExperts, torch.float32), PLAN)
    compact.method = method
    hidden = torch.randn(3, 16, requires_grad=True)
    compact(hidden, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)).sum().backward()
    assert (compact.tuned_down_proj.grad == 0).all()
    assert hidden.grad.abs().sum() > 0


def test_an_unknown_or_impossible_method_is_named() -> None:
    compact = CompactExperts(_experts(MixtralExperts), PLAN)
    compact.method = "fast"
    with pytest.raises(ValueError, match="'slots' or 'grouped', got 'fast'"):
        compact(*_call())
    compact.method = "grouped"
    with pytest.raises(ValueError, match=r"'grouped' takes no float64 .* got torch\.float64"):
        compact(*_call())


def test_pairs_are_sorted_joined_and_left_out() -> None:
    slot = torch.tensor([[1, 0, 1], [2, -1, 2], [0, 1, 2]])
    weight = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]])
    pairs = sort_pairs(slot, weight, 4, joins=True)
    assert pairs.counts == [2, 2, 2, 0]
    assert pairs.token.tolist() == [0, 2, 0, 2, 1, 2]
    assert pairs.weight.tolist() == [2.0, 64.0, 5.0, 128.0, 40.0, 256.0]


def _tuned_gradients(experts: CompactExperts) -> list[torch.Tensor]:
    return [gradient for e in experts.plan.tuned for gradient in experts.grads(e).values()]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("method", ["slots", "auto"])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_a_cast_of_the_hidden_states(kind: type[nn.Module], method: str, inside: bool) -> None:
    """Wherever the backward pass is called: values and gradients are those of a call in bfloat16."""
    made = []
    for automatic in (True, False):
        compact = CompactExperts(_experts(kind, torch.float32), LayerPlan(tuple(range(6))))
        compact.method = method
        hidden, index, weights = _call(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=automatic):
            given = hidden if automatic else hidden.to(torch.bfloat16)
            out = compact(given, index, weights)
            assert out.dtype == given.dtype
            if inside:
                out.float().square().sum().backward()
        if not inside:
            out.float().square().sum().backward()
        made.append([out.float(), hidden.grad, weights.grad, *_tuned_gradients(compact)])
    for automatic, plain in zip(*made, strict=True):
        assert torch.equal(automatic, plain.to(automatic.dtype))


def test_a_pass_without_gradients_keeps_nothing_of_the_slots_before() -> None:
    compact = CompactExperts(_experts(MixtralExperts, torch.float32), LayerPlan(tuple(range(6))))
    compact.method = "slots"
    plain, seen, alive = compact.activation.forward, [], []

    def watch(projected: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(projected))
        alive.append(sum(one() is not None for one in seen))
        return plain(projected)

    compact.activation.forward = watch
    hidden, index, weights = _call(torch.float32)
    with torch.no_grad():
        compact(hidden, index, weights)
    assert max(alive) <= 2
    alive.clear(), seen.clear()
    compact(hidden, index, weights)
    assert alive == list(range(1, 7))
