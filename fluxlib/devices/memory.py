"""The memory planner: what a method needs, and what fits on a device, from a configuration alone.

No weight is read or allocated: parameters are counted on the meta device, and what a step keeps besides them comes
from a dry run of it there (:mod:`fluxlib.devices.census`, :mod:`fluxlib.devices.dry_run`).

- :func:`plan_memory` -- the peak of a method with given numbers of experts, or the numbers that fit into a memory,
- :class:`MemoryPlan` -- the result: rows by kind, as a table or as JSON,
- :func:`plan` -- the same from a model's name and sizes in words, for the command line.

Paper: participants hold ``B_tune`` tuned and ``B_non`` merged experts, "by resources". Deviation: the paper gives no
rule; here both follow from bytes, in a fixed ratio.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from fluxlib import models
from fluxlib.devices.memory_plan import MemoryPlan
from fluxlib.devices.planner import Planner
from fluxlib.moe.packing import BITS

METHODS = ("flux", "fmd", "fmq", "fmes")
KERNELS = ("auto", "grouped", "slots")
TUNED_DTYPE = torch.float32
"""Type of tuned weights and of their gradients, unless one is given."""
STATE_BYTES = {"adamw": 8, "sgd": 0}
"""Optimizer state per tuned parameter."""
RESERVE_FRAC = 0.1
"""Share of a device's memory that is left to runtime, fragmentation and workspaces."""
MAX_COUNT, MAX_SQUARES = 2**20, 2**50
"""Sequences and tokens of a step, and its pairs of tokens, at most: beyond them sizes no longer fit into 64 bits."""
UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)}}
UNITS |= {f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)}


def plan_memory(
    config: Any,
    method: str = "flux",
    memory_bytes: int | None = None,
    num_tuned: int | None = None,
    num_merged: int | None = None,
    batch: int = 16,
    tokens: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    tuned_dtype: torch.dtype = TUNED_DTYPE,
    optimizer: str = "adamw",
    bits: int = 4,
    merged_per_tuned: float = 1.0,
    checkpointing: bool = False,
    kernel: str = "auto",
    reserve_frac: float = RESERVE_FRAC,
    name: str = "",
) -> MemoryPlan:
    """Plan one participant's memory, from a configuration alone.

    With ``num_tuned`` (and ``num_merged`` for ``flux``) given: what they need. With ``memory_bytes`` alone: the most
    tuned experts that fit, merged ones in proportion. With neither: a quarter of all experts tuned and merged.

    Args:
        config: of any MoE model of transformers, or of the project's two.
        method: ``flux`` (tuned and merged slots; a quantised profile model after the step), ``fmd`` (all experts
            tuned, those that do not fit offloaded), ``fmq`` (all experts at rest in ``bits``, tuned ones with
            gradient and state), ``fmes`` (tuned experts, the others dropped).
        memory_bytes: of the device, reserve included.
        batch: sequences per step.
        tokens: tokens per sequence, padding included.
        dtype: type of frozen weights and activations.
        tuned_dtype: type of tuned weights and gradients (``fmd`` with offloading too).
        bits: of the profile model (``flux``) or of the experts (``fmq``).
        merged_per_tuned: B_non / B_tune when both follow from the memory.
        checkpointing: run layers again in the backward pass instead of keeping what they made.
        kernel: how slots are computed: ``grouped``, ``slots``, or ``auto``, as :class:`fluxlib.moe.dispatch.StackedSlots`
            does on CUDA (``slots`` is its way on a CPU).
        reserve_frac: share of ``memory_bytes`` that is not planned with.
        name: of the model, for the table.

    Raises:
        ValueError: an argument outside what is allowed, a model that generates no text, numbers of experts that the
            model does not have, or a memory that does not hold the smallest plan; the message says what is needed.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if optimizer not in STATE_BYTES:
        raise ValueError(f"optimizer: expected one of {', '.join(STATE_BYTES)}, got {optimizer!r}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    for argument, count in (("batch", batch), ("tokens", tokens)):
        if not 1 <= count <= MAX_COUNT:
            raise ValueError(f"{argument}: expected 1 to {MAX_COUNT}, got {count}")
    if batch * tokens**2 > MAX_SQUARES:
        raise ValueError(
            f"batch, tokens: expected batch times squared tokens up to {MAX_SQUARES}, got {batch}, {tokens}"
        )
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {', '.join(map(str, BITS))}, got {bits}")
    if not 0 <= merged_per_tuned < float("inf"):
        raise ValueError(f"merged_per_tuned: expected a finite number that is not negative, got {merged_per_tuned}")
    if not 0 <= reserve_frac < 1:
        raise ValueError(f"reserve_frac: expected 0 <= reserve_frac < 1, got {reserve_frac}")
    if memory_bytes is not None and memory_bytes < 1:
        raise ValueError(f"memory: expected at least 1 byte, got {memory_bytes}")
    planner = Planner(
        config, method, batch, tokens, dtype, tuned_dtype, STATE_BYTES[optimizer], bits, checkpointing, kernel, name
    )
    usable = None if memory_bytes is None else int(memory_bytes * (1 - reserve_frac))
    if usable is not None and num_tuned is None:
        num_tuned, num_merged = planner.largest(usable, merged_per_tuned)
    elif num_tuned is None:
        num_tuned = planner.census.num_experts if method in ("fmd", "fmq") else planner.census.num_experts // 4
    planner.check_tuned(num_tuned)
    if num_merged is None:
        num_merged = planner.proportional(num_tuned, merged_per_tuned)
    return planner.plan(num_tuned, num_merged, memory_bytes, usable)


def plan(model: str, memory: str | int | None = None, method: str = "flux", **options: Any) -> MemoryPlan:
    """:func:`plan_memory` for a model's name, folder or hub id and a memory in words (``"24GiB"``)."""
    size = parse_bytes(memory) if isinstance(memory, str) else memory
    return plan_memory(models.config(model), method, size, name=str(model), **options)


def parse_bytes(text: str) -> int:
    """``"24GiB"``, ``"24 GB"``, ``"512MiB"`` or ``"1000000"`` in bytes.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise ValueError(f"memory: expected a size such as 24GiB, 24GB or 512MiB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2].lower()])
