"""What happened in a round, participant by participant."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from fluxlib.federation.protocol.sync import Delta, Holding
from fluxlib.federation.protocol.wire import Form, bits_per_weight
from fluxlib.methods.base import Budget, Roles, Update, Work
from fluxlib.roles import Fault


class RunFailed(RuntimeError):
    """Too few good replies: the round is not aggregated, everything before it is saved."""


@dataclass(frozen=True)
class Download:
    """What was sent to a participant; ``weight_bits`` are bits per weight on the link, summed over the experts."""

    num_bytes: int = 0
    num_experts: int = 0
    weight_bits: float = 0.0
    after: Holding | None = None

    @classmethod
    def of(cls, delta: Delta, wire: Form) -> Download:
        """The account of one delta; its arrays are not kept."""
        bits = delta.num_experts * bits_per_weight(wire) + delta.num_approximate * bits_per_weight("int4")
        return cls(delta.num_bytes, delta.num_experts + delta.num_approximate, bits, delta.after)

    def then(self, later: Download) -> Download:
        """Both, one after the other."""
        return Download(
            self.num_bytes + later.num_bytes,
            self.num_experts + later.num_experts,
            self.weight_bits + later.weight_bits,
            later.after,
        )

    @property
    def mean_bits(self) -> float:
        """Bits per weight of an expert, on average."""
        return self.weight_bits / self.num_experts if self.num_experts else 16.0


@dataclass(frozen=True)
class FirstProfile:
    """A profile that a participant was asked for before its first round: what the request and the work took."""

    download: Download
    work: Work | None = None
    seconds: float = 0.0


@dataclass
class Outcome:
    """One participant's part in a round; ``rejected`` is empty for an update that was aggregated."""

    participant: int
    roles: Roles
    budget: Budget
    download: Download = field(default_factory=Download)
    uplink_bytes: int = 0
    rejected: str = "missing"
    detail: str = "no reply came within the time limit"
    work: Work | None = None
    first_profile: FirstProfile | None = None
    phases_s: dict[str, float] = field(default_factory=dict)
    loss: float = math.nan
    num_samples: int = 0
    spans: tuple[tuple[str, float, float, int], ...] = ()
    sent_s: float = 0.0
    received_s: float = 0.0
    utility_faults: str = ""

    @property
    def downlink_bytes(self) -> int:
        """Payload of the requests."""
        return self.download.num_bytes

    def count_first_profile(self, found: FirstProfile) -> None:
        """Add a profile that was made for this round, before it."""
        self.first_profile = found
        self.download = self.download.then(found.download)

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
