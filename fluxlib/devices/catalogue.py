"""Devices, links and fleets that participants may stand for, read from ``catalogue.yaml``.

Every number there has its source beside it; :func:`read` checks a file of that form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)}}
UNITS |= {f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)}


def parse_bytes(size: Any) -> Any:
    """``"24GiB"``, ``"24 GB"``, ``"512MiB"`` or ``"1000000"`` in bytes; what is no text stays as it is.

    Raises:
        ValueError: a text that is no size.
    """
    if not isinstance(size, str):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size)
    if not match or match[2].lower() not in UNITS:
        raise ValueError(f"memory: expected a size such as 24GiB, 24GB or 512MiB, got {size!r}")
    return int(float(match[1]) * UNITS[match[2].lower()])


Bytes = Annotated[int | float, Field(gt=0), BeforeValidator(parse_bytes)]
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
    host_memory_bytes: Bytes
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


def read(path: Path) -> tuple[dict[str, Device], dict[str, Link], dict[str, tuple[str, ...]], Device]:
    """Devices, links and fleets of a file by name, and the server's device.

    Raises:
        ValueError: a field that is missing, unknown or impossible, a number without a source, or a fleet with an
            unknown device; the message names the file, the entry and the field.
    """
    content = yaml.safe_load(path.read_text())
    named = {part: {name: {"name": name, **of} for name, of in content[part].items()} for part in ("devices", "links")}
    try:
        devices = TypeAdapter(dict[str, Device]).validate_python(named["devices"])
        links = TypeAdapter(dict[str, Link]).validate_python(named["links"])
        fleets = TypeAdapter(dict[str, tuple[str, ...]]).validate_python(content["fleets"])
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ValueError(f"{path}: {wrong}") from None
    for device in devices.values():
        asked = ("memory", "peak_flops", "fractions", "bus" if device.unified else "host")
        if missing := [what for what in asked if what not in device.sources]:
            raise ValueError(f"{path}: {device.name}.sources: lacks {', '.join(missing)}")
    for fleet, names in {**fleets, "server": (content["server"],)}.items():
        if unknown := [name for name in names if name not in devices]:
            raise ValueError(f"{path}: {fleet}: unknown device {unknown[0]!r}; known are {', '.join(devices)}")
    return devices, links, fleets, devices[content["server"]]


DEVICES, LINKS, FLEETS, SERVER = read(Path(__file__).with_suffix(".yaml"))


def fleet(name: str, num_participants: int) -> list[Device]:
    """Devices of ``num_participants`` participants of the fleet ``name`` (a single device's name is a fleet too).

    Raises:
        ValueError: unknown name, with the known ones.
    """
    names = FLEETS.get(name) or ((name,) if name in DEVICES else None)
    if names is None:
        raise ValueError(f"unknown fleet {name!r}; allowed are {', '.join((*FLEETS, *DEVICES))}")
    return [DEVICES[names[i % len(names)]] for i in range(num_participants)]


def link(name: str) -> Link:
    """The link called ``name``.

    Raises:
        ValueError: unknown name, with the known ones.
    """
    if name not in LINKS:
        raise ValueError(f"unknown link {name!r}; allowed are {', '.join(LINKS)}")
    return LINKS[name]
