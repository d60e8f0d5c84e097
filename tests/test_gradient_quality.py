"""Statistics of estimated norms, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fluxlib.gradients.quality import quality
from fluxlib.profiling import ranks


def test_a_perfect_estimate_has_no_error() -> None:
    true = torch.tensor([4.0, 0.0, 1.0, 9.0])
    found = quality(true.repeat(3, 1), true, torch.tensor([1.0, 5.0, 2.0, 3.0]))
    assert found["cosine_distance"] == pytest.approx(0.0, abs=1e-12)
    assert (found["rank_correlation"], found["bias"], found["spread"]) == (pytest.approx(1.0), 0.0, 0.0)


def test_statistics_are_those_of_the_ratio_and_of_utilities() -> None:
    found = quality(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))
    # Ratios 4, 0, 0, 4; utilities (2, 0) and (0, 2) against (1, 1).
    assert found["bias"] == pytest.approx(1.0)
    assert found["bias_error"] == 0.0  # both repeats have the same mean ratio
    assert found["spread"] == pytest.approx(math.sqrt((9 + 1 + 1 + 9) / 4))
    assert found["cosine_distance"] == pytest.approx(1 - 1 / math.sqrt(2))


def test_a_normal_p_has_the_spread_and_distance_of_theory() -> None:
    true = torch.ones(400)
    p = torch.randn(50, 400, generator=torch.Generator().manual_seed(0))
    found = quality(p.square(), true, true)
    assert found["spread"] == pytest.approx(math.sqrt(2), rel=0.05)
    assert found["cosine_distance"] == pytest.approx(1 - math.sqrt(2 / math.pi), abs=0.01)
    assert abs(found["bias"]) < 0.03


def test_rounding_of_a_tiny_gradient_does_not_count_as_bias() -> None:
    found = quality(torch.tensor([[1.0, 1e-6]]), torch.tensor([1.0, 1e-9]), torch.ones(2))
    assert (found["bias"], found["spread"]) == (0.0, 0.0)
    assert quality(torch.tensor([[1.0, 1e-6]]), torch.tensor([1.0, 1e-9]), torch.ones(2), floor=0)["bias"] > 100


def test_ties_share_their_rank() -> None:
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]


def test_the_order_is_that_of_utilities_not_of_norms() -> None:
    found = quality(torch.tensor([[1.0, 4.0, 9.0]]), torch.tensor([9.0, 4.0, 1.0]), torch.tensor([100.0, 10.0, 1.0]))
    assert found["rank_correlation"] == pytest.approx(1.0)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[R, N\], \[N\] and \[N\], got \(2,\)"):
        quality(torch.ones(2), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="no expert has a gradient"):
        quality(torch.ones(1, 2), torch.zeros(2), torch.ones(2))
