"""Who holds which version of which expert, and the smallest message that brings a participant up to date.

The model's version is raised once per aggregated round; version 0 is the base model, which every participant loads by
itself. What changed since then travels as whole experts, so applying a delta twice, or one that starts earlier than
needed, gives the same model. ``float32`` carries weights, all other forms differences from the base: they are small, so
rounding costs little and does not add up over rounds.

Experts that a participant will only merge need not be the newest (``wire.max_staleness``): they are sent when it is to
tune them, or when its copy is too many rounds old.

With an adapter (:mod:`fluxlib.moe.adapter`) what travels, is kept and added up of an expert is its B's; both sides form
the same weights from them and the base. Of a 16-bit model it is the weights in 32 bits, on the host: both sides round
them to compute, so that small changes count.

A version is named by its digest: SHA-256 over the SHA-256 of each expert as it travels. Where the server's and a
participant's differ, every expert is sent anew.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from torch import Tensor, nn

from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.wire import Experts, Form, WireError
from fluxlib.io import checked
from fluxlib.methods.base import ExpertKey
from fluxlib.moe import find
from fluxlib.moe.adapter import Adapter
from fluxlib.moe.product import wide_dtype

History = dict[ExpertKey, list[tuple[int, bytes]]]
"""Of every expert the versions that changed it, and its digest since each; the first is version 0."""

NOTHING = -1
"""Version of a participant of whom nothing is known: it gets everything."""


@dataclass(frozen=True)
class ModelVersion:
    """A version of the global model as a participant holds it.

    ``stale``: ``(layer, expert, version)`` of the experts that it holds as they were in an older version.
    """

    number: int = NOTHING
    digest: str = ""
    stale: frozenset[tuple[int, int, int]] = frozenset()

    def of(self, key: ExpertKey) -> int:
        """The version that an expert is held in."""
        return self._older.get(key, self.number)

    @cached_property
    def _older(self) -> dict[ExpertKey, int]:
        return {(layer, expert): version for layer, expert, version in self.stale}

    def values(self) -> dict[str, int | str | list[int]]:
        """As entries of a Flower record."""
        flat = [number for entry in sorted(self.stale) for number in entry]
        return {"version": self.number, "digest": self.digest, "stale": flat}

    @classmethod
    def read(cls, record: ConfigRecord) -> ModelVersion:
        """Inverse of :meth:`values`."""
        number, name = checked("version", record["version"], int), checked("digest", record["digest"], str)
        flat = [checked("stale", one, int) for one in checked("stale", record["stale"], list)]
        return cls(number, name, frozenset(zip(flat[::3], flat[1::3], flat[2::3], strict=True)))


@dataclass(frozen=True)
class Delta:
    """Experts that changed after version ``since``, and what a participant holds ``after`` it has them.

    ``since`` -1: whatever the participant holds is replaced.
    """

    arrays: ArrayRecord = field(default_factory=ArrayRecord)
    since: int = NOTHING
    after: ModelVersion = ModelVersion()

    @cached_property
    def num_bytes(self) -> int:
        """Payload, without headers and names."""
        return wires.record_bytes(self.arrays)

    @cached_property
    def num_experts(self) -> int:
        """Experts that travel."""
        return len({wires.parse_name(name)[0] for name in self.arrays})


def model_digest(experts: Mapping[ExpertKey, bytes]) -> str:
    """Digest of all experts' digests in order of layer and expert, as 64 hexadecimal digits."""
    return hashlib.sha256(b"".join(experts[key] for key in sorted(experts))).hexdigest()


def base_digests(model: nn.Module) -> dict[ExpertKey, bytes]:
    """Digest of every expert of ``model``, exactly as it is."""
    return {
        (layer.index, expert): wires.digest(
            {name: wires.encode(tensor) for name, tensor in find.expert_tensors(layer.experts, expert).items()}
        )
        for layer in find.layers(model)
        for expert in range(layer.num_experts)
    }


