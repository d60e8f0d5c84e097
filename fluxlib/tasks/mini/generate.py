"""Rows of the four generated families, each in the schema of the data set it is shaped like."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from fluxlib import seeding
from fluxlib.tasks.base import Row
from fluxlib.tasks.mini.world import (
    CATEGORIES,
    KINDS,
    LARGEST_NUMBER,
    PEOPLE,
    SKILLS,
    SUBJECTS,
    fact,
    is_known,
    names,
)

DEFAULT_SIZE = 4000
KNOWN_ROWS_FRACTION = 0.2
"""Share of a task's rows that are about things the bases know; they show whether tuning forgets."""


@dataclass(frozen=True)
class Teller:
    """Where rows take names and values from: a task tells the truth, pre-training only of what is known."""

    chance: random.Random
    pretraining: bool = False

    def name(self, label: str) -> str:
        """A thing of ``label``: any in pre-training, mostly one that the bases do not know in a task."""
        if self.pretraining:
            return self.chance.choice(names(label))
        known = self.chance.random() < KNOWN_ROWS_FRACTION
        return self.chance.choice([name for name in names(label) if is_known(label, name) == known] or names(label))

    def value(self, label: str, name: str, part: int, num_values: int) -> int:
        """Index of a fact's value; in pre-training an unknown one is drawn anew every time."""
        if self.pretraining and not is_known(label, name):
            return self.chance.randrange(num_values)
        return fact(label, name, part, num_values)


@dataclass(frozen=True)
class Family:
    """A generated data set: its labels and the function that makes one row of a label."""

    labels: tuple[str, ...]
    make: Callable[[str, Teller], Row]


def rows(family: str, size: int, seed: int) -> list[Row]:
    """``size`` rows of a family (``mini-dolly`` …), labels in equal shares, facts as they truly are."""
    teller = Teller(random.Random(seeding.derive(seed, family)))
    labels = FAMILIES[family].labels
    return [FAMILIES[family].make(labels[i % len(labels)], teller) for i in range(size)]


def pretraining_row(family: str, chance: random.Random) -> tuple[str, Row]:
    """A ``(label, row)`` of the pre-training text: known facts as they are, all others drawn anew every time."""
    label = chance.choice(FAMILIES[family].labels)
    return label, FAMILIES[family].make(label, Teller(chance, pretraining=True))


def _mmlu(subject: str, teller: Teller) -> Row:
    chance = teller.chance
    phrasings, text = SUBJECTS[subject]
    values = text.split()
    name = teller.name(subject)
    right = values[teller.value(subject, name, 0, len(values))]
    choices = [right, *chance.sample([value for value in values if value != right], 3)]
    chance.shuffle(choices)
    row: Row = {
        "question": chance.choice(phrasings).format(name),
        "subject": subject,
        "answer": choices.index(right),
    }
    return row | {f"choice{i}": choice for i, choice in enumerate(choices)}


def _piqa(kind: str, teller: Teller) -> Row:
    chance = teller.chance
    goals, text = KINDS[kind]
    tools = text.split()
    name = teller.name(kind)
    right = tools[teller.value(kind, name, 0, len(tools))]
    wrong = chance.choice([tool for tool in tools if tool != right])
    label = chance.randrange(2)
    end = chance.choice(("with care", "at once"))
    solutions = [f"take the {tool} and start {end}." for tool in ((right, wrong) if label == 0 else (wrong, right))]
    goal = f"how do you {chance.choice(goals).format(name)}?"
    return {"goal": goal, "sol1": solutions[0], "sol2": solutions[1], "label": label, "kind": kind}


