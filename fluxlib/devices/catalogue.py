"""Devices, links and fleets that participants may stand for; every number with its source.

Peaks are what the maker states, per second and for dense arithmetic. How much of a peak is achieved is a separate
field, so that the two are not confused. Where a maker states none, the number follows from unit counts and clock,
and the source says so.

Compared on 2026-11-20 with independent listings: the L20's memory, bandwidth, 368 tensor cores and 2.52 GHz
(topcpu.net, technical.city), the RTX 4090's 1008 GB/s and 165.15 TFLOPS (waredb.com). The makers' own sheets named
below, and the other devices, could not be looked up again there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GB = 10**9
GIB = 2**30
TERA = 10**12

PCIE4_X16 = 32 * GB
"""Bytes per second and direction: 16 lanes of 16 GT/s, 128b/130b coding (PCI-SIG, PCI Express 4.0)."""


@dataclass(frozen=True)
class Device:
    """One kind of participant.

    ``bus_*`` is the way to where experts wait that do not fit: host memory over PCIe for a discrete GPU, the SSD
    where processor and GPU share one memory (``unified``). ``host_*`` is that place itself; an optimizer whose
    state lives there streams it at ``host_bytes_per_s``.
    """

    name: str
    title: str
    memory_bytes: int
    unified: bool
    peak_flops: float
    """Dense 16-bit matrix arithmetic with 32-bit accumulation (32-bit where the device has nothing faster)."""
    memory_bytes_per_s: float
    bus_bytes_per_s: float
    host_bytes_per_s: float
    host_memory_bytes: int
    compute_frac: float = 0.4
    """Achieved share of ``peak_flops`` when fine-tuning with batches of a few thousand tokens."""
    bandwidth_frac: float = 0.8
    """Achieved share of the memory, bus and host bandwidths (large contiguous copies)."""
    sources: dict[str, str] = field(default_factory=dict, hash=False, compare=False)

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


@dataclass(frozen=True)
class Link:
    """A participant's connection to the server; ``latency_s`` is charged once per message."""

    name: str
    title: str
    up_bytes_per_s: float
    down_bytes_per_s: float
    latency_s: float
    source: str = ""


