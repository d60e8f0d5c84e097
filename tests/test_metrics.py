import pytest

from fluxlib.tasks.metrics import exact_match, final_number, rouge_l


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 * 6 = 18 #### 18", "18"),
        ("#### 1,018", "1018"),
        ("#### 5 so #### 7", "7"),
        ("#### 2.50", "2.5"),
        ("#### -4 apples", "-4"),
        ("18", None),
        ("####", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_exact_match_needs_the_mark_and_the_number() -> None:
    assert exact_match("x #### 7", "y #### 7") == 1
    assert exact_match("7", "y #### 7") == 0
    assert exact_match("no number", "no number") == 0


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    assert rouge_l("a red fox", "a red fox") == 1
    assert rouge_l("red fox a", "a red fox") == pytest.approx(2 / 3)
    assert rouge_l("", "a red fox") == 0
