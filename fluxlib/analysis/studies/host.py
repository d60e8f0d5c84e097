"""The device clock held against this machine: predicted beside measured phases of a mini model.

The machine's two rates are measured as the catalogue states them for others: a large product, a large copy. Everything
else is the clock as it stands, 16-bit weights included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from fluxlib.analysis.studies import overhead
from fluxlib.analysis.studies.bench import Row
from fluxlib.analysis.studies.merging import Case
from fluxlib.devices import catalogue, clock
from fluxlib.methods.base import Work
from fluxlib.moe import find

PHASES = {"train": ("train",), "profile": ("quantize", "profile"), "merge": ("merge",), "probe": ("probe",)}
"""Measured block: phases of the clock that it consists of."""
STEPS, PROBES, PROBED_SAMPLES = 4, 8, 8


def host(size: int = 768, repeats: int = 5) -> catalogue.Device:
    """This machine on one thread: arithmetic of a 32-bit product, bandwidth of a copy that no cache holds."""
    left = torch.ones(size, size)
    block = torch.ones(2**24)
    product_s = _fastest(lambda: left @ left, repeats)
    copy_s = _fastest(lambda: block.clone(), repeats)
    bandwidth = 2 * block.numel() * block.element_size() / copy_s
    return catalogue.Device(
        name="host",
        title="this machine, one thread",
        memory_bytes=2**40,
        unified=True,
        peak_flops=2 * size**3 / product_s,
        memory_bytes_per_s=bandwidth,
        bus_bytes_per_s=bandwidth,
        host_bytes_per_s=bandwidth,
        host_memory_bytes=2**40,
        compute_frac=1.0,
        bandwidth_frac=1.0,
        sources={"all": "measured here"},
    )


def check(cases: Iterable[Case], repeats: int, device: catalogue.Device) -> Iterator[Row]:
    """Rows ``clock_check``: seconds of each block, ``<block>, predicted`` and ``<block>, measured`` (median)."""
    for case in cases:
        rows = list(overhead.measured([case], repeats, STEPS, PROBES))
        shapes = clock.shapes_of(case.bench.model_name, case.bench.model)  # type: ignore[arg-type]
        predicted = clock.phase_seconds(_work(case), shapes, device, catalogue.LINKS["1gbps"])
        for block, phases in PHASES.items():
            found = [r["value"] for r in rows if r["study"] == "phase_wall_s" and r["setting"] == block]
            seconds = sum(predicted[phase] for phase in phases)
            yield case.bench.row("clock_check", f"{block}, measured", float(np.median(found)), unit="s")
            yield case.bench.row("clock_check", f"{block}, predicted", seconds, unit="s")


def _work(case: Case) -> Work:
    """The account of what :func:`fluxlib.analysis.studies.overhead.measured` does."""
    num_experts, num_tuned = case.bench.num_experts, int(case.tuned.sum())
    batch, probed = case.data[0], case.data[0]["attention_mask"][:PROBED_SAMPLES]
    profiled = case.data[:2]
    passes = 1 + 2 * PROBES * (len(find.layers(case.bench.model)) + 1) / (2 * len(find.layers(case.bench.model)))
    return Work(
        num_experts=num_experts, num_tuned=num_tuned, num_frozen=case.num_merged,
        num_merge_sources=num_experts - num_tuned, train_steps=STEPS, train_samples=STEPS * len(batch["input_ids"]),
        train_tokens=STEPS * int(batch["attention_mask"].sum()),
        profile_samples=sum(len(b["input_ids"]) for b in profiled), profile_bits=4, num_quantized=num_experts,
        profile_tokens=sum(int(b["attention_mask"].sum()) for b in profiled),
        probe_samples=round(passes * len(probed)), probe_tokens=round(passes * int(probed.sum())),
    )  # fmt: skip


def _fastest(work: Callable[[], object], repeats: int) -> float:
    """Shortest processor time of several calls, after one to warm up."""
    work()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return max(min(found), 1e-9)
