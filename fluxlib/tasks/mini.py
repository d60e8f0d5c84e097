"""Generated tasks in the public schemas of Dolly, GSM8K, MMLU and PIQA, about one small invented world.

Every label (category, skill, subject, kind; all words are in ``mini.yaml``) has things of its own, with names found
nowhere else, and facts about them. A base model is pre-trained on all formats and names but on only a part of the facts
(:func:`is_known`): fine-tuning a task means learning the rest, which lies with the participants who hold that label.
That is what makes experts specialise and participants differ.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fluxlib import seeding
from fluxlib.tasks.base import Row

WORLD: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
WORLD_SEED = 2026
KNOWN_FRACTION = 0.4
"""Share of the facts that the base models are pre-trained on."""
KNOWN_ROWS_FRACTION = 0.2
"""Share of a task's rows that are about things the bases know; they show whether tuning forgets."""
NUM_THINGS = 20
"""Named things per label."""
LARGEST_NUMBER = 99
DEFAULT_SIZE = 4000
PARTS = ("subjects", "kinds", "skills", "categories")
LABELS = [label for part in PARTS for label in WORLD[part]]
PEOPLE = WORLD["people"].split()


@cache
def names(label: str) -> tuple[str, ...]:
    """The invented names of a label's things; no two labels share one."""
    return _all_names()[label]


@cache
def _all_names() -> dict[str, tuple[str, ...]]:
    chance = random.Random(seeding.derive(WORLD_SEED, "names"))
    taken, syllables = _words(PEOPLE, LABELS, *(WORLD[part] for part in PARTS)), WORLD["syllables"].split()
    found: dict[str, tuple[str, ...]] = {}
    for label in LABELS:
        chosen: list[str] = []
        while len(chosen) < NUM_THINGS:
            name = "".join(chance.sample(syllables, 3))
            if name not in taken:
                taken.add(name)
                chosen.append(name)
        found[label] = tuple(chosen)
    return found


def _words(*parts: Any) -> set[str]:
    """All words in texts, and in lists and mappings of them."""
    found: set[str] = set()
    for part in parts:
        if isinstance(part, str):
            found |= set(re.findall(r"[a-z]+", part))
        else:
            found |= _words(*(part.values() if isinstance(part, dict) else part))
    return found


@cache
def fact(label: str, name: str, part: int, num_values: int) -> int:
    """The true value (an index) of ``part`` of the thing called ``name``."""
    return seeding.derive(WORLD_SEED, "fact", label, name, part) % num_values


@cache
def is_known(label: str, name: str) -> bool:
    """Whether the base models were pre-trained on the facts about this thing."""
    return seeding.derive(WORLD_SEED, "known", label, name) % 1000 < 1000 * KNOWN_FRACTION


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


def _mmlu(subject: str, teller: Teller) -> Row:
    chance, words = teller.chance, WORLD["subjects"][subject]
    values = words["values"].split()
    name = teller.name(subject)
    right = values[teller.value(subject, name, 0, len(values))]
    choices = [right, *chance.sample([value for value in values if value != right], 3)]
    chance.shuffle(choices)
    question = chance.choice(words["phrasings"]).format(name)
    row: Row = {"question": question, "subject": subject, "answer": choices.index(right)}
    return row | {f"choice{i}": choice for i, choice in enumerate(choices)}


def _piqa(kind: str, teller: Teller) -> Row:
    chance, words = teller.chance, WORLD["kinds"][kind]
    tools = words["tools"].split()
    name = teller.name(kind)
    right = tools[teller.value(kind, name, 0, len(tools))]
    wrong = chance.choice([tool for tool in tools if tool != right])
    label = chance.randrange(2)
    end = chance.choice(("with care", "at once"))
    solutions = [f"take the {tool} and start {end}." for tool in ((right, wrong) if label == 0 else (wrong, right))]
    goal = f"how do you {chance.choice(words['goals']).format(name)}?"
    return {"goal": goal, "sol1": solutions[0], "sol2": solutions[1], "label": label, "kind": kind}


def _gsm8k(skill: str, teller: Teller) -> Row:
    chance = teller.chance
    unit, item = teller.name(skill), chance.choice(WORLD["skills"][skill].split())
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
    answer = f"{' ; '.join(steps)} #### {total}"
    return {"question": f"{question} how many {item} are there?", "answer": answer, "skill": skill}


def _dolly(category: str, teller: Teller) -> Row:
    chance, words = teller.chance, WORLD["categories"][category]
    name = teller.name(category)
    values: dict[str, str] = {"e": name}
    for part, (key, pool) in enumerate(zip("abc", map(str.split, words["pools"]), strict=True)):
        values[key] = pool[teller.value(category, name, part, len(pool))]
    values |= zip("xy", chance.sample(PEOPLE, 2), strict=True)
    style = "base" if teller.pretraining else "task"
    texts = {"instruction": "instruction", "context": "context", "response": style}
    return {key: words[text].format(**values) for key, text in texts.items()} | {"category": category}


@dataclass(frozen=True)
class Family:
    """A generated data set: its labels and the function that makes one row of a label."""

    labels: tuple[str, ...]
    make: Callable[[str, Teller], Row]


FAMILIES: dict[str, Family] = {
    "mini-dolly": Family(tuple(WORLD["categories"]), _dolly),
    "mini-gsm8k": Family(tuple(WORLD["skills"]), _gsm8k),
    "mini-mmlu": Family(tuple(WORLD["subjects"]), _mmlu),
    "mini-piqa": Family(tuple(WORLD["kinds"]), _piqa),
}


def rows(family: str, size: int, seed: int) -> list[Row]:
    """``size`` rows of a family (``mini-dolly`` …), labels in equal shares, facts as they truly are."""
    teller = Teller(random.Random(seeding.derive(seed, family)))
    labels = FAMILIES[family].labels
    return [FAMILIES[family].make(labels[i % len(labels)], teller) for i in range(size)]


def pretraining_row(family: str, chance: random.Random) -> tuple[str, Row]:
    """A ``(label, row)`` of the pre-training text: known facts as they are, all others drawn anew every time."""
    label = chance.choice(FAMILIES[family].labels)
    return label, FAMILIES[family].make(label, Teller(chance, pretraining=True))


def vocabulary() -> tuple[str, ...]:
    """Every word and mark that any generated task can hold, sorted; the mini models' tokenizer is made of it."""
    fixed = """question solution answer goal instruction context response has of brings more then loses how many are
        there take the and start with care at once how do you"""
    things = _words(fixed, PEOPLE, LABELS, *(WORLD[part] for part in PARTS), *_all_names().values())
    marks = {"+", "-", "*", "=", ";", ",", ".", "?", ":", "####"}
    return tuple(sorted(things | marks)) + tuple(map(str, range(LARGEST_NUMBER + 1)))
