# ruff: noqa: E501 - word lists read best one entry to a line
"""The invented world: names, values and facts; fixed, so that a shipped base model and the tasks agree on it."""

from __future__ import annotations

import random
import re
from functools import cache

from fluxlib import seeding

WORLD_SEED = 2026
KNOWN_FRACTION = 0.4
"""Share of the facts that the base models are pre-trained on."""
NUM_THINGS = 20
"""Named things per label."""
LARGEST_NUMBER = 99

PEOPLE = ("ada", "ben", "cleo", "dan", "eva", "finn", "gina", "hugo")

SUBJECTS: dict[str, tuple[tuple[str, ...], str]] = {
    "astronomy": (
        ("what colour is the moon {}?", "which light does the moon {} give?"),
        "red blue green white amber violet grey black",
    ),
    "botany": (
        ("in which soil does {} grow?", "where do gardeners plant {}?"),
        "clay sand loam peat chalk silt moss gravel",
    ),
    "chemistry": (
        ("which metal is found in {}?", "what does {} release when melted?"),
        "iron copper zinc tin lead silver gold nickel",
    ),
    "geography": (
        ("what kind of land is {}?", "what do travellers see at {}?"),
        "mountain river lake desert island valley canyon glacier",
    ),
    "history": (
        ("who ruled {}?", "who signed the treaty of {}?"),
        "king queen duke bishop senate general council emperor",
    ),
    "law": (
        ("what is the penalty for {}?", "how does the court answer {}?"),
        "fine prison exile service warning ban bond oath",
    ),
    "medicine": (
        ("which herb heals {}?", "what do doctors give against {}?"),
        "mint sage thyme basil ginger garlic nettle clover",
    ),
    "music": (
        ("which instrument plays {}?", "who leads the piece {}?"),
        "flute harp drum violin organ lute horn cello",
    ),
}
"""MMLU: subject -> (phrasings, values)."""

KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "kitchen": (("slice the {}", "serve the {}"), "knife spoon fork ladle whisk grater tongs peeler"),
    "garden": (("trim the {}", "plant the {}"), "spade rake hoe shears hose trowel barrow sickle"),
    "workshop": (("fix the {}", "build the {}"), "hammer saw drill plane chisel wrench clamp file"),
    "laundry": (("wash the {}", "dry the {}"), "soap basin rack iron starch basket peg line"),
    "camping": (("set up the {}", "carry the {}"), "tent rope torch axe compass stove flask tarp"),
    "painting": (
        ("paint the {}", "varnish the {}"),
        "brush roller easel sponge canvas palette stencil spray",
    ),
    "sewing": (("stitch the {}", "mend the {}"), "needle thread thimble pin button zipper ribbon hook"),
    "cleaning": (("scrub the {}", "polish the {}"), "broom mop bucket cloth duster wax bleach vacuum"),
}
"""PIQA: kind -> (goals, tools)."""

SKILLS: dict[str, str] = {
    "market": "pears plums figs dates",
    "farm": "eggs goats hens calves",
    "bakery": "rolls buns tarts pies",
    "school": "pens books rulers chairs",
    "harbour": "crabs nets sails shells",
    "mine": "gems stones lamps carts",
    "forest": "logs nuts cones ferns",
    "toyshop": "kites dolls marbles blocks",
}
"""GSM8K: skill -> items that are counted."""

CATEGORIES: dict[str, tuple[str, str, str]] = {
    "open_qa": ("ancient hollow bright frozen", "tower bridge temple garden", "north east south west"),
    "general_qa": ("honest cheerful patient brave", "peace hope wealth luck", "village family army guild"),
    "closed_qa": ("broken golden wooden painted", "mask crown shield bell", "cave shore well gate"),
    "classification": ("animal mineral plant spirit", "small large heavy light", "wild tame rare common"),
    "brainstorming": ("dance sing run swim", "paint carve weave draw", "cook bake roast grill"),
    "information_extraction": (
        "stolen borrowed hidden lost",
        "map key coin letter",
        "castle market ship tavern",
    ),
    "summarization": ("angry sleepy hungry lonely", "fox owl bear wolf", "meadow swamp hill grove"),
    "creative_writing": (
        "gentle silver distant secret",
        "shine whisper wander dream",
        "moonlight thunder river ember",
    ),
}
"""Dolly: category -> three pools of words; a fact is one word of each."""

_SYLLABLES = ("ba be bi bo bu da de di do du fa fe fi fo ga ge gi go ka ke ki ko la le li lo lu ma me mi mo mu na ne ni no nu "
              "pa pe pi po ra re ri ro ru sa se si so ta te ti to tu va ve vi vo za ze zi zo").split()  # fmt: skip


@cache
def names(label: str) -> tuple[str, ...]:
    """The invented names of a label's things; no two labels share one."""
    return _all_names()[label]


@cache
def _all_names() -> dict[str, tuple[str, ...]]:
    chance = random.Random(seeding.derive(WORLD_SEED, "names"))
    taken = set(re.findall(r"[a-z]+", " ".join(map(str, (SUBJECTS, KINDS, SKILLS, CATEGORIES, PEOPLE)))))
    found: dict[str, tuple[str, ...]] = {}
    for label in (*SUBJECTS, *KINDS, *SKILLS, *CATEGORIES):
        chosen: list[str] = []
        while len(chosen) < NUM_THINGS:
            name = "".join(chance.sample(_SYLLABLES, 3))
            if name not in taken:
                taken.add(name)
                chosen.append(name)
        found[label] = tuple(chosen)
    return found


@cache
def fact(label: str, name: str, part: int, num_values: int) -> int:
    """The true value (an index) of ``part`` of the thing called ``name``."""
    return seeding.derive(WORLD_SEED, "fact", label, name, part) % num_values


@cache
def is_known(label: str, name: str) -> bool:
    """Whether the base models were pre-trained on the facts about this thing."""
    return seeding.derive(WORLD_SEED, "known", label, name) % 1000 < 1000 * KNOWN_FRACTION


def vocabulary() -> tuple[str, ...]:
    """Every word and mark that any generated task can hold, sorted; the mini models' tokenizer is made of it."""
    from fluxlib.tasks.mini.generate import FAMILIES, templates

    text = [str(part) for part in (SUBJECTS, KINDS, SKILLS, CATEGORIES)] + [*PEOPLE, *templates()]
    text += [" ".join(names(label)) for family in FAMILIES.values() for label in family.labels]
    words = set(re.findall(r"[a-z]+|[^\w\s]+", " ".join(text).lower()))
    marks = {"+", "-", "*", "=", ";", ",", ".", "?", ":", "####"}
    words = {word for word in words if word.isalpha()} | marks
    return tuple(sorted(words)) + tuple(str(number) for number in range(LARGEST_NUMBER + 1))
