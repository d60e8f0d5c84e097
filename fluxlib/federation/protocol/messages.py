"""What travels between server and participants, and how it is written into Flower records.

Every message holds one ``ArrayRecord`` ("arrays": experts, or changes of experts), one ``ConfigRecord`` ("config")
and, in replies, one ``MetricRecord`` ("metrics"), which is the form that Flower's own mods expect.

* :class:`Instruction`   server to participant: the run, the round, a delta, and for training roles and a budget
* :class:`JoinReport`    what a participant holds, before round 1
* :class:`ProfileReport` activation frequencies, before a participant's first round
* :class:`TrainReport`   changes of the exploited experts, utilities, tokens and an account of the work

Nothing else leaves a participant: no sample, no text, no profile beyond the frequencies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fluxlib.config import RunConfig
from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.sync import Delta, Holding
from fluxlib.federation.protocol.wire import Form, WireError
from fluxlib.methods.base import Budget, ExpertKey, Update, Work
from fluxlib.roles import Roles

JOIN, PROFILE, TRAIN = "query.join", "query.profile", "train"
"""Message types."""

DONE, RESYNC = "done", "resync"
"""Status of a reply: the work was done, or the participant needs every expert anew."""


Shapes = Mapping[ExpertKey, Mapping[str, tuple[int, ...]]]
"""Shapes of the tensors of every expert of a model."""


@lru_cache(maxsize=64)
def parse_config(text: str) -> RunConfig:
    """The run configuration in a message."""
    return RunConfig.model_validate_json(text)


MOST = 1e15
"""Largest count or time that a participant may report: what tables and clocks can hold."""


@dataclass(frozen=True)
class Instruction:
    """What a participant is to do. ``roles`` and ``budget`` only for training."""

    config: str
    round: int
    participant: int
    wire: Form
    delta: Delta
    roles: Roles | None = None
    budget: Budget | None = None
    clip_norm: float | None = None

    def to_records(self) -> RecordDict:
        """As message content."""
        values: dict[str, Any] = {
            "run": self.config,
            "round": self.round,
            "participant": self.participant,
            "wire": self.wire,
            "from_version": self.delta.from_version,
            "version": self.delta.version,
            "digest": self.delta.digest,
            "num_experts": self.delta.num_experts,
            "num_bytes": self.delta.num_bytes,
            "num_approximate": self.delta.num_approximate,
        }
        if self.roles is not None and self.budget is not None:
            values["shape"] = list(self.roles.exploit.shape)
            values["exploit"] = _pack(self.roles.exploit)
            values["explore"] = _pack(self.roles.explore)
            values["num_tuned"] = self.budget.num_tuned
            values["num_merged"] = self.budget.num_merged
        if self.clip_norm is not None:
            values["clip_norm"] = self.clip_norm
        return RecordDict({"arrays": self.delta.arrays, "config": ConfigRecord(values)})

    @classmethod
    def from_records(cls, content: RecordDict) -> Instruction:
        """Inverse of :meth:`to_records`."""
        values, arrays = content["config"], content["arrays"]
        roles = budget = None
        if "exploit" in values:
            shape = tuple(values["shape"])
            roles = Roles(_unpack(values["exploit"], shape), _unpack(values["explore"], shape))
            budget = Budget(values["num_tuned"], values["num_merged"])
        delta = Delta(
            arrays,
            values["from_version"],
            values["version"],
            values["digest"],
            values["num_experts"],
            values["num_bytes"],
            values["num_approximate"],
        )
        header = (values["run"], values["round"], values["participant"], values["wire"])
        return cls(*header, delta, roles, budget, values.get("clip_norm"))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Report:
    """What every reply says: who, in which round, holding what."""

    participant: int
    round: int
    version: int
    digest: str

    def header(self, **more: Any) -> ConfigRecord:
        return ConfigRecord(
            {
                "participant": self.participant,
                "round": self.round,
                "version": self.version,
                "digest": self.digest,
                **more,
            }
        )


@dataclass(frozen=True)
class JoinReport(_Report):
    """What a participant holds; ``frozen_digest`` is that of the weights which are never exchanged.

    ``device`` is its name in :mod:`fluxlib.devices.catalogue`, empty where the run's fleet says what it stands for.
    """

    frozen_digest: str = ""
    approximate: frozenset[ExpertKey] = frozenset()
    device: str = ""

    @property
    def holding(self) -> Holding:
        """What is held, as the server remembers it."""
        return Holding(self.version, self.digest, self.approximate)

    def to_records(self) -> RecordDict:
        """As message content."""
        flat = _flat(self.approximate)
        more = {"frozen_digest": self.frozen_digest, "approximate": flat, "device": self.device}
        return RecordDict({"config": self.header(status=DONE, **more)})

    @classmethod
    def from_records(cls, content: RecordDict) -> JoinReport:
        """Inverse of :meth:`to_records`."""
        values = content["config"]
        held = _keys(values["approximate"])
        return cls(*_header(values), frozen_digest=values["frozen_digest"], approximate=held, device=values["device"])


@dataclass(frozen=True)
class ProfileReport(_Report):
    """Activation frequencies ``[layers, experts]`` of the model a participant holds, and the work of measuring."""

    frequency: Tensor
    work: Work
    phases_s: Mapping[str, float] = field(default_factory=dict)

    def to_records(self) -> RecordDict:
        """As message content."""
        more = {"status": DONE, "shape": list(self.frequency.shape), "frequency": _floats(self.frequency)}
        account = {"work": json.dumps(vars(self.work)), "phases": json.dumps(dict(self.phases_s))}
        return RecordDict({"config": self.header(**more, **account)})

    @classmethod
    def from_records(cls, content: RecordDict) -> ProfileReport:
        """Inverse of :meth:`to_records`."""
        values = content["config"]
        work, phases = _work(values["work"]), _phases(values["phases"])
        frequency = _from_floats(values["frequency"], tuple(values["shape"]))
        return cls(*_header(values), frequency, work, phases)


@dataclass(frozen=True)
class TrainReport(_Report):
    """One participant's update and an account of what it cost."""

    update: Update
    num_bytes: int = 0
    within: bool | None = None
    """Whether the change was within an adaptive bound on its norm; None: nobody asked."""
    spans: tuple[tuple[str, float, float, int], ...] = ()
    """Phases with start and end in seconds since 1970 on the participant's clock, and their round."""

    def to_records(self, wire: Form) -> RecordDict:
        """As message content; changes are rounded to ``wire``, and lent where that leaves them as they are."""
        update = self.update
        arrays = wires.make_record(
            {
                wires.key_name(key, name): wires.lend(tensor, wire)
                for key, tensors in update.changes.items()
                for name, tensor in tensors.items()
            }
        )
        config = self.header(
            status=DONE,
            shape=list(update.tokens.shape),
            utilities=_floats(update.utilities),
            tokens=_floats(update.tokens),
            work=json.dumps(vars(update.work)),
            phases=json.dumps(dict(update.phases_s)),
            spans=json.dumps(self.spans),
        )
        metrics = MetricRecord({"loss": float(update.loss), "num-examples": int(update.num_samples)})
        if self.within is not None:
            metrics["norm_bit"] = int(self.within)
        return RecordDict({"arrays": arrays, "config": config, "metrics": metrics})

    @classmethod
    def from_records(cls, content: RecordDict, wire: Form, shapes: Shapes | None = None) -> TrainReport:
        """Inverse of :meth:`to_records`; coded types need the ``shapes`` of the model's experts.

        Raises:
            WireError, KeyError, TypeError, ValueError: not the records of a reply.
        """
        values, metrics, arrays = content["config"], content["metrics"], content["arrays"]
        shape = tuple(values["shape"])
        update = Update(
            changes=_experts(arrays, wire, shapes or {}),
            utilities=_from_floats(values["utilities"], shape),
            tokens=_from_floats(values["tokens"], shape),
            loss=float(metrics["loss"]),
            num_samples=int(metrics["num-examples"]),
            work=_work(values["work"]),
            phases_s=_phases(values["phases"]),
        )
        told = json.loads(values["spans"])
        spans = tuple((str(name), _count(a), _count(b), int(_count(r))) for name, a, b, r in told)
        within = bool(metrics["norm_bit"]) if "norm_bit" in metrics else None
        return cls(*_header(values), update=update, num_bytes=wires.record_bytes(arrays), within=within, spans=spans)


