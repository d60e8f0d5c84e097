"""The memory planner: what a method needs, and what fits on a device, from a configuration alone.

No weight is read or allocated: parameters are counted on the meta device, and what a step keeps besides them comes
from a dry run of it there (:mod:`fluxlib.devices.dry_run`).

Paper: participants hold ``B_tune`` tuned and ``B_non`` merged experts, "by resources". Deviation: the paper gives no
rule; here both follow from bytes, as many merged experts as tuned ones.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from fluxlib import models
from fluxlib.config import RunConfig
from fluxlib.devices import dry_run
from fluxlib.devices.dry_run import MOMENT_BYTES, TUNED_DTYPE, Slots, Step
from fluxlib.models.parameters import KINDS, count_parameters
from fluxlib.moe import find

METHODS = ("flux", "flux_plus", "fmd", "fmq", "fmes")
RESERVE_FRAC = 0.1
"""Share of a device's memory that is left to runtime, fragmentation and workspaces."""
MIN_RESIDENT = 2
"""Offloaded experts on the device: the one that computes and the one that is copied ahead."""


@dataclass(frozen=True)
class Row:
    """Bytes of one kind of memory at the moment of the peak."""

    kind: str
    num_bytes: int
    parameters: int = 0
    """How many parameters that is; 0 for what is no parameter."""
    where: str = "device"
    """``device``, or ``host`` for what waits in host memory."""


@dataclass(frozen=True)
class MemoryPlan:
    """What one participant needs to train with one method.

    ``num_tuned`` and ``num_merged`` count experts over all layers: B_tune and B_non of the paper. For ``fmd`` all
    experts are tuned and ``num_resident`` of them lie on the device with their training state.
    """

    model: str
    method: str
    step: Step
    num_experts: int
    num_tuned: int
    num_merged: int
    num_resident: int
    rows: tuple[Row, ...]
    peak_bytes: int
    """Device memory of a training step."""
    profile_bytes: int
    """Device memory of a profiling pass, after the step; 0 where the method does not profile."""
    host_bytes: int
    memory_bytes: int | None
    usable_bytes: int | None
    """``memory_bytes`` without the reserve."""

    @property
    def fits(self) -> bool | None:
        """Whether both peaks stay within the usable memory; None without one."""
        return None if self.usable_bytes is None else max(self.peak_bytes, self.profile_bytes) <= self.usable_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = asdict(self)
        step = found.pop("step") | {"dtype": str(self.step.dtype).removeprefix("torch.")}
        return found | step | {"fits": self.fits}

    def table(self) -> str:
        """The plan as text: what is planned, and where the bytes go."""
        step = self.step
        lines = [
            f"{self.model or 'model'}: {self.method}, {str(step.dtype).removeprefix('torch.')},"
            f" {step.batch} x {step.tokens} tokens a step",
            f"experts: {self.num_experts}; tuned (B_tune) {self.num_tuned}, merged (B_non) {self.num_merged},"
            f" on the device {self.num_resident}",
            "",
        ]
        for row in (row for row in self.rows if row.num_bytes >= 1024):
            number = f"{row.parameters / 1e6:12.2f} M parameters" if row.parameters else ""
            lines.append(f"{row.kind:<22}{_gib(row.num_bytes)}  {row.where:<7}{number}".rstrip())
        lines.append(f"{'peak of a step':<22}{_gib(self.peak_bytes)}  device")
        if self.profile_bytes:
            lines.append(f"{f'{step.bits}-bit profile':<22}{_gib(self.profile_bytes)}  device (after the step)")
        if self.usable_bytes is not None:
            verdict = "fits" if self.fits else "does NOT fit"
            whole = _gib(self.memory_bytes or 0).strip()
            lines.append(f"{'usable':<22}{_gib(self.usable_bytes)}  of {whole}: {verdict}")
        return "\n".join(lines)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:9.3f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:9.3f} MiB"


