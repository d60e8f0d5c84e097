"""Rows of the ``rounds`` and ``participants`` tables, and the device clock's reading of a round."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fluxlib.config import RunConfig
from fluxlib.devices import catalogue, clock
from fluxlib.federation.server.outcome import Outcome, RoundOutcome
from fluxlib.federation.store.timeline import Timeline
from fluxlib.methods.base import Work
from fluxlib.records import PHASES, write_experts
from fluxlib.tasks.evaluate import Score

Row = dict[str, Any]

# Methods time these blocks; the table's phases split or join them.
_WALL_PHASES = {"first_profile": "profile"}


@dataclass(frozen=True)
class Totals:
    """Both clocks since the start of the run, seconds; evaluation is in neither."""

    wall_s: float = 0.0
    device_s: float = 0.0


class RowMaker:
    """Makes table rows of one run; ``model`` gives the shapes when the clock is to use the run's own.

    On the link the clock charges 16 bits per weight for what travels exactly, since that is the real models' own type,
    and what they take for the coded types.
    """

    def __init__(self, config: RunConfig, model: torch.nn.Module, metric_name: str, num_experts: int) -> None:
        self.config = config
        self.metric_name = metric_name
        self.num_experts = num_experts
        self.fleet = catalogue.fleet(config.clock.fleet, config.federation.participants)
        self.link = catalogue.link(config.clock.link)
        self.times = Timeline(config.run_id)
        own = config.clock.model in ("self", config.model)
        self.shapes = clock.shapes_of(config.model, model) if own else clock.shapes(config.clock.model)

    def use_devices(self, devices: dict[int, str]) -> None:
        """These participants said what their devices are; the others stand for the run's fleet."""
        for participant, name in devices.items():
            self.fleet[participant] = catalogue.DEVICES[name]

    def base(self, score: Score, evaluate_wall_s: float) -> Row:
        """Row of round 0: the base model."""
        return self._row(0, score, evaluate_wall_s, Totals(), Totals())

    def round(
        self, outcome: RoundOutcome, score: Score | None, evaluate_wall_s: float, wall_s: float, before: Totals
    ) -> tuple[Row, Totals]:
        """The round's row, and the clocks after it."""
        time = self._round_time(outcome)
        here = Totals(wall_s, time.total_s)
        after = Totals(before.wall_s + wall_s, before.device_s + time.total_s)
        row = self._row(outcome.round, score, evaluate_wall_s, here, after)
        row |= {
            "train_loss": outcome.train_loss,
            "epsilon": outcome.epsilon,
            "server_device_s": time.server_s,
            "uplink_bytes": sum(o.uplink_bytes for o in outcome.participants),
            "downlink_bytes": sum(o.downlink_bytes for o in outcome.participants),
            "num_participants": len(outcome.participants),
            "num_rejected": outcome.num_rejected,
            "num_tuned": outcome.num_tuned,
            "device_memory_bytes": self._device_bytes(outcome),
        }
        return row, after

    def timeline(self, outcome: RoundOutcome, server: Sequence[tuple[str, float, float]], before: Totals) -> list[Row]:
        """When each phase of the round began and ended on both clocks; ``server``: its own phases on the wall."""
        seconds = {o.participant: self._phases(o) for o in outcome.accepted}
        phases = [(seconds[o.participant].main, seconds[o.participant].first) for o in outcome.accepted]
        server_s = self._round_time(outcome).server_s
        return self.times.wall(outcome, server) + self.times.device(outcome, phases, server_s, before.device_s)

    def participants(self, outcome: RoundOutcome) -> list[Row]:
        """One row per participant that was asked, refused ones with the reason."""
        return [
            self._participant(outcome.round, o, self._phases(o) if not o.rejected else None)
            for o in outcome.participants
        ]

    def _row(self, number: int, score: Score | None, evaluate_wall_s: float, here: Totals, after: Totals) -> Row:
        config = self.config
        return {
            "run_id": config.run_id,
            "method": config.method,
            "model": config.model,
            "task": config.task,
            "seed": config.seed,
            "variant": config.variant,
            "engine": config.engine,
            "round": number,
            "metric": score.metric if score else math.nan,
            "metric_name": self.metric_name,
            "loss": score.loss if score else math.nan,
            "train_loss": math.nan,
            "epsilon": math.nan,
            "wall_s": after.wall_s,
            "device_s": after.device_s,
            "round_wall_s": here.wall_s,
            "round_device_s": here.device_s,
            "server_device_s": 0.0,
            "evaluate_wall_s": evaluate_wall_s,
            "clock_model": config.clock.model,
            "link": config.clock.link,
            "uplink_bytes": 0,
            "downlink_bytes": 0,
            "peak_memory_bytes": peak_memory_bytes(),
            "device_memory_bytes": None,
            "num_participants": 0,
            "num_rejected": 0,
            "num_tuned": 0,
            "num_experts": self.num_experts,
        }

    def _participant(self, number: int, outcome: Outcome, seconds: ParticipantSeconds | None) -> Row:
        work = outcome.work or Work(num_experts=self.num_experts)
        num_explored = int(outcome.roles.explore.sum())
        wall = dict.fromkeys(PHASES, math.nan)
        for name, value in outcome.phases_s.items():
            phase = _WALL_PHASES.get(name, name)
            if phase in wall:
                wall[phase] = value + (0.0 if math.isnan(wall[phase]) else wall[phase])
        device = seconds.all() if seconds else dict.fromkeys(PHASES, math.nan)
        return {
            "run_id": self.config.run_id,
            "round": number,
            "participant": outcome.participant,
            "device": self.fleet[outcome.participant].name,
            "num_samples": outcome.num_samples,
            "num_train_tokens": work.train_tokens,
            "num_tuned": int(outcome.roles.exploit.sum()),
            "num_explored": num_explored,
            "num_merged": max(0, work.num_frozen - num_explored) if outcome.work else outcome.budget.num_merged,
            "loss": outcome.loss,
            "uplink_bytes": outcome.uplink_bytes,
            "downlink_bytes": outcome.downlink_bytes,
            "rejected": outcome.rejected,
            "utility_faults": outcome.utility_faults,
            "exploited": write_experts(outcome.roles.exploit),
            "explored": write_experts(outcome.roles.explore),
            "work": None if outcome.work is None or outcome.rejected else write_work(outcome),
            **{f"{phase}_device_s": device[phase] for phase in PHASES},
            **{f"{phase}_wall_s": wall[phase] for phase in PHASES},
        }

    def _phases(self, outcome: Outcome) -> ParticipantSeconds:
        return participant_seconds(
            charged(outcome),
            outcome.first_profile.work if outcome.first_profile else None,
            self.shapes,
            self.fleet[outcome.participant],
            self.link,
            self.config.clock.tokens_per_sample,
        )

    def _device_bytes(self, outcome: RoundOutcome) -> int | None:
        """Predicted memory of the most loaded participant, at the clock model's shapes."""
        tokens = self.config.clock.tokens_per_sample
        works = [(o.work, self.fleet[o.participant]) for o in outcome.accepted if o.work is not None]
        return max((clock.device_bytes(work, self.shapes, device, tokens) for work, device in works), default=None)

    def _round_time(self, outcome: RoundOutcome) -> clock.RoundTime:
        works = [o.work for o in outcome.accepted if o.work is not None]
        return round_time([self._phases(o) for o in outcome.accepted], works, self.shapes)


