"""Devices, links and fleets that participants may stand for, read from ``catalogue.yaml``.

Every number there has its source beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ByteSize, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

Bytes = Annotated[ByteSize | float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Device:
    """One kind of participant; rates are per second and what the maker states.

    ``bus_*`` is the way to where experts wait that do not fit, ``host_*`` that place: host memory over PCIe for a
    discrete GPU, the SSD where processor and GPU share one memory (``unified``).
    """

    name: str
    title: str
    unified: bool
    memory_bytes: Bytes
    peak_flops: Annotated[float, Field(gt=0)]
    """Dense 16-bit matrix arithmetic with 32-bit accumulation (32-bit where the device has nothing faster)."""
    memory_bytes_per_s: Bytes
    bus_bytes_per_s: Bytes
    host_bytes_per_s: Bytes
    compute_frac: Fraction
    """Achieved share of ``peak_flops`` when fine-tuning with batches of a few thousand tokens."""
    bandwidth_frac: Fraction
    """Achieved share of the memory, bus and host bandwidths (large contiguous copies)."""
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)

    @property
    def flops_per_s(self) -> float:
        """Achieved arithmetic."""
        return self.peak_flops * self.compute_frac

    @property
    def memory_rate(self) -> float:
        """Achieved memory bandwidth, bytes/s."""
        return self.memory_bytes_per_s * self.bandwidth_frac

    @property
    def bus_rate(self) -> float:
        """Achieved bandwidth to where offloaded experts wait, bytes/s per direction."""
        return self.bus_bytes_per_s * self.bandwidth_frac

    @property
    def host_rate(self) -> float:
        """Achieved bandwidth of the place where offloaded experts wait, bytes/s."""
        return self.host_bytes_per_s * self.bandwidth_frac


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Link:
    """A participant's connection to the server; ``latency_s`` is charged once per message."""

    name: str
    title: str
    up_bytes_per_s: Bytes
    down_bytes_per_s: Bytes
    latency_s: Annotated[float, Field(ge=0)]
    source: str = ""


_CONTENT: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
_NAMED = {part: {name: {"name": name, **of} for name, of in _CONTENT[part].items()} for part in ("devices", "links")}
DEVICES = TypeAdapter(dict[str, Device]).validate_python(_NAMED["devices"])
LINKS = TypeAdapter(dict[str, Link]).validate_python(_NAMED["links"])
FLEETS: dict[str, tuple[str, ...]] = {name: tuple(devices) for name, devices in _CONTENT["fleets"].items()}
SERVER = DEVICES[_CONTENT["server"]]


def fleet(name: str, num_participants: int) -> list[Device]:
    """Devices of the participants of the fleet ``name`` (a device's name is one too); ValueError: it is unknown."""
    names = FLEETS.get(name) or ((name,) if name in DEVICES else None)
    if names is None:
        raise ValueError(f"clock.fleet is {name!r}, allowed are {', '.join((*FLEETS, *DEVICES))}")
    return [DEVICES[names[i % len(names)]] for i in range(num_participants)]


def link(name: str) -> Link:
    """The link called ``name``, or one of a rate such as ``2.5mbps``, without latency; else ValueError."""
    if name in LINKS:
        return LINKS[name]
    if rate := re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bps", name):
        per_s = float(rate[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[rate[2]] / 8
        if per_s:
            return Link(name=name, title=name, up_bytes_per_s=per_s, down_bytes_per_s=per_s, latency_s=0.0)
    raise ValueError(f"clock.link is {name!r}, allowed are {', '.join(LINKS)}, or a rate such as 2.5mbps")
