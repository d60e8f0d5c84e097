"""What comes out of a run: of one participant's part in a round, of a round, of all of it; and where it goes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlib.federation.protocol.sync import Delta, ModelVersion
from fluxlib.federation.protocol.wire import Form, bits_per_weight
from fluxlib.methods.base import Budget, Update, Work
from fluxlib.roles import Roles

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]

TABLES = ("rounds", "participants")


class RunFailed(RuntimeError):
    """Too few good replies: the round is not aggregated, everything before it is saved."""


@dataclass
class Participation:
    """One participant's part in a round; ``rejected`` is empty for an update that was aggregated."""

    participant: int
    budget: Budget
    roles: Roles
    downlink_bytes: int = 0
    num_downloaded: int = 0
    """Experts that were sent to it."""
    download_bits: float = 16.0
    """Per weight of them, on the link."""
    held: ModelVersion = ModelVersion()
    """What it holds when it has taken in what was sent."""
    uplink_bytes: int = 0
    rejected: str = "missing"
    detail: str = "no reply came within the time limit"
    work: Work | None = None
    profile_work: Work | None = None
    """Of the profile that was asked for before the participant's first round."""
    phases_s: dict[str, float] = field(default_factory=dict)
    loss: float = math.nan
    num_samples: int = 0
    utility_faults: str = ""

    def send(self, delta: Delta, wire: Form) -> None:
        """Count one more message to it; its arrays are not kept."""
        self.downlink_bytes += delta.num_bytes
        self.num_downloaded += delta.num_experts
        self.held = delta.after
        if self.num_downloaded:
            self.download_bits = bits_per_weight(wire)

    def accept(self, update: Update, num_bytes: int) -> None:
        """Keep what an update says about itself; its tensors are not kept."""
        self.rejected = self.detail = ""
        self.uplink_bytes += num_bytes
        self.work, self.loss, self.num_samples = update.work, update.loss, update.num_samples
        for name, seconds in update.phases_s.items():
            phase = "profile" if name == "first_profile" else name
            self.phases_s[phase] = self.phases_s.get(phase, 0.0) + seconds


@dataclass(frozen=True)
class RoundResult:
    """What happened in a round; ``num_tuned`` counts the experts that changed.

    ``extra`` are replies that nobody asked for (duplicates, strangers) with the reason why they were refused.
    """

    round: int
    epsilon: float
    participants: tuple[Participation, ...]
    extra: tuple[tuple[int, str], ...]
    num_tuned: int

    @property
    def num_rejected(self) -> int:
        """Replies that were refused or never came, extras included."""
        return sum(bool(one.rejected) for one in self.participants) + len(self.extra)

    @property
    def accepted(self) -> list[Participation]:
        """Participants whose update was aggregated."""
        return [one for one in self.participants if not one.rejected]

    @property
    def train_loss(self) -> float:
        """Mean training loss of the accepted participants, weighted by samples; NaN without any."""
        total = sum(one.num_samples for one in self.accepted)
        return sum(one.loss * one.num_samples for one in self.accepted) / total if total else math.nan

    def require(self, min_replies_frac: float) -> None:
        """RunFailed for too few good replies, with how many there should be, and why others were refused."""
        asked, good = len(self.participants), len(self.accepted)
        needed = math.ceil(min_replies_frac * asked - 1e-9)
        if good >= needed:
            return
        refused = [one for one in self.participants if one.rejected]
        reasons = Counter(one.rejected for one in refused).most_common()
        example = next(one for one in refused if one.rejected == reasons[0][0])
        raise RunFailed(
            f"round {self.round}: {good} of {asked} replies were good, min_replies_frac {min_replies_frac:g} asks for "
            f"{needed}; refused: {', '.join(f'{count} {reason}' for reason, count in reasons)}; participant "
            f"{example.participant}, for one: {example.detail}"
        )


@dataclass(frozen=True)
class RunResult:
    """A run's tables, where they were written, and the tuned global model."""

    run_id: str
    rounds: pd.DataFrame
    participants: pd.DataFrame
    path: Path | None
    model: Any


@dataclass(frozen=True)
class Output:
    """Where a run's results go; ``out`` and ``on_round`` are those of :func:`fluxlib.federation.run.run`.

    ``keep_experts`` also writes the tuned experts.
    """

    out: Path | None = None
    on_round: Callable[[Row], bool | None] | None = None
    keep_experts: bool = False


def experts_path(out: Path, run_id: str) -> Path:
    """Where a run's tuned experts lie in the folder ``out``: safetensors under ``"<layer>.<expert>.<tensor>"``."""
    return out / "experts" / f"{run_id}.safetensors"


def table_path(out: Path, table: str, run_id: str) -> Path:
    """Where a run's table lies in the folder ``out``."""
    return out / table / f"{run_id}.parquet"