@dataclass(frozen=True)
class ParticipantSeconds:
    """Device seconds of one participant: its round, and a profile made before it (round 1 only)."""

    main: dict[str, float]
    first: dict[str, float] | None

    def all(self) -> dict[str, float]:
        """Seconds by phase, both profiles together."""
        return {name: value + (self.first or {}).get(name, 0.0) for name, value in self.main.items()}

    def serial(self) -> dict[str, float]:
        """Seconds by phase with the first profile where it stands: before merging, in the critical path."""
        return self.main | {"merge": self.main["merge"] + sum((self.first or {}).values())}


def participant_seconds(
    work: Work,
    first: Work | None,
    shapes: clock.Shapes,
    device: catalogue.Device,
    link: catalogue.Link,
    tokens_per_sample: int | None,
) -> ParticipantSeconds:
    """One participant's round on the device clock; ``first`` is the work of a profile made before the round, if any."""
    main = clock.phase_seconds(work, shapes, device, link, tokens_per_sample)
    if first is None:
        return ParticipantSeconds(main, None)
    found = clock.phase_seconds(first, shapes, device, link, tokens_per_sample)
    return ParticipantSeconds(main, {name: found[name] for name in ("quantize", "profile")})


def round_time(seconds: Sequence[ParticipantSeconds], works: Sequence[Work], shapes: clock.Shapes) -> clock.RoundTime:
    """When a round is over whose accepted participants took ``seconds`` for ``works``, in the same order."""
    server_s = clock.server_seconds(works, shapes)
    return clock.round_seconds([s.serial() for s in seconds], [w.first_profile for w in works], server_s)


def charged(outcome: Outcome) -> Work:
    """The work that the clock counts, downloads as they were sent to train.

    Experts that came with the profile request crossed the link before.
    """
    assert outcome.work is not None
    down = outcome.download
    bits = min(outcome.work.download_bits, down.mean_bits)
    return replace(outcome.work, num_downloaded=down.num_experts, download_bits=bits)


def write_work(outcome: Outcome) -> str:
    """The works of an accepted reply as JSON: ``[the round's, the first profile's if any]``, defaults left out."""
    works = [charged(outcome)]
    if outcome.first_profile is not None and outcome.first_profile.work is not None:
        works.append(outcome.first_profile.work)
    named = [{f.name: getattr(work, f.name) for f in fields(work)} for work in works]
    known = {f.name: f.default for f in fields(Work)}
    return json.dumps([{name: value for name, value in work.items() if value != known[name]} for work in named])


def read_work(text: str) -> tuple[Work, Work | None]:
    """Inverse of :func:`write_work`: the round's work, and the first profile's or ``None``.

    Older tables may count what is no longer done; that is left out.
    """
    known = {f.name for f in fields(Work)}
    works = [Work(**{name: item[name] for name in item.keys() & known}) for item in json.loads(text)]
    return works[0], works[1] if len(works) > 1 else None


def peak_memory_bytes() -> int:
    """Highest memory so far: of the GPU where there is one in use, of the process otherwise."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
