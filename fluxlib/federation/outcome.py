"""What happened in a round, participant by participant."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from fluxlib.methods.base import Budget, Roles, Update, Work
from fluxlib.roles import Fault


class RunFailed(RuntimeError):
    """Too few good replies: the round is not aggregated, everything before it is saved."""


@dataclass(frozen=True)
class FirstProfile:
    """A profile that a participant was asked for before its first round: what the request and the work took."""

    num_bytes: int
    num_experts: int
    work: Work | None = None
    seconds: float = 0.0


@dataclass
class Outcome:
    """One participant's part in a round; ``rejected`` is empty for an update that was aggregated."""

    participant: int
    roles: Roles
    budget: Budget
    downlink_bytes: int = 0
    num_downloaded: int = 0
    uplink_bytes: int = 0
    rejected: str = "missing"
    detail: str = "no reply came within the time limit"
    work: Work | None = None
    first_profile: FirstProfile | None = None
    phases_s: dict[str, float] = field(default_factory=dict)
    loss: float = math.nan
    num_samples: int = 0

    def count_first_profile(self, found: FirstProfile) -> None:
        """Add a profile that was made for this round, before it."""
        self.first_profile = found
        self.downlink_bytes += found.num_bytes
        self.num_downloaded += found.num_experts

    def accept(self, update: Update, num_bytes: int) -> None:
        """Keep what an update says about itself; its tensors are not kept."""
        self.rejected = self.detail = ""
        self.uplink_bytes += num_bytes
        self.work, self.phases_s = update.work, dict(update.phases_s)
        if self.first_profile is not None:
            self.phases_s["first_profile"] = self.phases_s.get("first_profile", 0.0) + self.first_profile.seconds
        self.loss, self.num_samples = update.loss, update.num_samples


@dataclass(frozen=True)
class RoundOutcome:
    """What happened in a round, participant by participant; late extras (duplicates, strangers) are in ``extra``."""

    round: int
    epsilon: float
    participants: tuple[Outcome, ...]
    extra: tuple[tuple[int, str], ...]
    num_tuned: int
    faults: tuple[Fault, ...] = ()

    @property
    def num_rejected(self) -> int:
        """Replies that were refused or never came, extras included."""
        return sum(bool(outcome.rejected) for outcome in self.participants) + len(self.extra)

    @property
    def accepted(self) -> list[Outcome]:
        """Participants whose update was aggregated."""
        return [outcome for outcome in self.participants if not outcome.rejected]

    @property
    def train_loss(self) -> float:
        """Mean training loss of the accepted participants, weighted by samples; NaN without any."""
        total = sum(outcome.num_samples for outcome in self.accepted)
        return sum(o.loss * o.num_samples for o in self.accepted) / total if total else math.nan

    def require(self, min_replies_frac: float) -> None:
        """Refuse to go on with too few good replies.

        Raises:
            RunFailed: with the number of good replies, how many there should be, and why the others were refused.
        """
        asked, good = len(self.participants), len(self.accepted)
        needed = math.ceil(min_replies_frac * asked - 1e-9)
        if good >= needed:
            return
        refused = [outcome for outcome in self.participants if outcome.rejected]
        reasons = Counter(outcome.rejected for outcome in refused).most_common()
        example = next(outcome for outcome in refused if outcome.rejected == reasons[0][0])
        raise RunFailed(
            f"round {self.round}: {good} of {asked} replies were good, min_replies_frac {min_replies_frac:g} asks for "
            f"{needed}; refused: {', '.join(f'{count} {reason}' for reason, count in reasons)}; participant "
            f"{example.participant}, for one: {example.detail}"
        )
