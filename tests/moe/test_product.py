"""Products by another library are the same products."""

from __future__ import annotations

import pytest
import torch

from fluxlib.moe import product


@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_products_equal_plain_ones(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, 160, generator=generator), torch.randn(160, 192, generator=generator)
    row = torch.randn(192, generator=generator) if bias else None
    for left, right in ((a, b), (a, b.T.contiguous().T), (a.T.contiguous().T, b)):
        expected = left.double() @ right.double() + (0 if row is None else row.double())
        torch.testing.assert_close(product.matmul(left, right, row).double(), expected, rtol=1e-4, atol=1e-4)


def test_slots_are_padded_with_pairs_that_weigh_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_has_wider", lambda: True)
    token, weight = torch.arange(70) + 1, torch.rand(70, requires_grad=True)
    padded, weights, counts = product.pad_pairs(torch.zeros(80, 4), token, weight, [3, 67, 0])
    assert counts == [3, 72, 0]
    assert torch.equal(padded[:70], token)
    assert not weights[70:].any()
    weights.sum().backward()
    assert torch.equal(weight.grad, torch.ones(70))
    assert product.pad_pairs(torch.zeros(80, 4, dtype=torch.float64), token, weight, [3, 67, 0])[2] == [3, 67, 0]


def test_sizes_are_few_and_at_most_an_eighth_larger() -> None:
    sizes = [product.padded_rows(count) for count in range(product.FEWEST_ROWS, 8193)]
    assert len(set(sizes)) <= 60
    assert all(count <= size <= count * 9 / 8 for count, size in enumerate(sizes, product.FEWEST_ROWS))
    assert product.padded_rows(5) == 5
    assert product.padded_rows(0) == 0


def _chain(seed: int = 0) -> torch.nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.SiLU(), torch.nn.Linear(96, 8, bias=False))
    for parameter in made.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return made.requires_grad_(False)


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a product is, it goes to the other library, on any processor."""
    monkeypatch.setattr(product, "SMALLEST_LINEAR", 1)
    monkeypatch.setattr(product, "SMALLEST", 1)
    monkeypatch.setattr(product, "_has_wider", torch.backends.mkldnn.is_available)


@pytest.mark.usefixtures("gains")
def test_frozen_layers_compute_and_pull_the_same() -> None:
    model, plain = _chain(), _chain().double()
    product.freeze_linears(model, wider_than=8)
    assert [type(module) for module in model] == [product.FrozenLinear, torch.nn.SiLU, torch.nn.Linear]
    hidden = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1))
    ours, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    made, expected = model(ours), plain(theirs)
    torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-5)
    made.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    product.thaw_linears(model)
    assert all(type(module) is not product.FrozenLinear for module in model)


@pytest.mark.usefixtures("gains")
def test_a_layer_that_learns_after_all_gets_its_gradient() -> None:
    model = _chain()
    product.freeze_linears(model)
    model[0].weight.requires_grad_()
    model(torch.ones(3, 64)).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert model[2].weight.grad is None


@pytest.fixture
def frozen(gains: None) -> product.FrozenLinear:
    holder = torch.nn.ModuleList([torch.nn.Linear(6, 4).requires_grad_(False)])
    product.freeze_linears(holder)
    return holder[0]


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (6,)])
def test_what_a_frozen_layer_returns_may_be_written_to(frozen: product.FrozenLinear, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    out = frozen(x)
    out.mul_(2.0).add_(1.0)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (2 * frozen.weight.sum(0)).expand(shape))


def test_a_frozen_layer_has_a_second_derivative(frozen: product.FrozenLinear) -> None:
    x = torch.randn(3, 6, requires_grad=True)
    (first,) = torch.autograd.grad(frozen(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, (2 * frozen.weight.T @ frozen.weight).sum(0).expand(3, 6))
    made = torch.func.grad(lambda z: frozen(z).square().sum())(x.detach())
    torch.testing.assert_close(made, first.detach())