def resync_request(participant: int, round_index: int, version: int, digest: str) -> RecordDict:
    """Content of the reply of a participant that cannot get from what it holds to what it should hold."""
    return RecordDict({"config": _Report(participant, round_index, version, digest).header(status=RESYNC)})


def asks_for_resync(content: RecordDict) -> bool:
    """Whether a reply is a :func:`resync_request`."""
    return "config" in content and content["config"].get("status") == RESYNC


def _header(values: ConfigRecord) -> tuple[int, int, int, str]:
    return int(values["participant"]), int(values["round"]), int(values["version"]), str(values["digest"])


def _work(text: str) -> Work:
    """An account of work whose every field is a number that a clock can take."""
    work = Work(**json.loads(text))
    for item in fields(Work):
        value = getattr(work, item.name)
        if isinstance(item.default, bool) != isinstance(value, bool):
            raise ValueError(f"work.{item.name} is {value!r}, allowed is {type(item.default).__name__}")
        _count(value)
    if work.num_experts < 1:
        raise ValueError(f"work.num_experts is {work.num_experts}, allowed is at least 1")
    return work


def _phases(text: str) -> dict[str, float]:
    return {str(name): _count(seconds) for name, seconds in dict(json.loads(text)).items()}


def _count(value: Any) -> Any:
    """``value`` if it is a number from 0 to :data:`MOST`: anything that a participant may count or time."""
    if not isinstance(value, int | float) or not 0 <= value <= MOST or not math.isfinite(value):
        raise ValueError(f"a count or time is {str(value)[:40]}, allowed is a number from 0 to {MOST:g}")
    return value


def _flat(keys: Iterable[ExpertKey]) -> list[int]:
    return [number for key in sorted(keys) for number in key]


def _keys(flat: Sequence[int]) -> frozenset[ExpertKey]:
    return frozenset(zip(flat[::2], flat[1::2], strict=True))


def _experts(arrays: ArrayRecord, wire: Form, shapes: Shapes) -> dict[ExpertKey, dict[str, Tensor]]:
    found: dict[ExpertKey, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        key, tensor = wires.parse_name(name)
        tensors = found.get(key)
        if tensors is None:
            tensors = found[key] = {}
        shape = shapes.get(key, {}).get(tensor)
        # A coded tensor that the model does not have cannot be read; its name is what will be refused.
        tensors[tensor] = torch.zeros(0) if wires.is_coded(wire) and shape is None else wires.decode(array, wire, shape)
    return found


def _pack(mask: Tensor) -> bytes:
    return np.packbits(mask.cpu().numpy()).tobytes()


def _unpack(data: bytes, shape: tuple[int, ...]) -> Tensor:
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool).reshape(shape))


def _floats(values: Tensor) -> bytes:
    return values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()


def _from_floats(data: bytes, shape: tuple[int, ...]) -> Tensor:
    values = np.frombuffer(data, np.float32)
    if len(values) != int(np.prod(shape)):
        raise WireError(f"{len(values)} numbers do not fill a table of shape {shape}")
    return torch.from_numpy(values.reshape(shape).copy())
