"""The tables of a run as it grows: ``rounds`` and ``participants``, on both clocks."""

from __future__ import annotations

import json
import math
import resource
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fluxlib import records
from fluxlib.config import RunConfig
from fluxlib.devices import catalogue, clock
from fluxlib.federation.results import TABLES, Participation, RoundResult, Row, table_path
from fluxlib.methods.base import Work
from fluxlib.records import PHASES, write_experts

if TYPE_CHECKING:
    import pandas as pd


NOT_SCORED: Row = dict.fromkeys(("metric", "loss", "recall", "untaught"), math.nan) | {"evaluate_wall_s": 0.0}
"""The columns of ``rounds`` that scoring the global model fills, of a round in which it was not scored."""


class Tables:
    """The rows of one run; ``model`` gives the shapes when the clock is to use the run's own.

    ``wall_s`` and ``device_s`` are both clocks since the start of the run; evaluation is in neither.

    On the link the clock charges 16 bits per weight for what travels exactly, since that is the real models' own type,
    and what they take for the coded types.
    """

    def __init__(self, config: RunConfig, model: torch.nn.Module, metric_name: str, num_experts: int) -> None:
        self.config, self.metric_name, self.num_experts = config, metric_name, num_experts
        self.rows: dict[str, list[Row]] = {table: [] for table in TABLES}
        self.wall_s = self.device_s = 0.0
        self.fleet = catalogue.fleet(config.clock.fleet, config.federation.participants)
        self.link = catalogue.link(config.clock.link)
        own = config.clock.model in ("self", config.model)
        self.shapes = clock.shapes_of(model) if own else clock.shapes(config.clock.model)

    def frames(self) -> dict[str, pd.DataFrame]:
        """The rows so far, checked against the schema, as they will be read back."""
        import pandas as pd  # not above: a participant's process, which is started for every message, has no tables

        columns = {table: [column.name for column in records.columns(table)] for table in TABLES}
        tables = {table: pd.DataFrame(self.rows[table], columns=columns[table]) for table in TABLES}
        return {table: records.validate(table, frame).to_pandas() for table, frame in tables.items()}

    def write(self, out: Path, about: dict[str, Any]) -> None:
        """Write all tables below ``out``."""
        for table, frame in self.frames().items():
            records.write(table, frame, table_path(out, table, self.config.run_id), about)

    def round_seconds(self, result: RoundResult) -> tuple[float, float]:
        """What a round takes on the device clock, and the server's part of it."""
        works = [one.work for one in result.accepted if one.work is not None]
        server_s = clock.server_seconds(works, self.shapes)
        return clock.round_seconds([self._seconds(one) for one in result.accepted], server_s), server_s

    def add_round(self, result: RoundResult, scores: Row, wall_s: float) -> None:
        """A round that took ``wall_s`` here, evaluation left out; round 0 is the base model, with nobody at work."""
        device_s, server_s = self.round_seconds(result) if result.round else (0.0, 0.0)
        self.wall_s += wall_s
        self.device_s += device_s
        config, tokens = self.config, self.config.clock.tokens_per_sample
        works = [(one.work, self.fleet[one.participant]) for one in result.accepted if one.work is not None]
        memory = [clock.device_bytes(work, self.shapes, device, tokens) for work, device in works]
        row: Row = {
            "run_id": config.run_id,
            **{name: getattr(config, name) for name in ("method", "model", "task", "seed", "variant", "engine")},
            "round": result.round,
            "metric_name": self.metric_name,
            **scores,
            "train_loss": result.train_loss,
            "epsilon": result.epsilon,
            "wall_s": self.wall_s,
            "device_s": self.device_s,
            "round_wall_s": wall_s,
            "round_device_s": device_s,
            "server_device_s": server_s,
            "clock_model": config.clock.model,
            "link": config.clock.link,
            "uplink_bytes": sum(one.uplink_bytes for one in result.participants),
            "downlink_bytes": sum(one.downlink_bytes for one in result.participants),
            "peak_memory_bytes": peak_memory_bytes(),
            "device_memory_bytes": max(memory, default=None),
            "num_participants": len(result.participants),
            "num_rejected": result.num_rejected,
            "num_tuned": result.num_tuned,
            "num_experts": self.num_experts,
        }
        self.rows["rounds"].append(row)
        self.add_participants(result)

    def add_participants(self, result: RoundResult) -> None:
        """One row per participant that was asked, refused ones with the reason."""
        for one in result.participants:
            work = one.work or Work(num_experts=self.num_experts)
            num_explored = int(one.roles.explore.sum())
            device = dict.fromkeys(PHASES, math.nan) if one.rejected else self._seconds(one).all()
            row: Row = {
                "run_id": self.config.run_id,
                "round": result.round,
                "participant": one.participant,
                "device": self.fleet[one.participant].name,
                "num_samples": one.num_samples,
                "num_train_tokens": work.train_tokens,
                "num_tuned": int(one.roles.exploit.sum()),
                "num_explored": num_explored,
                "num_merged": max(0, work.num_frozen - num_explored) if one.work else one.budget.num_merged,
                "loss": one.loss,
                "uplink_bytes": one.uplink_bytes,
                "downlink_bytes": one.downlink_bytes,
                "rejected": one.rejected,
                "utility_faults": one.utility_faults,
                "exploited": write_experts(one.roles.exploit),
                "explored": write_experts(one.roles.explore),
                "work": None if one.rejected else write_work(one),
                **{f"{phase}_device_s": device[phase] for phase in PHASES},
                **{f"{phase}_wall_s": one.phases_s.get(phase, math.nan) for phase in PHASES},
            }
            self.rows["participants"].append(row)

    def _seconds(self, one: Participation) -> clock.ParticipantSeconds:
        device, how = self.fleet[one.participant], self.config.clock
        return clock.participant_seconds(
            charged(one), one.profile_work, self.shapes, device, self.link, how.tokens_per_sample, how.offloading
        )


def charged(one: Participation) -> Work:
    """The work that the clock counts, with downloads as they were sent."""
    assert one.work is not None
    bits = min(one.work.download_bits, one.download_bits)
    return replace(one.work, num_downloaded=one.num_downloaded, download_bits=bits)


def write_work(one: Participation) -> str:
    """The works of an accepted reply as JSON: ``[the round's, the first profile's if any]``, defaults left out."""
    works = [charged(one), *([one.profile_work] if one.profile_work else [])]
    known = {f.name: f.default for f in fields(Work)}
    return json.dumps([{n: value for n, value in vars(work).items() if value != known[n]} for work in works])


def read_work(text: str) -> tuple[Work, Work | None]:
    """Inverse of :func:`write_work`: the round's work, and the first profile's or ``None``."""
    works = [Work(**item) for item in json.loads(text)]
    return works[0], works[1] if len(works) > 1 else None


def peak_memory_bytes() -> int:
    """Highest memory so far: of the GPU where there is one in use, of the process otherwise."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