def frozen_digest(model: nn.Module) -> str:
    """Digest of everything that is not a routed expert: what no message can bring up to date."""
    experts = tuple(layer.name + "." for layer in find.layers(model))
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(experts):
            total.update(f"{name}{tuple(tensor.shape)}".encode())
            total.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return total.hexdigest()


class ExpertStore:
    """The global model's experts with their history; ``model`` is changed in place by :meth:`apply`.

    Args:
        model: the full model, at version 0.
        wire: form in which experts travel; the model itself keeps its own type.
        adapter: of the run; None: experts travel whole.
    """

    def __init__(self, model: nn.Module, wire: Form = "float32", adapter: Adapter | None = None) -> None:
        self.model = model
        self.wire = wire
        self.version = 0
        self._base: dict[ExpertKey, dict[str, Tensor]] = {}
        self.adapter = adapter
        self._learned: dict[ExpertKey, dict[str, Tensor]] = {}
        self._keeps_base = wire != "float32" or adapter is not None
        self._layers = find.layers(model)
        self.shape = len(self._layers), max(layer.num_experts for layer in self._layers)
        """MoE layers and experts per layer (of the largest layer)."""
        dtype = find.expert_tensors(self._layers[0].experts, 0)["down_proj"].dtype
        self._is_apart = adapter is not None or wide_dtype(dtype) != dtype
        digests = base_digests(model)
        self.history: History = {key: [(0, digest)] for key, digest in digests.items()}
        self.keys = list(digests)
        self.shapes = {
            key: {name: tuple(tensor.shape) for name, tensor in self.learned(key).items()} for key in self.keys
        }
        self.digest_of_version = [model_digest(digests)]
        self.frozen_digest = frozen_digest(model)
        self._arrays: dict[ExpertKey, dict[str, Array]] = {}
        self._deltas: dict[int, Delta] = {}

    @property
    def digest(self) -> str:
        """Digest of the current version."""
        return self.digest_of_version[-1]

    def tensors(self, key: ExpertKey) -> dict[str, Tensor]:
        """One expert's tensors: views into the model."""
        return find.expert_tensors(self._layers[key[0]].experts, key[1])

    def learned(self, key: ExpertKey) -> dict[str, Tensor]:
        """What of an expert changes, is kept and sent: its tensors (of a 16-bit model in 32 bits), or its B's."""
        if not self._is_apart or key in self._learned:
            return self._learned.get(key) or self.tensors(key)
        if self.adapter is None:
            return {name: tensor.to("cpu", wide_dtype(tensor.dtype)) for name, tensor in self.tensors(key).items()}
        return self.adapter.start(self.tensors(key), find.read_layout(self._layers[key[0]].experts))

    def _put(self, key: ExpertKey, learned: Mapping[str, Tensor]) -> None:
        """Make an expert what was learned of it."""
        experts = self._layers[key[0]].experts
        if self._is_apart:
            self._learned[key] = dict(learned)
        if self.adapter is not None:
            learned = self.adapter.added(key, self._base[key], learned, find.read_layout(experts))
        find.write_expert(experts, key[1], learned)

    @torch.no_grad()
    def apply(self, changes: Experts) -> None:
        """Add ``changes`` to the model and raise the version by one; experts not named stay bit for bit."""
        self._remember_base(changes)
        for key, tensors in changes.items():
            target = self.learned(key)
            for name, change in tensors.items():
                target[name].add_(change.to(target[name]))
            if self._is_apart:
                self._put(key, target)
        self._raise_version(list(changes))

    def last(self, key: ExpertKey, version: int | None = None) -> tuple[int, bytes]:
        """Version of an expert's last change, up to ``version`` if that is given, and its digest since; 0: the base."""
        history = self.history[key]
        if version is None or history[-1][0] <= version:
            return history[-1]
        return history[bisect_right(history, version, key=itemgetter(0)) - 1]

    @torch.no_grad()
    def set(self, experts: Experts, history: History, digests: list[str]) -> None:
        """Put a saved state in place of the base; ``digests`` are those of versions 0 to the saved one.

        WireError: the base model is another one, or the result's digest is not the last of ``digests``.
        """
        if digests[0] != self.digest_of_version[0]:
            raise WireError("it belongs to another base model (digests of version 0 differ)")
        self._remember_base(experts)
        for key, tensors in experts.items():
            self._put(key, tensors)
        self._raise_version(list(experts))
        if self.digest != digests[-1]:
            raise WireError(f"it is damaged (digest is {self.digest[:12]}, it should be {digests[-1][:12]})")
        self.version, self.digest_of_version = len(digests) - 1, list(digests)
        self.history |= history

    def delta(
        self, held: ModelVersion = ModelVersion(), lazy: frozenset[ExpertKey] = frozenset(), max_staleness: int = 0
    ) -> Delta:
        """What a participant lacks that holds ``held``; everything if that is not a known version.

        Args:
            lazy: experts that may stay as they are held.
            max_staleness: versions that such a copy may lag behind.
        """
        known = 0 <= held.number <= self.version and self._digest_of(held) == held.digest
        since, plain = held.number if known else NOTHING, not (held.stale or lazy and max_staleness)
        if plain and since in self._deltas:
            return self._deltas[since]
        if not known:
            held = ModelVersion()
        # A difference from another base would go unnoticed if unchanged experts were sent as well.
        floor = 0 if self._keeps_base else NOTHING
        lacking = [key for key in self.keys if self.last(key)[0] > max(held.of(key), floor)]
        stale = {
            key: held.of(key)
            for key in (lacking if known else ())
            if key in lazy and self.version - held.of(key) <= max_staleness
        }
        digest = self.digest
        if stale:
            digest = model_digest({key: self.last(key, stale.get(key))[1] for key in self.keys})
        after = ModelVersion(self.version, digest, frozenset((*key, version) for key, version in stale.items()))
        found = Delta(wires.make_record(self.record(key for key in lacking if key not in stale)), since, after)
        if plain and since != NOTHING:  # that would be a second copy of the whole model, and is rarely asked for
            self._deltas[since] = found
        return found

    def _digest_of(self, held: ModelVersion) -> str:
        """Digest that a copy of this version must have."""
        if not held.stale:
            return self.digest_of_version[held.number]
        known = all((layer, expert) in self.history and version >= 0 for layer, expert, version in held.stale)
        return model_digest({key: self.last(key, held.of(key))[1] for key in self.keys}) if known else ""

    def arrays(self, key: ExpertKey) -> dict[str, Array]:
        """One expert as it travels; kept from one change to the next, made each time while it is the base's."""
        if key in self._arrays:
            return self._arrays[key]
        tensors = self.learned(key)
        if self.wire != "float32" and self.adapter is None:
            base = self._base.get(key, tensors)
            tensors = {name: tensor.float().cpu() - base[name].float().cpu() for name, tensor in tensors.items()}
        return {name: wires.encode(tensor, self.wire) for name, tensor in tensors.items()}

    def record(self, keys: Iterable[ExpertKey]) -> dict[str, Array]:
        """Some experts as they travel, by the names of their arrays."""
        return {wires.key_name(key, name): array for key in keys for name, array in self.arrays(key).items()}

    def changed(self) -> list[ExpertKey]:
        """Experts that are no longer the base's."""
        return [key for key in self.keys if self.last(key)[0] > 0]

    def _remember_base(self, keys: Iterable[ExpertKey]) -> None:
        if self._keeps_base:
            for key in set(keys) - self._base.keys():
                self._base[key] = {name: tensor.clone() for name, tensor in self.tensors(key).items()}

    def _raise_version(self, keys: list[ExpertKey]) -> None:
        self.version += 1
        self._deltas.clear()
        for key in keys:
            self._arrays.pop(key, None)
            self._arrays[key] = self.arrays(key)
            self.history[key].append((self.version, wires.digest(self._arrays[key])))
        self.digest_of_version.append(model_digest({key: self.last(key)[1] for key in self.keys}))