_FRACTIONS = (
    "compute_frac 0.4: model FLOPs utilisation of 0.3 to 0.5 is what public 16-bit fine-tuning reports; "
    "bandwidth_frac 0.8: STREAM-like copies reach 75 to 90 % of the stated bandwidth. Both are assumptions."
)
_ADA_AND_AMPERE = "128 FLOPs per tensor core and clock (16-bit input, 32-bit accumulation, dense)"

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="l20",
            title="NVIDIA L20 48 GB",
            memory_bytes=48 * GIB,
            unified=False,
            peak_flops=119.5 * TERA,
            memory_bytes_per_s=864 * GB,
            bus_bytes_per_s=PCIE4_X16,
            host_bytes_per_s=204.8 * GB,
            host_memory_bytes=512 * GIB,
            sources={
                "memory": "NVIDIA L20 product brief: 48 GB GDDR6, 384 bit, 864 GB/s, PCIe Gen4 x16",
                "peak_flops": f"NVIDIA L20 product brief, BF16 dense; 368 cores x 2.52 GHz x {_ADA_AND_AMPERE} = 118.7",
                "host": "assumed server: 8 channels of DDR4-3200 (8 x 25.6 GB/s), 512 GiB",
                "fractions": _FRACTIONS,
            },
        ),
        Device(
            name="rtx-4090",
            title="NVIDIA GeForce RTX 4090 24 GB",
            memory_bytes=24 * GIB,
            unified=False,
            peak_flops=165.2 * TERA,
            memory_bytes_per_s=1008 * GB,
            bus_bytes_per_s=PCIE4_X16,
            host_bytes_per_s=89.6 * GB,
            host_memory_bytes=128 * GIB,
            sources={
                "memory": "NVIDIA Ada GPU architecture whitepaper, appendix A: 24 GB GDDR6X, 1008 GB/s, PCIe Gen4 x16",
                "peak_flops": "the same: FP16/BF16 tensor with FP32 accumulate, dense, 165.2 TFLOPS",
                "host": "assumed desktop: 2 channels of DDR5-5600 (2 x 44.8 GB/s), 128 GiB",
                "fractions": _FRACTIONS,
            },
        ),
        Device(
            name="rtx-3060",
            title="NVIDIA GeForce RTX 3060 12 GB",
            memory_bytes=12 * GIB,
            unified=False,
            peak_flops=25.5 * TERA,
            memory_bytes_per_s=360 * GB,
            bus_bytes_per_s=PCIE4_X16,
            host_bytes_per_s=51.2 * GB,
            host_memory_bytes=64 * GIB,
            sources={
                "memory": "NVIDIA GeForce RTX 3060 specification: 12 GB GDDR6, 192 bit at 15 Gb/s, PCIe 4.0 x16",
                "peak_flops": f"112 tensor cores x 1.777 GHz x {_ADA_AND_AMPERE}",
                "host": "assumed desktop: 2 channels of DDR4-3200 (2 x 25.6 GB/s), 64 GiB",
                "fractions": _FRACTIONS,
            },
        ),
        Device(
            name="jetson-agx-orin",
            title="NVIDIA Jetson AGX Orin 64 GB",
            memory_bytes=64 * GIB,
            unified=True,
            peak_flops=42.5 * TERA,
            memory_bytes_per_s=204.8 * GB,
            bus_bytes_per_s=7 * GB,
            host_bytes_per_s=7 * GB,
            host_memory_bytes=1024 * GIB,
            sources={
                "memory": "NVIDIA Jetson AGX Orin technical brief: 64 GB LPDDR5, 256 bit, 204.8 GB/s, shared",
                "peak_flops": "the same: 170 sparse INT8 TOPS of the GPU = 85 dense INT8 = 42.5 dense FP16",
                "bus": "assumed NVMe SSD on M.2 PCIe Gen4 x4: 7 GB/s sequential, 1 TiB",
                "fractions": _FRACTIONS,
            },
        ),
        Device(
            name="macbook-m1-max",
            title="Apple MacBook Pro, M1 Max, 64 GB",
            memory_bytes=64 * GIB,
            unified=True,
            peak_flops=10.4 * TERA,
            memory_bytes_per_s=400 * GB,
            bus_bytes_per_s=7.4 * GB,
            host_bytes_per_s=7.4 * GB,
            host_memory_bytes=1024 * GIB,
            sources={
                "memory": "Apple newsroom, 18 October 2021: up to 64 GB unified memory, 400 GB/s",
                "peak_flops": "the same: 32-core GPU, 10.4 teraflops (FP32; FP16 is not faster on this GPU)",
                "bus": "the same: SSD up to 7.4 GB/s, 1 TiB",
                "fractions": _FRACTIONS,
            },
        ),
        Device(
            name="cpu-laptop",
            title="Laptop without a GPU (8 cores, 32 GB)",
            memory_bytes=32 * GIB,
            unified=True,
            peak_flops=0.845 * TERA,
            memory_bytes_per_s=89.6 * GB,
            bus_bytes_per_s=5 * GB,
            host_bytes_per_s=5 * GB,
            host_memory_bytes=512 * GIB,
            sources={
                "memory": "2 channels of DDR5-5600 (2 x 44.8 GB/s), 32 GB, as in laptops with an AMD Ryzen 7 7840U",
                "peak_flops": "8 cores x 3.3 GHz base clock x 32 FP32 FLOPs per clock (two 256-bit FMA units)",
                "bus": "assumed NVMe SSD on PCIe Gen4 x4: 5 GB/s sequential, 512 GiB",
                "fractions": _FRACTIONS,
            },
        ),
    )
}

LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link("1gbps", "1 Gb/s", 1e9 / 8, 1e9 / 8, 0.001, "Gigabit Ethernet line rate, both directions; 1 ms on site"),
        Link("100mbps", "100 Mb/s", 1e8 / 8, 1e8 / 8, 0.010, "Fast Ethernet or a fibre contract; 10 ms, assumed"),
        Link(
            "lte",
            "LTE",
            10e6 / 8,
            30e6 / 8,
            0.050,
            "10 Mb/s up, 30 Mb/s down, 50 ms: of the order of national medians in public speed tests; category 4 "
            "(3GPP TS 36.306) allows 50 and 150. An assumption.",
        ),
    )
}

FLEETS: dict[str, tuple[str, ...]] = {
    "paper": ("l20",),
    "mixed": ("l20", "rtx-4090", "rtx-3060", "jetson-agx-orin", "macbook-m1-max"),
    "weak": ("rtx-3060", "jetson-agx-orin", "macbook-m1-max", "cpu-laptop"),
}
"""Names of devices; participants take them in turn."""

SERVER = DEVICES["l20"]
"""The server's machine. Its network is taken to be wide enough for all participants at once."""


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