def plan_memory(
    config: Any,
    method: str = "flux",
    memory_bytes: int | None = None,
    num_tuned: int | None = None,
    num_merged: int | None = None,
    step: Step = Step(),  # noqa: B008
) -> MemoryPlan:
    """Plan one participant's memory, from a configuration alone.

    With ``num_tuned`` (and ``num_merged`` for ``flux``) given: what they need. With ``memory_bytes`` alone: the most
    tuned experts that fit, with as many merged ones. With neither: a quarter of all experts tuned and merged.

    Args:
        config: of any MoE model of transformers, or of the project's two.
        method: ``flux_plus`` needs what ``flux`` does: what it watches takes the place of tuned experts.
        memory_bytes: of the device, reserve included.

    Raises:
        ValueError: an argument outside what is allowed, a model that generates no text, numbers of experts that the
            model does not have, or a memory that does not hold the smallest plan; the message says what is needed.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if memory_bytes is not None and memory_bytes < 1:
        raise ValueError(f"memory: expected at least 1 byte, got {memory_bytes}")
    planner = _Planner(config, method, step)
    usable = None if memory_bytes is None else _usable(memory_bytes)
    if num_tuned is None and usable is not None:
        num_tuned = planner.largest(usable)
    elif num_tuned is None:
        num_tuned = planner.total if method in ("fmd", "fmq") else planner.total // 4
    if not planner.smallest <= num_tuned <= planner.total:
        raise ValueError(f"num_tuned: expected {planner.smallest}..{planner.total} for {method}, got {num_tuned}")
    left = planner.total - num_tuned
    if num_merged is None:
        num_merged = planner.num_merged(num_tuned)
    elif not 0 <= num_merged <= left:
        raise ValueError(f"num_merged: expected 0..{left} beside {num_tuned} tuned, got {num_merged}")
    elif planner.method == "flux" and num_merged < (least := sum(rest > 0 for rest in planner.left(num_tuned))):
        raise ValueError(
            f"num_merged: expected at least {least}, one for each layer with experts that are not tuned,"
            f" got {num_merged}"
        )
    return replace(planner.plan(num_tuned, num_merged, memory_bytes, usable), method=method)


def plan(model: str, memory: str | int | None = None, method: str = "flux", **step: Any) -> MemoryPlan:
    """:func:`plan_memory` for a model's name, folder or hub id, a memory in words (``"24GiB"``) and a step's fields."""
    try:
        num_bytes = None if memory is None else int(TypeAdapter(ByteSize).validate_python(memory))
    except ValidationError:
        raise ValueError(f"memory: expected a size such as 24GiB, 24GB or 512MiB, got {memory!r}") from None
    return replace(plan_memory(models.config(model), method, num_bytes, step=Step(**step)), model=str(model))


@lru_cache(maxsize=64)
def share_that_fits(run: RunConfig, memory_bytes: int) -> tuple[float, float]:
    """``(B_tune, B_non)`` as shares of all experts: the largest plan of a run's method that fits into a memory.

    At the shapes that the run's device clock has, for its batch and tokens. FMD and FMQ tune everything and offload
    what does not fit: their share is 1 where the rest is there. ValueError: see :func:`plan_memory`.
    """
    model, method, step = _planned(run)
    config = models.config(model)
    if method == "fmq" and plan_memory(config, method, memory_bytes, num_tuned=1, step=step).fits:
        return 1.0, 0.0
    found = plan_memory(config, method, memory_bytes, step=step)
    return found.num_tuned / found.num_experts, found.num_merged / found.num_experts


def fits(run: RunConfig, tuned_frac: float, memory_bytes: int) -> bool:
    """Whether a share of the experts fits, tuned, into a memory: whether :func:`share_that_fits` is as large, but by
    one dry run for all memories."""
    model, method, step = _planned(run)
    try:
        if method in ("fmd", "fmq"):
            return tuned_frac <= share_that_fits(run, memory_bytes)[0]
        planner = _Planner(models.config(model), method, step)
        num_tuned = max(planner.smallest, math.ceil(tuned_frac * planner.total - 1e-9))  # a share may be rounded up
        return planner.peak(num_tuned, planner.num_merged(num_tuned)).total() <= _usable(memory_bytes)
    except ValueError:
        return False


def _usable(memory_bytes: int) -> int:
    return int(memory_bytes * (1 - RESERVE_FRAC))


def _planned(run: RunConfig) -> tuple[str, str, Step]:
    """The model whose shapes a run's clock has, its method, and its step there."""
    tokens = run.clock.tokens_per_sample or run.training.max_tokens
    return run.sized_as, run.method, Step(batch=run.training.batch_size, tokens=tokens, rank=run.adapter.used_rank)


