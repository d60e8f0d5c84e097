"""What the benchmarks share: the machine, interleaved timings, tables.

Needs torch, transformers and numpy alone, so that it runs on a bare GPU machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

Row = dict[str, Any]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = ["wall"]


def options_of(about: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have, explained by a module's docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny one, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the tables")
    return parser


def use_clock(name: str) -> None:
    """Time with ``wall`` or ``cpu`` (this process's own: for one thread on a busy machine)."""
    _clock[0] = name


def machine(device: torch.device) -> Row:
    """What the numbers were measured on."""
    facts: Row = {
        "host": platform.node(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "clock": _clock[0],
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return facts


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Time of one call."""
    clock = CLOCKS[_clock[0]]
    synchronize(device)
    start = clock()
    work()
    synchronize(device)
    return clock() - start


def interleaved(
    works: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each work, A B C A B C ..., so that a busy moment of the machine hits all of them."""
    for _ in range(warmup):
        for work in works.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return times


def summary(times: Sequence[float], reference: Sequence[float] | None = None) -> Row:
    """Median and best of some timings; the ratio to a reference is the median over rounds that ran side by side."""
    row: Row = {"median_s": statistics.median(times), "best_s": min(times), "repeats": len(times)}
    if reference is not None:
        row["speedup"] = statistics.median(r / t for r, t in zip(reference, times, strict=False))
    return row


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def write(out: Path, name: str, result: Row, text: str) -> None:
    """``<name>.json`` and ``<name>.md`` in a folder; the text also on the terminal."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / f"{name}.md").write_text(text + "\n")
    print(text)
    print(f"\nwritten: {out / name}.json, {out / name}.md")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
