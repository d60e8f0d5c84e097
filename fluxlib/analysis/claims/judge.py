"""The rule that turns a number per seed into a verdict: one for all claims, in the report and in the notebooks.

Per seed: the mean over tasks; two settings are compared seed by seed, each by its mean over the tasks that both have.
Then, with what would be no effect at all (1 for a ratio, 0 for a difference, or what is measured without the thing):

- ``agrees``: the mean over seeds (the geometric one of ratios) reaches the paper's size as printed, every seed *and*
  the 95 % t interval over seeds lie on the paper's side of no effect, and there are at least :data:`MIN_SEEDS` seeds;
- ``agrees in direction``: every seed, *or* the interval, lies on the paper's side of no effect;
- ``does not``: anything else.

Where the paper has a direction only, its size is no effect. Where the sign cannot come out otherwise (a share, an
error, a saving that the clock's model makes positive), a sign says nothing: the paper's size is taken for no effect,
and all or most must reach it. What is modelled has no seeds; one number is all there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fluxlib.analysis.statistics import geometric, interval
from fluxlib.analysis.wording import sentence, shown, shown_interval

AGREES, DIRECTION, MISSING, DIFFERS = "agrees", "agrees in direction", "not attempted", "does not"
VERDICTS = (AGREES, DIRECTION, MISSING, DIFFERS)
"""From the best to the worst: what was found to differ outweighs what was not attempted."""
MIN_SEEDS = 3
"""With fewer there is no t interval: what they show agrees in direction at most."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, or of this suite's; the fields are explained in ``claims.yaml``."""

    slug: str
    claim: str
    source: str
    ours: Mapping[str, Any]
    place: str = ""
    paper: str = ""
    size: float = math.nan
    better: str = "larger"
    none: float | None = None
    reach: float | None = None
    unit: str = ""
    notebook: str = ""
    without: Mapping[str, Any] | None = None
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    clock: str = ""
    needs: str = ""
    beyond: bool = False
    own: bool = False

    @property
    def bar(self) -> str:
        """The number to reach, in words."""
        sign = "≤" if self.better == "smaller" else "≥"
        return "" if self.reach is None else f"{sign} {shown(self.reach, self.unit)}"

    def reached(self, value: float) -> bool | None:
        """Whether ``value`` reaches :attr:`reach`; NaN does not. None: nothing is set."""
        if self.reach is None:
            return None
        return bool(value <= self.reach if self.better == "smaller" else value >= self.reach)


EVERY = tuple(Claim(**entry) for entry in yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text()))
CLAIMS = tuple(claim for claim in EVERY if not claim.beyond and not claim.own)
"""The paper's, in its order."""
OWN = tuple(claim for claim in EVERY if claim.own)
"""What this suite says of itself."""


@dataclass(frozen=True)
class Reading:
    """What the tables say on one claim for one model (or whatever ``label`` names)."""

    label: str
    verdict: str
    ours: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    seeds: int = 1
    fewest: int | None = None
    """Seeds of the task that has the fewest, where tasks differ."""
    tasks: tuple[str, ...] = ()
    clock: str = ""
    reached: bool | None = None
    """Whether :attr:`Claim.reach` was reached; None: none is set, or not all was judged."""
    reason: str = ""


def judge(
    values: Iterable[float],
    size: float,
    better: str = "larger",
    none: float | np.ndarray | None = None,
    ratio: bool = False,
    seeded: bool = True,
) -> str:
    """The rule above for one value per seed, or for one value where they are not ``seeded``.

    ``none``: no effect, one for all or one per value; None: see :func:`no_effect`. ``ratio``: average geometrically.
    """
    values, sign = np.asarray(values, dtype=float), -1.0 if better == "smaller" else 1.0
    size_is_none = better == "smaller" if none is None else bool(np.all(none == size))
    base = np.asarray(no_effect(size, better) if none is None else none, dtype=float)
    mean = geometric(values)[0] if ratio else float(values.mean())
    gains = sign * (np.log(values) - np.log(base) if ratio else values - base)
    worst = (float(gains.min()), interval(gains)[1])
    every, apart = (low >= 0 if size_is_none else low > 0 for low in worst)  # "at most 5 %" is kept by 5 %
    return verdict(sign * (mean - size) >= 0, every, apart, len(values) if seeded else MIN_SEEDS)


def no_effect(size: float, better: str = "larger") -> float:
    """1 or 0, the largest below or at ``size``; where smaller is better, ``size`` itself."""
    return size if better == "smaller" else 1.0 if size >= 1 else 0.0


def verdict(reached: bool, every: bool, apart: bool, seeds: int) -> str:
    """The rule: is the size reached, is every seed on the paper's side, is the interval, how many seeds are there?"""
    if not (every or apart):
        return DIFFERS
    return AGREES if reached and every and apart and seeds >= MIN_SEEDS else DIRECTION


def weakest(verdicts: Iterable[str]) -> str:
    """The verdict on a claim that is made of several, all of which must hold."""
    return max(verdicts, key=VERDICTS.index)


def few(seeds: int) -> str:
    """What is said of too few seeds; nothing where there are enough, or none."""
    told = f"{seeds} seed{'s' * (seeds > 1)} of {MIN_SEEDS} needed, so in direction at most"
    return told if 0 < seeds < MIN_SEEDS else ""


def read_size(
    claim: Claim,
    label: str,
    values: Iterable[float],
    tasks: Iterable[str] = (),
    why: str = "",
    none: np.ndarray | None = None,
) -> Reading:
    """A number per seed held against the claim's size; ``why`` is told whatever the verdict, ``none`` as in judge."""
    values, ratio, seeded = np.asarray(values, dtype=float), claim.unit == "x", claim.source != "modelled"
    without = claim.none if none is None else none
    value, low, high = geometric(values) if ratio else interval(values)
    found = judge(values, claim.size, claim.better, without, ratio, seeded)
    parts = [few(len(values)) if seeded else "", _miss(claim, values, value, low, without, found), why]
    return Reading(
        label, found, shown_interval(value, low, high, claim.unit), value, low, high, len(values), None, tuple(tasks),
        claim.clock, claim.reached(value), sentence(parts),
    )  # fmt: skip


def _miss(
    claim: Claim, values: np.ndarray, value: float, low: float, none: float | np.ndarray | None, found: str
) -> str:
    """By how much a number misses the paper's, and whether it may be nothing."""
    size, whose = claim.size, "the aim" if claim.own else "the paper's"
    if claim.better == "smaller":
        unclear = "not clear of no effect in every seed and the interval" if found == DIRECTION else ""
        return f"{value / size:.2g} times {whose}" if value > size else unclear
    base = no_effect(size) if none is None else float(none)
    share = f"{shown(value / size, '%')} of {whose}" if base < value < size or value < base == none else ""
    if base == none == size:
        return share
    against = int((values <= base).sum())
    told = f"the other way in {against} of {len(values)} seeds" if against else ""
    unsure = f"in every seed, but the interval includes {shown(base, claim.unit)}" if low <= base else ""
    return sentence([told or unsure, share])