_META_MODELS: dict[tuple[str, torch.dtype], Any] = {}


def _meta_model(config: Any, dtype: torch.dtype) -> Any:
    """One model on the meta device for equal configurations: a map or a dashboard plans one model many times."""
    key = config.to_json_string(use_diff=False), dtype
    if key not in _META_MODELS:
        _META_MODELS[key] = dry_run.meta_model(config, dtype)
    return _META_MODELS[key]


_peak = lru_cache(maxsize=1024)(dry_run.peak)
"""Once for each question; nobody may change the answer."""


class _Planner:
    """One model and one step of one method; numbers of experts in, bytes out."""

    def __init__(self, config: Any, method: str, step: Step) -> None:
        self.method, self.step = "flux" if method == "flux_plus" else method, step
        self.model = _meta_model(config, step.dtype)
        self.parameters = count_parameters(self.model)
        found = find.layers(self.model)
        self.learned = dry_run.learned_parameters(found[0], step.rank)
        self.resident_bytes = self.parameters.per_expert * step.dtype.itemsize
        """An offloaded expert's copy on the device, in the type that it computes in."""
        self.per_layer = [layer.num_experts for layer in found]
        self.total = sum(self.per_layer)
        self.smallest = max(layer.top_k for layer in found) * len(found) if method == "fmes" else 1
        sizes = [size for layer in found for size in (layer.hidden_size, layer.expert_size)]
        fused = step.dtype == torch.bfloat16 and not step.rank and all(size % 8 == 0 for size in sizes)
        self.on_device = replace(step, kernel="grouped" if fused and step.kernel == "auto" else step.kernel)

    def left(self, num_tuned: int) -> list[int]:
        """Experts of each layer that are not tuned."""
        return [total - tuned for total, tuned in zip(self.per_layer, _spread(num_tuned, self.per_layer), strict=True)]

    def num_merged(self, num_tuned: int) -> int:
        """As many as tuned ones: at least one where a layer has others left, never more than those."""
        left = self.left(num_tuned)
        return min(max(num_tuned, sum(rest > 0 for rest in left)), sum(left)) if self.method == "flux" else 0

    def largest(self, usable: int) -> int:
        """The most tuned experts whose peak stays within ``usable`` bytes.

        The peak is nearly a straight line in their number, so a few dry runs close in on the answer. Each further one
        costs at least its state, and its weight beyond that of the merged one that it may replace.
        """
        low, high = self.smallest, self.total
        if self.method == "fmd":
            needed = self._offloaded().total() + MIN_RESIDENT * self.resident_bytes
            if needed > usable and self.peak(high, 0).total() > usable:
                raise self._too_small(usable, needed)
            return high
        bottom, top = (self.peak(n, self.num_merged(n)).total() for n in (low, high))
        if bottom > usable:
            raise self._too_small(usable, bottom)
        if top <= usable:
            return high
        weight_bytes = 0 if self.method == "fmq" else max(0, TUNED_DTYPE.itemsize - self.step.dtype.itemsize)
        cost = self.learned * (MOMENT_BYTES + weight_bytes)
        while high - low > 1 and usable - bottom >= cost:
            guess = low + int((usable - bottom) / (top - bottom) * (high - low))
            middle = min(max(guess, low + 1), high - 1)
            found = self.peak(middle, self.num_merged(middle)).total()
            if found <= usable:
                low, bottom = middle, found
            else:
                high, top = middle, found
        return low

    def plan(self, num_tuned: int, num_merged: int, memory_bytes: int | None, usable: int | None) -> MemoryPlan:
        """The plan for given numbers of experts."""
        num_resident, host, size = num_tuned, 0, self.parameters.per_expert
        by_kind = self.peak(num_tuned, num_merged).copy()
        if self.method == "fmd" and usable is not None and by_kind.total() > usable:
            by_kind = self._offloaded().copy()
            fitting = (usable - by_kind.total()) // self.resident_bytes
            num_resident = min(self.total, max(MIN_RESIDENT, fitting))
            by_kind["tuned"] += num_resident * self.resident_bytes
            state = 0 if self.step.rank else 2 * TUNED_DTYPE.itemsize + MOMENT_BYTES
            host = self.total * size * (state + self.step.dtype.itemsize)
        if self.method in ("flux", "fmes"):
            host = self.parameters.total * self.step.dtype.itemsize
        return MemoryPlan(
            model="",
            method=self.method,
            step=self.step,
            num_experts=self.total,
            num_tuned=num_tuned,
            num_merged=num_merged,
            num_resident=num_resident,
            rows=tuple(self._rows(by_kind, num_resident, num_merged, host)),
            peak_bytes=by_kind.total(),
            profile_bytes=self._profile_bytes() if self.method == "flux" else 0,
            host_bytes=host,
            memory_bytes=memory_bytes,
            usable_bytes=usable,
        )

    def peak(self, num_tuned: int, num_merged: int) -> Counter[str]:
        """Bytes by kind at the peak of a step with so many experts on the device."""
        tuned, left = _spread(num_tuned, self.per_layer), self.left(num_tuned)
        if self.method == "flux":
            slots = [Slots(*numbers) for numbers in zip(tuned, _spread(num_merged, left), left, strict=True)]
        elif self.method == "fmq":
            slots = [Slots(t, rest, rest, bits=self.step.bits) for t, rest in zip(tuned, left, strict=True)]
        else:
            slots = [Slots(number) for number in tuned]
        return _peak(self.model, tuple(slots), self.on_device)

    def _offloaded(self) -> Counter[str]:
        return _peak(self.model, tuple(Slots(n, offloaded=True) for n in self.per_layer), self.on_device)

    def _profile_bytes(self) -> int:
        slots = tuple(Slots(0, n, n, bits=self.step.bits) for n in self.per_layer)
        return _peak(self.model, slots, self.on_device, learns=False).total()

    def _rows(self, by_kind: Counter[str], num_tuned: int, num_merged: int, host: int) -> list[Row]:
        size, rest, rows = self.parameters.per_expert, by_kind["others"], []
        for kind in KINDS:
            number = self.parameters.by_kind.get(kind, 0)
            if number and kind != "routed experts":
                rows.append(Row(kind, number * self.step.dtype.itemsize, number))
                rest -= rows[-1].num_bytes
        frozen = (
            ("merged experts", num_merged)
            if self.method == "flux"
            else (f"experts in {self.step.bits} bit", self.total)
        )
        rows += [
            Row("buffers", rest),
            Row("tuned experts", by_kind["tuned"], num_tuned * size),
            Row(frozen[0], by_kind["frozen"], frozen[1] * size),
            Row("gradients", by_kind["gradients"]),
            Row("optimizer state", by_kind["optimizer"]),
            Row("activations", by_kind["activations"]),
            Row("experts and state" if self.method == "fmd" else "whole model", host, where="host"),
        ]
        return [row for row in rows if row.num_bytes]

    def _too_small(self, usable: int, needed: int) -> ValueError:
        return ValueError(
            f"memory: {usable / 2**30:.2f} GiB usable, but {self.method} needs at least {needed / 2**30:.2f} GiB for"
            f" batches of {self.step.batch} x {self.step.tokens} tokens; take a smaller batch or fewer tokens"
        )


def _spread(count: int, most: list[int]) -> list[int]:
    """``count`` over the layers, as evenly as ``most`` of each allows; the first ones get one more."""
    given = [0] * len(most)
    while count:
        wanting = [i for i, limit in enumerate(most) if given[i] < limit]
        share, more = divmod(count, len(wanting))
        for place, i in enumerate(wanting):
            added = min(share + (place < more), most[i] - given[i])
            given[i] += added
            count -= added
    return given
