"""What travels between server and participants, and how it is written into Flower records.

Every message holds one ``ConfigRecord`` ("config"), most an ``ArrayRecord`` ("arrays": experts, or changes of experts),
and a trained reply a ``MetricRecord`` ("metrics"), which is the form that Flower's own mods expect.

Nothing else leaves a participant: no sample, no text, no profile beyond the frequencies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import TypeAdapter
from torch import Tensor

from fluxlib.config import RunConfig
from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.sync import Delta, ModelVersion
from fluxlib.federation.protocol.wire import Form, Shapes, WireError
from fluxlib.io import checked, reading
from fluxlib.methods.base import Budget, Update, Work
from fluxlib.roles import Roles

JOIN, PROFILE, TRAIN = "query.join", "query.profile", "train"
"""Message types."""

MOST = 1e15
"""Largest count or time that a participant may report: what tables and clocks can hold."""

_WORK = TypeAdapter(Work)


parse_config = lru_cache(maxsize=64)(RunConfig.model_validate_json)
"""The run configuration in a message."""


@dataclass(frozen=True)
class Instruction:
    """What a participant is to do. ``roles`` and ``budget`` only for training."""

    config: RunConfig
    round: int
    participant: int
    delta: Delta = field(default_factory=Delta)
    roles: Roles | None = None
    budget: Budget | None = None

    def to_records(self) -> RecordDict:
        """As message content."""
        values: dict[str, Any] = {
            "run": self.config.model_dump_json(),
            "round": self.round,
            "participant": self.participant,
            "since": self.delta.since,
            **self.delta.after.values(),
        }
        if self.roles is not None and self.budget is not None:
            masks = torch.stack([self.roles.exploit, self.roles.explore]).cpu()
            values["shape"], values["roles"] = list(masks.shape), np.packbits(masks.numpy()).tobytes()
            values["budget"] = [self.budget.num_tuned, self.budget.num_merged]
        return RecordDict({"arrays": self.delta.arrays, "config": ConfigRecord(values)})

    @classmethod
    @reading("an instruction", WireError)
    def from_records(cls, content: RecordDict) -> Instruction:
        """Inverse of :meth:`to_records`; WireError for anything else, as in every report."""
        values: Any = content["config"]
        roles = budget = None
        if "roles" in values:
            bits, size = np.unpackbits(np.frombuffer(values["roles"], np.uint8)), math.prod(values["shape"])
            roles = Roles(*torch.from_numpy(bits[:size].astype(bool)).reshape(values["shape"]))
            budget = Budget(*values["budget"])
        delta = Delta(content["arrays"], values["since"], ModelVersion.read(values))
        return cls(parse_config(values["run"]), values["round"], values["participant"], delta, roles, budget)


@dataclass(frozen=True)
class _Report:
    """What every reply says: who, in which round, holding what."""

    participant: int
    round: int
    held: ModelVersion

    def _record(self, **more: Any) -> ConfigRecord:
        return ConfigRecord({"participant": self.participant, "round": self.round, **self.held.values(), **more})


def _header(values: ConfigRecord) -> tuple[int, int, ModelVersion]:
    participant, number = (checked(name, values[name], int, 0, MOST) for name in ("participant", "round"))
    return participant, number, ModelVersion.read(values)


@dataclass(frozen=True)
class JoinReport(_Report):
    """What a participant holds; ``frozen_digest`` is that of the weights which are never exchanged.

    ``device`` is its name in :mod:`fluxlib.devices.catalogue`, empty where the run's fleet says what it stands for.
    """

    frozen_digest: str = ""
    device: str = ""

    def to_records(self) -> RecordDict:
        """As message content."""
        return RecordDict({"config": self._record(frozen_digest=self.frozen_digest, device=self.device)})

    @classmethod
    @reading("a join report", WireError)
    def from_records(cls, content: RecordDict) -> JoinReport:
        """Inverse of :meth:`to_records`."""
        values: Any = content["config"]
        frozen_digest, device = (checked(name, values[name], str) for name in ("frozen_digest", "device"))
        return cls(*_header(values), frozen_digest=frozen_digest, device=device)


@dataclass(frozen=True)
class ProfileReport(_Report):
    """Activation frequencies ``[layers, experts]`` of the model a participant holds, and the work of measuring."""

    frequency: Tensor
    work: Work
    phases_s: Mapping[str, float]

    def to_records(self) -> RecordDict:
        """As message content."""
        table = {"shape": list(self.frequency.shape), "frequency": _floats(self.frequency)}
        return RecordDict({"config": self._record(**table, **_account(self.work, self.phases_s))})

    @classmethod
    @reading("a profile report", WireError)
    def from_records(cls, content: RecordDict) -> ProfileReport:
        """Inverse of :meth:`to_records`."""
        values: Any = content["config"]
        frequency = _from_floats(values["frequency"], values["shape"])
        return cls(*_header(values), frequency, **_read_account(values))


@dataclass(frozen=True)
class TrainReport(_Report):
    """One participant's update and an account of what it cost."""

    update: Update
    num_bytes: int = 0

    def to_records(self, changes: ArrayRecord) -> RecordDict:
        """As message content; ``changes`` are those of the update as they travel."""
        update = self.update
        config = self._record(
            shape=list(update.tokens.shape),
            utilities=_floats(update.utilities),
            tokens=_floats(update.tokens),
            **_account(update.work, update.phases_s),
        )
        metrics = MetricRecord({"loss": float(update.loss), "num-examples": int(update.num_samples)})
        return RecordDict({"arrays": changes, "config": config, "metrics": metrics})

    @classmethod
    @reading("a reply", WireError)
    def from_records(cls, content: RecordDict, wire: Form, shapes: Shapes) -> TrainReport:
        """Inverse of :meth:`to_records`; ``shapes`` are those of the model's experts."""
        values: Any = content["config"]
        metrics, arrays = content["metrics"], content["arrays"]
        update = Update(
            changes=wires.decode_changes(arrays, wire, shapes),
            utilities=_from_floats(values["utilities"], values["shape"]),
            tokens=_from_floats(values["tokens"], values["shape"]),
            loss=checked("loss", metrics["loss"], float),
            num_samples=checked("num-examples", metrics["num-examples"], int, -MOST, MOST),
            **_read_account(values),
        )
        return cls(*_header(values), update, wires.record_bytes(arrays))


def resync_request() -> RecordDict:
    """Reply of a participant that cannot get from what it holds to what it should hold: it needs every expert anew."""
    return RecordDict({"config": ConfigRecord({"resync": True})})


def asks_for_resync(content: RecordDict) -> bool:
    """Whether a reply is a :func:`resync_request`."""
    return "config" in content and "resync" in content["config"]


def _account(work: Work, phases_s: Mapping[str, float]) -> dict[str, str]:
    return {"work": json.dumps(vars(work)), "phases": json.dumps(dict(phases_s))}


def _read_account(values: Any) -> dict[str, Any]:
    phases = dict(json.loads(values["phases"])).items()
    phases_s = {name: checked("a phase", seconds, float, 0, MOST) for name, seconds in phases}
    return {"work": _WORK.validate_json(values["work"], strict=True), "phases_s": phases_s}


def _floats(values: Tensor) -> bytes:
    return values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()


def _from_floats(data: bytes, shape: Sequence[int]) -> Tensor:
    values = np.frombuffer(data, np.float32)
    if len(values) != math.prod(shape):
        raise WireError(f"{len(values)} numbers do not fill a table of shape {tuple(shape)}")
    return torch.from_numpy(values.reshape(shape).copy())
