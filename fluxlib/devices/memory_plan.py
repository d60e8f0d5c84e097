"""The planner's answer: bytes by kind at the moment of the peak, as a table or as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fluxlib.devices.census import LayerCensus


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
    batch: int
    tokens: int
    bits: int
    dtype: str
    checkpointing: bool
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
    memory_bytes: int | None = None
    usable_bytes: int | None = None
    """``memory_bytes`` without the reserve."""
    layers: tuple[LayerCensus, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether both peaks stay within the usable memory; None without one."""
        return None if self.usable_bytes is None else max(self.peak_bytes, self.profile_bytes) <= self.usable_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self) | {"fits": self.fits}

    def table(self) -> str:
        """The plan as text: what is planned, layers by kind, and where the bytes go."""
        return _table(self)


def _table(plan: MemoryPlan) -> str:
    def gib(num_bytes: int) -> str:
        return f"{num_bytes / 2**30:9.3f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:9.3f} MiB"

    lines = [
        f"{plan.model or 'model'}: {plan.method}, {plan.dtype}, {plan.batch} x {plan.tokens} tokens a step"
        f"{', checkpointing' if plan.checkpointing else ''}",
        f"experts: {plan.num_experts} in {sum(layer.num_experts > 0 for layer in plan.layers)} layers;"
        f" tuned (B_tune) {plan.num_tuned}, merged (B_non) {plan.num_merged}, on the device {plan.num_resident}",
        "",
        *_layer_lines(plan),
        "",
    ]
    for row in (row for row in plan.rows if row.num_bytes >= 1024):
        count = f"{row.parameters / 1e6:12.2f} M parameters" if row.parameters else ""
        lines.append(f"{row.kind:<22}{gib(row.num_bytes)}  {row.where:<7}{count}".rstrip())
    lines.append(f"{'peak of a step':<22}{gib(plan.peak_bytes)}  device")
    if plan.profile_bytes:
        lines.append(f"{f'{plan.bits}-bit profile':<22}{gib(plan.profile_bytes)}  device (after the step)")
    if plan.usable_bytes is not None:
        verdict = "fits" if plan.fits else "does NOT fit"
        lines.append(f"{'usable':<22}{gib(plan.usable_bytes)}  of {gib(plan.memory_bytes or 0).strip()}: {verdict}")
    return "\n".join(lines)


def _layer_lines(plan: MemoryPlan) -> list[str]:
    """Layers of the same make together: how many, and their parameters by kind."""
    same: dict[tuple[Any, ...], list[int]] = {}
    for layer in plan.layers:
        same.setdefault((layer.num_experts, layer.top_k, tuple(layer.parameters.items())), []).append(layer.index)
    lines = []
    for (num_experts, top_k, parameters), indices in same.items():
        what = f"top-{top_k} of {num_experts} experts" if num_experts else "dense"
        parts = ", ".join(f"{kind} {count / 1e6:.2f} M" for kind, count in parameters)
        lines.append(f"{len(indices)} layer{'s' if len(indices) > 1 else ''}, {what}: {parts}")
    return lines
