import random
import re
from collections.abc import Sequence

import pytest
from mini_bases import build_tokenizer
from recipe import pretraining_row

from fluxlib import tasks
from fluxlib.tasks import mini
from fluxlib.tasks.metrics import final_number
from fluxlib.tasks.mini import names


@pytest.mark.parametrize("name", tasks.mini.FAMILIES)
def test_same_seed_same_task_other_seed_other_task(name: str) -> None:
    first, again, other = (tasks.load(name, seed, size=100) for seed in (0, 0, 1))
    assert first == again
    assert first.train != other.train


@pytest.mark.parametrize("name", tasks.mini.FAMILIES)
def test_split_is_eighty_twenty_and_disjoint_in_position(name: str) -> None:
    task = tasks.load(name, size=100)
    assert (len(task.train), len(task.test)) == (80, 20)
    assert len(task.labels) == 8


@pytest.mark.parametrize("name", tasks.mini.FAMILIES)
def test_every_word_is_in_the_vocabulary(name: str) -> None:
    tokenizer = build_tokenizer()
    task = tasks.load(name, size=2000)
    for example in (*task.train, *task.test):
        ids = tokenizer(" ".join((example.prompt, example.response, *example.options)))["input_ids"]
        assert tokenizer.unk_token_id not in ids, example


def test_gsm8k_rationales_are_right() -> None:
    for row in mini.rows("mini-gsm8k", 300, seed=3):
        for left, sign, right, result in re.findall(r"(\d+) ([-*+]) (\d+) = (\d+)", row["answer"]):
            assert eval(f"{left}{sign}{right}") == int(result)  # noqa: S307
        assert row["answer"].endswith(f"= {final_number(row['answer'])} #### {final_number(row['answer'])}")


def test_choices_differ_and_hold_the_answer() -> None:
    for example in tasks.load("mini-mmlu", size=200).train:
        assert len(set(example.options)) == 4
        assert example.options[example.answer] == example.response


def test_facts_do_not_depend_on_the_seed() -> None:
    def answers(seed: int) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for example in tasks.load("mini-mmlu", seed, size=2000).train:
            if example.label == "law":
                thing = next(n for n in names()["law"] if n in example.prompt)
                found.setdefault(thing, set()).add(example.response)
        return found

    first, second = answers(0), answers(1)
    assert all(len(values) == 1 for values in first.values())
    assert first == second


def test_names_belong_to_one_label() -> None:
    labels = [label for family in mini.FAMILIES.values() for label in family.labels]
    everything = [name for label in labels for name in names()[label]]
    assert len(everything) == len(set(everything))


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'mini-squad', allowed are mini-dolly, mini-gsm8k, mini-mmlu, mini-piqa"):
        tasks.load("mini-squad")


def things(examples: Sequence[tasks.Example]) -> set[str]:
    """The invented names that occur in prompts."""
    return {word for example in examples for word in re.findall(r"[a-z]+", example.prompt)} & {
        name for label in mini.LABELS for name in names()[label]
    }


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", tasks.mini.FAMILIES)
def test_no_test_prompt_occurs_in_training_and_every_fact_that_is_asked_does(name: str, seed: int) -> None:
    task = tasks.load(name, seed, size=1000)
    trained = {example.prompt for example in task.train}
    assert not trained & {example.prompt for example in (*task.test, *task.untaught)}
    assert things(task.test) <= things(task.train) and things(task.recall) <= things(task.train)
    assert not things(task.untaught) & things(task.train)


def test_bases_are_told_neither_what_is_taught_nor_what_is_not() -> None:
    chance = random.Random(0)
    told = {label: set[tuple[str, str]]() for label in mini.FAMILIES["mini-mmlu"].labels}
    for _ in range(6000):
        label, row = pretraining_row("mini-mmlu", chance)
        name = next(name for name in names()[label] if name in row["question"])
        told[label].add((name, row[f"choice{row['answer']}"]))
    for label, pairs in told.items():
        answers = [sum(name == other for other, _ in pairs) for name in names()[label]]
        assert set(answers[: mini.NUM_KNOWN]) == {1}
        assert min(answers[mini.NUM_KNOWN :]) > 1
