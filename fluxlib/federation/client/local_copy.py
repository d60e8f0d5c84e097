"""A participant's copy of the global model, and the one model in memory that stands for all of a process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor, nn

from fluxlib import models
from fluxlib.federation.protocol import sync
from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.sync import NOTHING, Delta, ModelVersion
from fluxlib.federation.protocol.wire import Form, WireError
from fluxlib.io import reading
from fluxlib.methods.base import ExpertKey
from fluxlib.models.loading import torch_device
from fluxlib.moe import find
from fluxlib.moe.adapter import Adapter


class ResyncNeeded(WireError):
    """A delta does not lead from what a participant holds to what it should hold."""


@dataclass(frozen=True)
class LocalCopy:
    """The experts a participant holds: those of the base, except ``arrays`` (keys ``"<layer>.<expert>.<name>"``).

    It lives in the participant's Flower context as two records, so every engine carries it between rounds.
    """

    version: ModelVersion
    arrays: ArrayRecord = field(default_factory=ArrayRecord)

    @classmethod
    @reading("what this participant holds", WireError)
    def load(cls, state: RecordDict, base_digest: str) -> LocalCopy:
        """What ``state`` holds; the base model when it holds nothing."""
        if "held" not in state:
            return cls(ModelVersion(0, base_digest))
        return cls(ModelVersion.read(state["held"]), state["experts"])

    def save(self, state: RecordDict) -> None:
        """Write into ``state``."""
        state["held"], state["experts"] = ConfigRecord(dict(self.version.values())), self.arrays

    @staticmethod
    def forget(state: RecordDict) -> None:
        """Take it out of ``state``: the participant then holds the base, and accepts a full delta of any version."""
        for name in state.keys() & {"held", "experts"}:
            del state[name]

    def updated(self, delta: Delta, base: Mapping[ExpertKey, bytes]) -> LocalCopy:
        """What is held after ``delta``; ``base`` are the digests of the base model's experts.

        ResyncNeeded: ``delta`` starts later than, or ends before, what is held, or the result's digest is wrong.
        """
        number, wanted = self.version.number, delta.after
        if delta.since != NOTHING and not delta.since <= number <= wanted.number:
            raise ResyncNeeded(f"holds version {number}, the delta is {delta.since} to {wanted.number}")
        kept = self.arrays if delta.since != NOTHING else {}
        held = LocalCopy(wanted, wires.make_record({**kept, **delta.arrays}))
        found = sync.model_digest({**base, **held.digests()})
        if found != wanted.digest:
            raise ResyncNeeded(f"digest is {found[:12]} after the delta, it should be {wanted.digest[:12]}")
        return held

    def digests(self) -> dict[ExpertKey, bytes]:
        """Digest of each expert that differs from the base."""
        return {key: wires.digest(arrays) for key, arrays in wires.by_expert(self.arrays).items()}


class Workspace:
    """A model in memory that stands for whichever participant is at work.

    The base is loaded once; :meth:`load` writes the experts in which the model and the participant differ.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, wire: Form = "float32", adapter: Adapter | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.wire, self.adapter = wire, adapter
        self.base = sync.base_digests(model)
        self.base_digest = sync.model_digest(self.base)
        self.frozen_digest = sync.frozen_digest(model)
        self._layers = find.layers(model)
        self._base_tensors: dict[ExpertKey, dict[str, Tensor]] = {}
        self._loaded: dict[ExpertKey, bytes] = {}
        self._digest = self.base_digest

    def load(self, held: LocalCopy) -> int:
        """Make the model that of ``held``; number of experts that had to be written."""
        if held.version.digest == self._digest:
            return 0
        wanted, digests, written = wires.by_expert(held.arrays), held.digests(), 0
        self._digest = ""  # stays so if writing fails half-way
        for key in self._loaded.keys() | digests.keys():
            target = digests.get(key, self.base[key])
            if self._loaded.get(key, self.base[key]) != target:
                self._write(key, wanted.get(key, {}))
                self._loaded[key] = target
                written += 1
        self._digest = held.version.digest
        return written

    def _write(self, key: ExpertKey, arrays: Mapping[str, Array]) -> None:
        """One expert's tensors: those of the base, replaced by ``arrays``, or with these B's on top."""
        experts = self._layers[key[0]].experts
        layout = find.read_layout(experts)
        if key not in self._base_tensors:
            current = find.expert_tensors(experts, key[1])
            self._base_tensors[key] = {name: tensor.clone() for name, tensor in current.items()}
        base = self._base_tensors[key]
        own = base if self.adapter is None else self.adapter.start(base, layout)
        found: dict[str, Tensor] = {}
        for name, array in arrays.items():
            if name not in own:
                raise WireError(f"an expert has no tensor {name!r}, it has {', '.join(own)}")
            tensor = wires.decode(array, self.wire, own[name].shape)
            if self.wire != "float32" and self.adapter is None:
                tensor = base[name].float() + tensor.float().to(base[name].device)
            found[name] = tensor
        tensors = base | found if self.adapter is None else self.adapter.added(key, base, found, layout)
        find.write_expert(experts, key[1], tensors)


@lru_cache(maxsize=1)
def workspace(
    model: str, wire: Form, device: str = "cpu", adapter: Adapter | None = None, dtype: str = "float32"
) -> Workspace:
    """The process's one model in memory, shared by all participants that run in it."""
    return Workspace(*models.load(model, getattr(torch, dtype), torch_device(device)), wire, adapter)
