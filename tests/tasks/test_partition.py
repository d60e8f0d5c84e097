import pytest

from fluxlib import seeding
from fluxlib.tasks import Example
from fluxlib.tasks.partition import histogram, partition

EXAMPLES = [Example("p", "r", label="abcd"[i % 4]) for i in range(400)]


def deal(**options: object) -> list[list[int]]:
    return partition(EXAMPLES, 8, seeding.generator(0, "partition"), **options)


@pytest.mark.parametrize("options", [{}, {"equal_sizes": False}, {"scheme": "iid"}, {"scheme": "label"}])
def test_every_sample_goes_to_one_participant(options: dict[str, object]) -> None:
    parts = deal(**options)
    dealt = [i for part in parts for i in part]
    assert len(parts) == 8
    assert all(parts)
    assert sorted(dealt) == list(range(400))


def test_same_generator_same_partition() -> None:
    assert deal() == deal()


def test_equal_sizes() -> None:
    assert {len(part) for part in deal(alpha=0.1)} == {50}


def test_by_label_gives_one_label_each() -> None:
    assert [set(counts) for counts in histogram(EXAMPLES, deal(scheme="label"))] == [{c} for c in "abcdabcd"]


def test_small_alpha_is_more_skewed_than_large() -> None:
    def largest_share(alpha: float) -> float:
        return sum(max(counts.values()) for counts in histogram(EXAMPLES, deal(alpha=alpha))) / 400

    assert largest_share(0.05) > 0.7 > 0.4 > largest_share(100)


def test_histogram_counts_labels() -> None:
    assert histogram(EXAMPLES, [[0, 1, 4], [2]]) == [{"a": 2, "b": 1}, {"c": 1}]


def test_more_participants_than_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_participants is 8, allowed is at most the number of samples, 3"):
        partition(EXAMPLES[:3], 8, seeding.generator(0))
