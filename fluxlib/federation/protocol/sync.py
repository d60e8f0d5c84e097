"""Who holds which version of which expert, and the smallest message that brings a participant up to date.

The server's model has a version number, raised once per aggregated round; version 0 is the base model, which every
participant loads by itself. What changed since then travels as whole experts, so applying a delta twice, or one that
starts earlier than needed, gives the same model. ``float32`` carries weights, all other forms differences from the
base: they are small, so rounding costs little and does not add up over rounds.

Experts that a participant will only merge may come in 4 bits (``wire.merged: 4bit``), under names of their own
(:data:`APPROXIMATE`). The server remembers who holds which approximately, and sends them exactly to who is to tune
them.

A version is named by its digest: SHA-256 over the SHA-256 of each expert as it travels. Where the server's
(:class:`ExpertStore`) and a participant's (:class:`~fluxlib.federation.client.local_copy.LocalCopy`) differ, every
expert is sent anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from torch import Tensor, nn

from fluxlib.config import checked
from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.wire import Experts, Form, WireError
from fluxlib.methods.base import ExpertKey
from fluxlib.moe import find

NOTHING = -1
"""Version of a participant of whom nothing is known: it gets everything."""

APPROXIMATE = ":4bit"
"""End of the name of an array that holds an approximate tensor."""


@dataclass(frozen=True)
class ModelVersion:
    """A version of the global model as a participant holds it, some experts perhaps only approximately."""

    number: int = NOTHING
    digest: str = ""
    approximate: frozenset[ExpertKey] = frozenset()

    def values(self) -> dict[str, int | str | list[int]]:
        """As entries of a Flower record."""
        flat = [number for key in sorted(self.approximate) for number in key]
        return {"version": self.number, "digest": self.digest, "approximate": flat}

    @classmethod
    def read(cls, record: ConfigRecord) -> ModelVersion:
        """Inverse of :meth:`values`."""
        number, name = checked("version", record["version"], int), checked("digest", record["digest"], str)
        flat = [checked("approximate", one, int) for one in checked("approximate", record["approximate"], list)]
        return cls(number, name, frozenset(zip(flat[::2], flat[1::2], strict=True)))


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
    def num_approximate(self) -> int:
        """Experts that travel in 4 bits."""
        return len(approximate_keys(self.arrays))

    @cached_property
    def num_experts(self) -> int:
        """Experts that travel in the usual form."""
        return len({wires.parse_name(name)[0] for name in self.arrays}) - self.num_approximate


def approximate_keys(names: Iterable[str]) -> frozenset[ExpertKey]:
    """The experts among the arrays of these names that are in 4 bits."""
    return frozenset(wires.parse_name(name)[0] for name in names if name.endswith(APPROXIMATE))


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
        approximates: whether some are to travel in 4 bits.
    """

    def __init__(self, model: nn.Module, wire: Form = "float32", approximates: bool = False) -> None:
        self.model = model
        self.wire = wire
        self.version = 0
        self._base: dict[ExpertKey, dict[str, Tensor]] = {}
        self._keeps_base = approximates or wire != "float32"
        self._layers = find.layers(model)
        self._digests = base_digests(model)
        self.keys = list(self._digests)
        self.shapes = {
            key: {name: tuple(tensor.shape) for name, tensor in self.tensors(key).items()} for key in self.keys
        }
        self.changed_at = dict.fromkeys(self.keys, 0)
        self.digest_of_version = [model_digest(self._digests)]
        self.frozen_digest = frozen_digest(model)
        self._arrays: dict[tuple[ExpertKey, bool], dict[str, Array]] = {}
        self._deltas: dict[int, Delta] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """MoE layers and experts per layer (of the largest layer)."""
        return len(self._layers), max(layer.num_experts for layer in self._layers)

    @property
    def digest(self) -> str:
        """Digest of the current version."""
        return self.digest_of_version[-1]

    def tensors(self, key: ExpertKey) -> dict[str, Tensor]:
        """One expert's tensors: views into the model."""
        return find.expert_tensors(self._layers[key[0]].experts, key[1])

    @torch.no_grad()
    def apply(self, changes: Experts) -> None:
        """Add ``changes`` to the model and raise the version by one; experts not named stay bit for bit."""
        self._remember_base(changes)
        for key, tensors in changes.items():
            target = self.tensors(key)
            for name, change in tensors.items():
                target[name].add_(change.to(target[name]))
        self._raise_version(list(changes))

    @torch.no_grad()
    def set(self, experts: Experts, changed_at: Mapping[ExpertKey, int], digests: list[str]) -> None:
        """Put a saved state in place of the base: ``digests`` are those of versions 0 to the saved one.

        Raises:
            WireError: the base model is another one, or the result's digest is not the last of ``digests``.
        """
        if digests[0] != self.digest_of_version[0]:
            raise WireError("it belongs to another base model (digests of version 0 differ)")
        self._remember_base(experts)
        for key, tensors in experts.items():
            find.write_expert(self._layers[key[0]].experts, key[1], tensors)
        self._raise_version(list(experts))
        if self.digest != digests[-1]:
            raise WireError(f"it is damaged (digest is {self.digest[:12]}, it should be {digests[-1][:12]})")
        self.version, self.digest_of_version = len(digests) - 1, list(digests)
        self.changed_at |= changed_at

    def delta(self, held: ModelVersion = ModelVersion(), merged: frozenset[ExpertKey] = frozenset()) -> Delta:
        """What a participant lacks that holds ``held``; everything if that is not a known version.

        The digest of a copy with approximate experts is not remembered; the participant finds out whether it is right
        when it has applied the delta.

        Args:
            merged: experts that may come in 4 bits, or stay approximate.
        """
        known = 0 <= held.number <= self.version
        known = known and (bool(held.approximate) or self.digest_of_version[held.number] == held.digest)
        since, approximate = (held.number, held.approximate) if known else (NOTHING, frozenset[ExpertKey]())
        plain = not (approximate or merged)
        if plain and since in self._deltas:
            return self._deltas[since]
        # A difference from another base would go unnoticed if unchanged experts were sent as well.
        floor = max(since, 0) if self._keeps_base else since
        changed = frozenset(key for key in self.keys if self.changed_at[key] > floor)
        after = (changed | approximate) & merged
        exact = self.record(sorted((changed | approximate) - merged))
        rounded = self.record(sorted(changed & merged), approximate=True)
        digest = self.digest
        if after:
            digest = model_digest(self._digests | {key: wires.digest(self.arrays(key, True)) for key in after})
        found = Delta(wires.make_record({**exact, **rounded}), since, ModelVersion(self.version, digest, after))
        if plain and since != NOTHING:  # that would be a second copy of the whole model, and is rarely asked for
            self._deltas[since] = found
        return found

    def arrays(self, key: ExpertKey, approximate: bool = False) -> dict[str, Array]:
        """One expert as it travels, perhaps in 4 bits; kept until it changes, unless it is still the base's."""
        if (key, approximate) in self._arrays:
            return self._arrays[key, approximate]
        form: Form = "int4" if approximate else self.wire
        end = APPROXIMATE if approximate else ""
        tensors = self.tensors(key)
        if form != "float32":
            base = self._base.get(key, tensors)
            tensors = {name: tensor.float() - base[name].float() for name, tensor in tensors.items()}
        made = {name + end: wires.encode(tensor, form) for name, tensor in tensors.items()}
        if self.changed_at[key] > 0:
            self._arrays[key, approximate] = made
        return made

    def record(self, keys: Iterable[ExpertKey], approximate: bool = False) -> dict[str, Array]:
        """Some experts as they travel, by the names of their arrays."""
        return {
            wires.key_name(key, name): array for key in keys for name, array in self.arrays(key, approximate).items()
        }

    def changed(self) -> list[ExpertKey]:
        """Experts that are no longer the base's."""
        return [key for key in self.keys if self.changed_at[key] > 0]

    def _remember_base(self, keys: Iterable[ExpertKey]) -> None:
        if self._keeps_base:
            for key in set(keys) - self._base.keys():
                self._base[key] = {name: tensor.clone() for name, tensor in self.tensors(key).items()}

    def _raise_version(self, keys: list[ExpertKey]) -> None:
        self.version += 1
        self._deltas.clear()
        for key in keys:
            self.changed_at[key] = self.version
            self._arrays.pop((key, False), None)
            self._arrays.pop((key, True), None)
            self._digests[key] = wires.digest(self.arrays(key))
        self.digest_of_version.append(model_digest(self._digests))