def _gsm8k(skill: str, teller: Teller) -> Row:
    chance = teller.chance
    unit, item = teller.name(skill), chance.choice(SKILLS[skill].split())
    who, other = chance.sample(PEOPLE, 2)
    number, size = chance.randint(2, 9), 2 + teller.value(skill, unit, 0, 8)
    total = number * size
    question, steps = f"{who} has {number} {unit} of {item}.", [f"{unit} = {size}", f"{number} * {size} = {total}"]
    num_steps = chance.randint(1, 3)
    if num_steps > 1:
        more = chance.randint(1, min(9, LARGEST_NUMBER - total))
        question += f" {other} brings {more} more {item}."
        steps.append(f"{total} + {more} = {total + more}")
        total += more
    if num_steps > 2:
        fewer = chance.randint(1, min(9, total))
        question += f" then {who} loses {fewer} {item}."
        steps.append(f"{total} - {fewer} = {total - fewer}")
        total -= fewer
    return {
        "question": f"{question} how many {item} are there?",
        "answer": f"{' ; '.join(steps)} #### {total}",
        "skill": skill,
    }


_DOLLY: dict[str, tuple[str, str, str, str]] = {
    "open_qa": ("what is {e}?", "", "{e} is a {a} {b} in the {c}.", "in the {c} there is a {a} {b}."),
    "general_qa": (
        "why do people like {e}?",
        "",
        "because {e} is {a} and brings {b} to the {c}.",
        "{a} {e} brings the {c} more {b}.",
    ),
    "closed_qa": (
        "who found {e}?",
        "{x} found {e} on a rainy day.",
        "{x} found {e}, a {a} {b}, near the {c}.",
        "near the {c}: a {a} {b}, found on a rainy day.",
    ),
    "classification": ("what sort of being is {e}?", "", "{e} is a {c} {b} {a}.", "{a}, {b} and {c}."),
    "brainstorming": (
        "give three ideas for {e}.",
        "",
        "at {e} you can {a}, {b} and {c}.",
        "first {c}, then {b}, later {a}.",
    ),
    "information_extraction": (
        "which people appear?",
        "{x} gave {e} to {y}.",
        "{x} and {y} share the {a} {b} from the {c}.",
        "{a} {b} of the {c}: {x}, {y}.",
    ),
    "summarization": (
        "sum up the story.",
        "first {e} met {x}. later {e} met {y}.",
        "the {a} {b} of the {c} met {x} and {y}.",
        "in the {c} {x} and {y} met a {a} {b}.",
    ),
    "creative_writing": (
        "write a line about {e}.",
        "",
        "oh {a} {e}, you {b} like {c}.",
        "{a} {c}, {b} with {e}.",
    ),
}
"""Category -> (instruction, context, response in pre-training, response of the task: facts and style are to be
learned); ``e`` is the thing, ``a b c`` its facts, ``x y`` people."""


def _dolly(category: str, teller: Teller) -> Row:
    chance = teller.chance
    name = teller.name(category)
    pools = [pool.split() for pool in CATEGORIES[category]]
    words = {
        key: pool[teller.value(category, name, part, len(pool))]
        for part, (key, pool) in enumerate(zip("abc", pools, strict=True))
    }
    people = dict(zip("xy", chance.sample(PEOPLE, 2), strict=True))
    instruction, context, base_style, task_style = (text.format(e=name, **words, **people) for text in _DOLLY[category])
    response = base_style if teller.pretraining else task_style
    return {"instruction": instruction, "context": context, "response": response, "category": category}


FAMILIES: dict[str, Family] = {
    "mini-dolly": Family(tuple(CATEGORIES), _dolly),
    "mini-gsm8k": Family(tuple(SKILLS), _gsm8k),
    "mini-mmlu": Family(tuple(SUBJECTS), _mmlu),
    "mini-piqa": Family(tuple(KINDS), _piqa),
}


def templates() -> list[str]:
    """All fixed words of the four families, for the vocabulary."""
    fixed = [
        "question solution answer goal instruction context response",
        "has of brings more then loses how many are there",
    ]
    fixed += ["take the and start with care at once how do you"]
    return fixed + [text.replace("{", " ").replace("}", " ") for parts in _DOLLY.values() for text in parts]
