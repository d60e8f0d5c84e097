"""Generated tasks in the public schemas of Dolly, GSM8K, MMLU and PIQA, about one small invented world.

Every label (category, skill, subject, kind; all words are in ``mini.yaml``) has things of its own, with names found
nowhere else, and facts about them. A base model is pre-trained on all formats, names and ways to ask, but told only a
part of the facts; fine-tuning a task means learning the taught ones, which lie with the participants who hold that
label. That is what makes experts specialise and participants differ.

A test asks for a taught fact in a way that no training row has, so it scores what was learned and not what was seen.
Two more groups of rows stand beside it: ``recall`` asks for taught facts in a way of the training rows, ``untaught``
for facts that nobody was told, whose score must stay at chance.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from fluxlib import seeding
from fluxlib.tasks.base import Row

WORLD: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
WORLD_SEED = 2026
NUM_KNOWN, NUM_TAUGHT, NUM_UNTAUGHT = 12, 14, 14
"""Things of each label: known to the base models, told in the training rows of a task, told to nobody."""
NUM_THINGS = NUM_KNOWN + NUM_TAUGHT + NUM_UNTAUGHT
DEFAULT_SIZE = 5000
Group = Literal["pretraining", "train", "test", "recall", "untaught"]
"""What a row is for; see the module's text."""
PARTS = ("subjects", "kinds", "skills", "categories")
LABELS = [label for part in PARTS for label in WORLD[part]]
PEOPLE = WORLD["people"].split()


@cache
def names() -> dict[str, tuple[str, ...]]:
    """The invented names of each label's things; no two labels share one."""
    chance = random.Random(seeding.derive(WORLD_SEED, "names"))
    taken, syllables = words_of(PEOPLE, LABELS, *(WORLD[part] for part in PARTS)), WORLD["syllables"].split()
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


def words_of(*parts: Any) -> set[str]:
    """All words in texts, and in lists and mappings of them."""
    found: set[str] = set()
    for part in parts:
        if isinstance(part, str):
            found |= set(re.findall(r"[a-z]+", part))
        else:
            found |= words_of(*(part.values() if isinstance(part, dict) else part))
    return found


@cache
def fact(label: str, name: str, part: int, num_values: int) -> int:
    """The true value (an index) of ``part`` of the thing called ``name``."""
    return seeding.derive(WORLD_SEED, "fact", label, name, part) % num_values


@dataclass(frozen=True)
class Teller:
    """Where a row takes its way to ask and its facts from; ``chance`` decides everything else about it."""

    chance: random.Random
    group: Group

    def way(self, ways: list[str]) -> str:
        """How the fact is asked for: the last way is for tests, the others for training; a base knows all."""
        if self.group == "pretraining":
            return self.chance.choice(ways)
        return ways[-1] if self.group in ("test", "untaught") else self.chance.choice(ways[:-1])

    def value(self, label: str, name: str, part: int, num_values: int) -> int:
        """Index of a fact's value; in pre-training one that is not to be known is drawn anew every time."""
        if self.group == "pretraining" and name not in names()[label][:NUM_KNOWN]:
            return self.chance.randrange(num_values)
        return fact(label, name, part, num_values)


def _mmlu(subject: str, name: str, teller: Teller) -> Row:
    chance, words = teller.chance, WORLD["subjects"][subject]
    values = words["values"].split()
    right = values[teller.value(subject, name, 0, len(values))]
    choices = [right, *chance.sample([value for value in values if value != right], 3)]
    chance.shuffle(choices)
    row: Row = {
        "question": teller.way(words["ways"]).format(name),
        "subject": subject,
        "answer": choices.index(right),
    }
    return row | {f"choice{i}": choice for i, choice in enumerate(choices)}


def _piqa(kind: str, name: str, teller: Teller) -> Row:
    chance, words = teller.chance, WORLD["kinds"][kind]
    tools = words["tools"].split()
    right = tools[teller.value(kind, name, 0, len(tools))]
    wrong = chance.choice([tool for tool in tools if tool != right])
    label = chance.randrange(2)
    solutions = [f"take the {tool} and start." for tool in ((right, wrong) if label == 0 else (wrong, right))]
    goal = f"how do you {teller.way(words['ways']).format(name)}?"
    return {"goal": goal, "sol1": solutions[0], "sol2": solutions[1], "label": label, "kind": kind}


def _gsm8k(skill: str, name: str, teller: Teller) -> Row:
    chance, words = teller.chance, WORLD["skills"][skill]
    item = chance.choice(words["items"].split())
    who, other = chance.sample(PEOPLE, 2)
    number, size = chance.randint(2, 6), 2 + teller.value(skill, name, 0, 8)
    total = number * size
    question = teller.way(words["ways"]).format(who=who, n=number, e=name, item=item)
    steps = [f"{name} = {size}", f"{number} * {size} = {total}"]
    num_steps = chance.randint(1, 3)
    if num_steps > 1:
        more = chance.randint(1, 5)
        question += f" {other} brings {more} more {item}."
        steps.append(f"{total} + {more} = {total + more}")
        total += more
    if num_steps > 2:
        fewer = chance.randint(1, 4)
        question += f" then {who} loses {fewer} {item}."
        steps.append(f"{total} - {fewer} = {total - fewer}")
        total -= fewer
    answer = f"{' ; '.join(steps)} #### {total}"
    return {"question": f"{question} how many {item} are there?", "answer": answer, "skill": skill}


def _dolly(category: str, name: str, teller: Teller) -> Row:
    chance, words = teller.chance, WORLD["categories"][category]
    values: dict[str, str] = {"e": name}
    for part, (key, pool) in enumerate(zip("abc", map(str.split, words["pools"]), strict=True)):
        values[key] = pool[teller.value(category, name, part, len(pool))]
    values |= zip("xy", chance.sample(PEOPLE, 2), strict=True)
    style = "base" if teller.group == "pretraining" else "task"
    texts = {"instruction": teller.way(words["ways"]), "context": words["context"], "response": words[style]}
    return {key: text.format(**values) for key, text in texts.items()} | {"category": category}


@dataclass(frozen=True)
class Family:
    """A generated data set: its labels and the function that makes one row about one of a label's things."""

    labels: tuple[str, ...]
    make: Callable[[str, str, Teller], Row]


FAMILIES: dict[str, Family] = {
    "mini-dolly": Family(tuple(WORLD["categories"]), _dolly),
    "mini-gsm8k": Family(tuple(WORLD["skills"]), _gsm8k),
    "mini-mmlu": Family(tuple(WORLD["subjects"]), _mmlu),
    "mini-piqa": Family(tuple(WORLD["kinds"]), _piqa),
}


def rows(family: str, size: int, seed: int, group: Group = "train") -> list[Row]:
    """``size`` rows of a family (``mini-dolly`` …) for a group, labels and things in equal shares, facts as they are.

    The i-th row of ``test`` and of ``recall`` is about the same thing as the i-th of ``train``: with at most as many
    rows as ``train`` has, they ask for nothing that no training row tells.
    """
    teller = Teller(random.Random(seeding.derive(seed, family, group)), group)
    labels, make = FAMILIES[family].labels, FAMILIES[family].make
    things = slice(-NUM_UNTAUGHT, None) if group == "untaught" else slice(NUM_KNOWN, NUM_KNOWN + NUM_TAUGHT)
    asked = {label: names()[label][things] for label in labels}
    turns = [divmod(i, len(labels)) for i in range(size)]
    return [make(labels[i], asked[labels[i]][turn % len(asked[labels[i]])], teller) for turn, i in turns]
