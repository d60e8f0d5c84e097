"""The mean per expert, on numbers made by hand."""

from __future__ import annotations

import pytest
import torch

from fluxlib.federation.server.aggregation import ExpertMean


def tokens(**counts: float) -> torch.Tensor:
    """``[1, 3]`` tokens: ``e0=..., e1=...``."""
    return torch.tensor([[counts.get(f"e{i}", 0.0) for i in range(3)]])


def change(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([value, -value])}


def test_changes_are_weighted_by_tokens_of_the_expert() -> None:
    mean = ExpertMean()
    mean.add({(0, 0): change(1.0), (0, 1): change(8.0)}, tokens(e0=1, e1=5))
    mean.add({(0, 0): change(4.0)}, tokens(e0=2))
    mean.add({(0, 0): change(7.0)}, tokens(e0=3))
    result = mean.result()
    assert set(result) == {(0, 0), (0, 1)}
    assert result[0, 0]["w"].tolist() == [5.0, -5.0]  # (1*1 + 2*4 + 3*7) / 6
    assert result[0, 1]["w"].tolist() == [8.0, -8.0]


@pytest.mark.parametrize("count", [0.0, 3.0, 0.1])
def test_a_single_change_comes_back_bit_for_bit(count: float) -> None:
    given = {"w": torch.randn(50, generator=torch.Generator().manual_seed(1))}
    mean = ExpertMean()
    mean.add({(0, 2): given}, tokens(e2=count))
    assert torch.equal(mean.result()[0, 2]["w"], given["w"])


def test_given_tensors_are_not_changed() -> None:
    first, second = change(1.0), change(3.0)
    mean = ExpertMean()
    for given in (first, second, second):
        mean.add({(0, 0): given}, tokens(e0=2))
    mean.result()
    assert (first["w"][0], second["w"][0]) == (1.0, 3.0)


def test_without_tokens_anywhere_all_count_alike() -> None:
    mean = ExpertMean()
    mean.add({(0, 0): change(1.0)}, tokens())
    mean.add({(0, 0): change(3.0)}, tokens())
    assert mean.result()[0, 0]["w"].tolist() == pytest.approx([2.0, -2.0])


def test_without_tokens_one_counts_next_to_nothing_beside_another() -> None:
    mean = ExpertMean()
    mean.add({(0, 0): change(1.0)}, tokens())
    mean.add({(0, 0): change(3.0)}, tokens(e0=100))
    assert mean.result()[0, 0]["w"].tolist() == pytest.approx([3.0, -3.0])


def test_memory_does_not_grow_with_the_number_of_replies() -> None:
    mean = ExpertMean()
    for _ in range(100):
        mean.add({(0, 0): change(1.0)}, tokens(e0=1))
    assert sum(t.numel() for total in mean._sums.values() for t in total.tensors.values()) == 2
