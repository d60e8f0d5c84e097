"""What a participant holds, and the one model in memory that stands for all participants of a process.

* :class:`Held`       version, digest, and the experts that differ from the base; kept in the node's context
* :class:`Workspace`  a model that becomes any participant's, writing only the experts that differ
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor, nn

from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.sync import APPROXIMATE, NOTHING, Delta, Digests, frozen_digest
from fluxlib.federation.protocol.wire import Form, WireError
from fluxlib.methods.base import ExpertKey
from fluxlib.moe import find


class ResyncNeeded(WireError):
    """A delta does not lead from what a participant holds to what it should hold."""


@dataclass
class Held:
    """The experts a participant holds: those of the base, except ``arrays`` (keys ``"<layer>.<expert>.<name>"``).

    It lives in the participant's Flower context as two records, so every engine carries it between rounds.
    """

    version: int = 0
    digest: str = ""
    arrays: ArrayRecord = field(default_factory=ArrayRecord)

    @classmethod
    def load(cls, state: RecordDict, base_digest: str) -> Held:
        """What ``state`` holds; the base model when it holds nothing."""
        if "held" not in state:
            return cls(0, base_digest, ArrayRecord())
        header = state["held"]
        return cls(int(header["version"]), str(header["digest"]), state["experts"])

    def save(self, state: RecordDict) -> None:
        """Write into ``state``."""
        approximate = [number for key in sorted(self.approximate()) for number in key]
        state["held"] = ConfigRecord({"version": self.version, "digest": self.digest, "approximate": approximate})
        state["experts"] = self.arrays

    def updated(self, delta: Delta, base: Digests) -> Held:
        """What is held after ``delta``.

        Raises:
            ResyncNeeded: ``delta`` starts later than, or ends before, what is held, or the result's digest is wrong.
        """
        if delta.from_version != NOTHING and not (delta.from_version <= self.version <= delta.version):
            raise ResyncNeeded(f"holds version {self.version}, the delta is {delta.from_version} to {delta.version}")
        kept = {} if delta.from_version == NOTHING else dict(self.arrays)
        mixed = delta.num_approximate or any(name.endswith(APPROXIMATE) for name in kept)
        for name in delta.arrays if mixed else ():  # exact and approximate replace each other
            kept.pop(name.removesuffix(APPROXIMATE) if name.endswith(APPROXIMATE) else name + APPROXIMATE, None)
        held = Held(delta.version, delta.digest, wires.make_record({**kept, **delta.arrays}))
        found = base.with_changes(held.expert_digests()).total()
        if found != delta.digest:
            raise ResyncNeeded(f"digest is {found[:12]} after the delta, it should be {delta.digest[:12]}")
        return held

    def experts(self) -> dict[ExpertKey, dict[str, Array]]:
        """The held arrays by expert."""
        grouped: dict[ExpertKey, dict[str, Array]] = {}
        for name, array in self.arrays.items():
            key, tensor = wires.parse_name(name)
            grouped.setdefault(key, {})[tensor] = array
        return grouped

    def approximate(self) -> frozenset[ExpertKey]:
        """Experts that are held only approximately."""
        return frozenset(wires.parse_name(name)[0] for name in self.arrays if name.endswith(APPROXIMATE))

    def expert_digests(self) -> dict[ExpertKey, bytes]:
        """Digest of each expert that differs from the base."""
        return {key: wires.digest(arrays) for key, arrays in self.experts().items()}


class Workspace:
    """A model in memory that stands for whichever participant is at work.

    The base is loaded once. :meth:`load` writes the experts that differ between what the model holds and what the
    participant holds; participants at the same version cost no write at all.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, wire: Form = "float32") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.wire = wire
        self._layers = find.layers(model)
        keys = [(layer.index, expert) for layer in self._layers for expert in range(layer.num_experts)]
        self.base = Digests({key: wires.tensors_digest(self._tensors(key)) for key in keys})
        self.base_digest = self.base.total()
        self.frozen_digest = frozen_digest(model)
        self._base_tensors: dict[ExpertKey, dict[str, Tensor]] = {}
        self._loaded: dict[ExpertKey, bytes] = {}
        self._digest = self.base_digest

    def load(self, held: Held) -> int:
        """Make the model that of ``held``; number of experts that had to be written."""
        if held.digest == self._digest:
            return 0
        wanted = held.experts()
        digests = {key: wires.digest(arrays) for key, arrays in wanted.items()}
        written = 0
        self._digest = ""  # stays so if writing fails half-way
        for key in self._loaded.keys() | digests.keys():
            target = digests.get(key, self.base.parts[key])
            if self._loaded.get(key, self.base.parts[key]) != target:
                self._write(key, wanted.get(key))
                self._loaded[key] = target
                written += 1
        self._digest = held.digest
        return written

    def _write(self, key: ExpertKey, arrays: Mapping[str, Array] | None) -> None:
        experts = self._layers[key[0]].experts
        if key not in self._base_tensors:
            self._base_tensors[key] = {name: tensor.clone() for name, tensor in self._tensors(key).items()}
        base = self._base_tensors[key]
        tensors = base if arrays is None else dict(self._decode(base, name, array) for name, array in arrays.items())
        find.write_expert(experts, key[1], tensors)

    def _decode(self, base: Mapping[str, Tensor], name: str, array: Array) -> tuple[str, Tensor]:
        plain = name.removesuffix(APPROXIMATE)
        if plain not in base:
            raise WireError(f"an expert has no tensor {plain!r}, it has {', '.join(base)}")
        form = self.wire if plain == name else "int4"
        tensor = wires.decode(array, form, base[plain].shape)
        return plain, tensor if form == "float32" else base[plain].float() + tensor.float().to(base[plain].device)

    def _tensors(self, key: ExpertKey) -> dict[str, Tensor]:
        return find.expert_tensors(self._layers[key[0]].experts, key[1])
