"""Who holds which version of which expert, and the smallest message that brings a participant up to date.

The server's model has a version number, raised once per aggregated round; version 0 is the base model, which every
participant loads by itself. What changed since then travels as whole experts, never as differences of differences,
so applying a message twice, or one that starts earlier than needed, gives the same model.

Exact types (``float32``) carry an expert's weights. All others carry its difference from the base, which is small, so
rounding it costs little, and rounding errors of earlier rounds are not carried on: no error feedback is needed. The
server's model stays exact.

Experts that a participant will only merge may come in 4 bits (``wire.merged: 4bit``). Their arrays have names of their
own (:data:`APPROXIMATE`), so a digest tells exact from approximate; the server remembers which experts each participant
holds approximately and sends them exactly when that participant is to tune them.

* :class:`ExpertStore`   the server's side: the global experts, when each last changed, and messages for a version
* :class:`Delta`         one such message

A participant's side of it is in :mod:`fluxlib.federation.client.held`.

Both sides name a state by a digest: SHA-256 over the SHA-256 of each expert in its wire form. An expert is hashed
once when it changes. A participant whose digest is not the expected one gets every expert anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor, nn

from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.wire import Form, WireError
from fluxlib.methods.base import ExpertKey
from fluxlib.moe import find

Experts = Mapping[ExpertKey, Mapping[str, Tensor]]

NOTHING = -1
"""Version of a participant of whom nothing is known: it gets everything."""

APPROXIMATE = ":4bit"
"""End of the name of an array that holds an approximate tensor."""


@dataclass(frozen=True)
class Holding:
    """What a participant holds: a version, its digest, and which experts it holds only approximately."""

    version: int = NOTHING
    digest: str = ""
    approximate: frozenset[ExpertKey] = frozenset()


@dataclass(frozen=True)
class Delta:
    """Experts that changed after ``from_version``, as they are in ``version``; ``from_version`` -1: all of them.

    ``digest`` and ``approximate`` are what the participant holds afterwards, ``num_experts`` and ``num_approximate``
    how many experts travel in the usual form and in 4 bits.
    """

    arrays: ArrayRecord
    from_version: int
    version: int
    digest: str
    num_experts: int
    num_bytes: int
    num_approximate: int = 0
    approximate: frozenset[ExpertKey] = frozenset()

    @property
    def after(self) -> Holding:
        """What the participant holds once it has applied this."""
        return Holding(self.version, self.digest, self.approximate)


class Digests:
    """One digest per expert of a model, and their digest; an expert is hashed again only when it changes."""

    def __init__(self, parts: Mapping[ExpertKey, bytes]) -> None:
        self.parts = dict(parts)
        self._order = sorted(self.parts)

    def with_changes(self, changes: Mapping[ExpertKey, bytes]) -> Digests:
        """A copy with some experts' digests replaced."""
        return Digests({**self.parts, **changes})

    def total(self) -> str:
        """Digest of all experts in order of layer and expert, as 64 hexadecimal digits."""
        return hashlib.sha256(b"".join(self.parts[key] for key in self._order)).hexdigest()


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
        wire: type in which experts travel; the model itself keeps its own type.
        approximates: whether some are to travel in 4 bits.
    """

    def __init__(self, model: nn.Module, wire: Form = "float32", approximates: bool = False) -> None:
        self.model = model
        self.wire = wire
        self.version = 0
        self._base: dict[ExpertKey, dict[str, Tensor]] = {}
        self._keeps_base = approximates or wire != "float32"
        self._layers = find.layers(model)
        self.keys = [(layer.index, expert) for layer in self._layers for expert in range(layer.num_experts)]
        self.shapes = {
            key: {name: tuple(tensor.shape) for name, tensor in self.tensors(key).items()} for key in self.keys
        }
        self.changed_at = dict.fromkeys(self.keys, 0)
        self._digests = Digests({key: wires.tensors_digest(self.tensors(key)) for key in self.keys})
        self.digest_of_version = [self._digests.total()]
        self._arrays: dict[ExpertKey, dict[str, Array]] = {}
        self._approximations: dict[ExpertKey, dict[str, Array]] = {}
        self._deltas: dict[int, Delta] = {}
        self.frozen_digest = frozen_digest(model)

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
        self._record(list(changes))

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
        self._record(list(experts))
        if self.digest != digests[-1]:
            raise WireError(f"it is damaged (digest is {self.digest[:12]}, it should be {digests[-1][:12]})")
        self._deltas.clear()
        self.version, self.digest_of_version = len(digests) - 1, list(digests)
        self.changed_at |= changed_at

    def delta(
        self,
        version: int = NOTHING,
        digest: str = "",
        held: frozenset[ExpertKey] = frozenset(),
        merged: frozenset[ExpertKey] = frozenset(),
    ) -> Delta:
        """What a participant that holds ``version`` with ``digest`` lacks; everything if that is not a known state.

        Args:
            held: experts that it holds only approximately. The digest of such a state is not kept; the participant
                finds out whether it is right when it has applied the delta.
            merged: experts that may come in 4 bits, or stay approximate.
        """
        known = 0 <= version <= self.version and (bool(held) or self.digest_of_version[version] == digest)
        since = version if known else NOTHING
        if held or merged:
            return self._mixed_delta(since, held if known else frozenset(), merged)
        if since not in self._deltas:
            # A difference from another base would go unnoticed if unchanged experts were sent as well.
            keys = [key for key in self.keys if self.changed_at[key] > (max(since, 0) if self._keeps_base else since)]
            record = self.record(keys)
            found = Delta(record, since, self.version, self.digest, len(keys), wires.record_bytes(record))
            if since == NOTHING:  # rare, and a second copy of the whole model
                return found
            self._deltas[since] = found
        return self._deltas[since]

    def _mixed_delta(self, since: int, held: frozenset[ExpertKey], merged: frozenset[ExpertKey]) -> Delta:
        changed = [key for key in self.keys if self.changed_at[key] > max(since, 0)]
        rounded = [key for key in changed if key in merged]
        exact = [
            key for key in self.keys if key not in merged and (self.changed_at[key] > max(since, 0) or key in held)
        ]
        arrays = {wires.key_name(key, name): array for key in exact for name, array in self.arrays(key).items()}
        after = (held & merged) | frozenset(rounded)
        for key in rounded:
            for name, array in self.approximation(key).items():
                arrays[wires.key_name(key, name)] = array
        digest = self._digests.with_changes({key: wires.digest(self.approximation(key)) for key in after}).total()
        record = wires.make_record(arrays)
        size = wires.record_bytes(record)
        return Delta(record, since, self.version, digest, len(exact), size, len(rounded), after)

    def arrays(self, key: ExpertKey) -> dict[str, Array]:
        """One expert in wire form; kept until it changes, unless it is still the base's."""
        if key in self._arrays:
            return self._arrays[key]
        tensors = self.tensors(key) if self.wire == "float32" else self._difference(key)
        arrays = {name: wires.encode(tensor, self.wire) for name, tensor in tensors.items()}
        if self.changed_at[key] > 0:
            self._arrays[key] = arrays
        return arrays

    def approximation(self, key: ExpertKey) -> dict[str, Array]:
        """One expert's difference from the base in 4 bits; kept until it changes."""
        if key not in self._approximations:
            self._approximations[key] = {
                name + APPROXIMATE: wires.encode(tensor, "int4") for name, tensor in self._difference(key).items()
            }
        return self._approximations[key]

    def _difference(self, key: ExpertKey) -> dict[str, Tensor]:
        base = self._base.get(key, self.tensors(key))
        return {name: tensor.float() - base[name].float() for name, tensor in self.tensors(key).items()}

    def _remember_base(self, keys: Iterable[ExpertKey]) -> None:
        if self._keeps_base:
            for key in keys:
                if key not in self._base:
                    self._base[key] = {name: tensor.clone() for name, tensor in self.tensors(key).items()}

    def record(self, keys: Iterable[ExpertKey]) -> ArrayRecord:
        """Some experts in wire form."""
        return wires.make_record(
            {wires.key_name(key, name): array for key in keys for name, array in self.arrays(key).items()}
        )

    def changed(self) -> list[ExpertKey]:
        """Experts that are no longer the base's."""
        return [key for key in self.keys if self.changed_at[key] > 0]

    def _record(self, keys: list[ExpertKey]) -> None:
        self.version += 1
        self._deltas.clear()
        for key in keys:
            self.changed_at[key] = self.version
            self._arrays.pop(key, None)
            self._approximations.pop(key, None)
        changed = {key: wires.digest(self.arrays(key)) for key in keys}
        self._digests = self._digests.with_changes(changed)
        self.digest_of_version.append(self._digests.total())
