"""Numbers of experts in, plans out, for one model and one setting; the public door is :mod:`fluxlib.devices.memory`."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import torch

from fluxlib.devices import dry_run
from fluxlib.devices.census import KINDS, census_of
from fluxlib.devices.memory_plan import MemoryPlan, Row
from fluxlib.devices.stand_ins import Slots
from fluxlib.moe import find

MIN_RESIDENT = 2
"""Offloaded experts on the device: the one that computes and the one that is copied ahead."""


class Planner:
    """One model and one setting; numbers of experts in, plans out."""

    def __init__(
        self,
        config: Any,
        method: str,
        batch: int,
        tokens: int,
        dtype: torch.dtype,
        tuned_dtype: torch.dtype,
        state_bytes: int,
        bits: int,
        checkpointing: bool,
        kernel: str,
        name: str,
    ) -> None:
        self.method, self.batch, self.tokens, self.bits, self.name = method, batch, tokens, bits, name
        self.dtype, self.tuned_dtype, self.state_bytes = dtype, tuned_dtype, state_bytes
        self.checkpointing, self.kernel = checkpointing, kernel
        self.model = dry_run.meta_model(config, dtype)
        self.census = census_of(self.model)
        sizes = [size for layer in find.layers(self.model) for size in (layer.hidden_size, layer.expert_size)]
        fused = dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)
        if kernel == "grouped" and not fused:
            raise ValueError(f"kernel: 'grouped' needs bfloat16 and widths of a multiple of 8, got {dtype}, {sizes}")
        if kernel == "auto":
            self.kernel = "grouped" if fused else "slots"
        self.num_per_layer = [layer.num_experts for layer in find.layers(self.model)]
        self.top_k = max(layer.top_k for layer in self.census.layers)
        self.peak = lru_cache(maxsize=None)(self._peak)

    @property
    def resident_bytes(self) -> int:
        """An offloaded expert's copy on the device."""
        return self.census.expert_parameters * self.tuned_dtype.itemsize

    def proportional(self, num_tuned: int, merged_per_tuned: float) -> int:
        """Merged experts beside ``num_tuned``: at least one where a layer has others left, never more than those."""
        if self.method != "flux":
            return 0
        left = [total - tuned for total, tuned in zip(self.num_per_layer, self._spread(num_tuned), strict=True)]
        return min(max(round(num_tuned * merged_per_tuned), sum(n > 0 for n in left)), sum(left))

    def smallest(self) -> int:
        """Fewest tuned experts that the method can run with."""
        return self.top_k * len(self.num_per_layer) if self.method == "fmes" else 1

    def check_tuned(self, num_tuned: int) -> None:
        """Raise ValueError for a number of tuned experts that the model or the method does not have."""
        total = sum(self.num_per_layer)
        if not self.smallest() <= num_tuned <= total:
            raise ValueError(f"num_tuned: expected {self.smallest()}..{total} for {self.method}, got {num_tuned}")

    def largest(self, usable: int, merged_per_tuned: float) -> tuple[int, int]:
        """The most tuned experts whose peak stays within ``usable`` bytes, with their merged ones.

        Each further tuned expert costs at least its state, and its weight beyond that of the merged one that it may
        replace; the peak grows ever faster. So a few dry runs close in on the answer from both sides.
        """

        def pair(num_tuned: int) -> tuple[int, int]:
            return num_tuned, self.proportional(num_tuned, merged_per_tuned)

        low, high = self.smallest(), sum(self.num_per_layer)
        if self.method == "fmd":
            needed = self._offloaded().num_bytes + MIN_RESIDENT * self.resident_bytes
            if needed > usable and self.peak(*pair(high)).num_bytes > usable:
                raise ValueError(_too_small(usable, needed, self))
            return high, 0
        bottom = self.peak(*pair(low)).num_bytes
        if bottom > usable:
            raise ValueError(_too_small(usable, bottom, self))
        weight_bytes = 0 if self.method == "fmq" else max(0, self.tuned_dtype.itemsize - self.dtype.itemsize)
        cost = self.census.expert_parameters * (self.state_bytes + weight_bytes)
        slope = float(max(cost, 1))
        while low < high and usable - bottom >= cost:
            high = min(high, low + max(1, int((usable - bottom) / slope)))
            top = self.peak(*pair(high)).num_bytes
            if top <= usable:
                low, bottom = high, top
                break
            if high - low == 1:
                break
            middle = low + min(max(1, int((usable - bottom) / (top - bottom) * (high - low))), high - low - 1)
            found = self.peak(*pair(middle)).num_bytes
            if found <= usable:
                slope = max(slope, (found - bottom) / (middle - low))
                low, bottom, high = middle, found, high - 1
            else:
                high = middle - 1
        return pair(low)

    def plan(self, num_tuned: int, num_merged: int, memory_bytes: int | None, usable: int | None) -> MemoryPlan:
        """The plan for given numbers of experts."""
        self.check_tuned(num_tuned)
        total = sum(self.num_per_layer)
        if num_tuned + num_merged > total or num_merged < 0:
            raise ValueError(f"num_merged: expected 0..{total - num_tuned} beside {num_tuned} tuned, got {num_merged}")
        left = sum(n > t for n, t in zip(self.num_per_layer, self._spread(num_tuned), strict=True))
        if self.method == "flux" and num_merged < left:
            raise ValueError(
                f"num_merged: expected at least {left}, one for each layer with experts that are not tuned,"
                f" got {num_merged}"
            )
        num_resident, host = num_tuned, 0
        peak = self.peak(num_tuned, num_merged)
        by_kind = Counter(peak.by_kind)
        if self.method == "fmd" and usable is not None and peak.num_bytes > usable:
            peak = self._offloaded()
            num_resident = min(total, max(MIN_RESIDENT, (usable - peak.num_bytes) // self.resident_bytes))
            by_kind = Counter(peak.by_kind) + Counter(tuned=num_resident * self.resident_bytes)
            host = total * self.census.expert_parameters * (2 * self.tuned_dtype.itemsize + self.state_bytes)
        if self.method in ("flux", "fmes"):
            host = self.census.total * self.dtype.itemsize
        return MemoryPlan(
            model=self.name,
            method=self.method,
            batch=self.batch,
            tokens=self.tokens,
            bits=self.bits,
            dtype=str(self.dtype).removeprefix("torch."),
            checkpointing=self.checkpointing,
            num_experts=total,
            num_tuned=num_tuned,
            num_merged=num_merged,
            num_resident=num_resident,
            rows=self._rows(by_kind, num_resident, num_merged, host),
            peak_bytes=sum(by_kind.values()),
            profile_bytes=self._profile_bytes(),
            host_bytes=host,
            memory_bytes=memory_bytes,
            usable_bytes=usable,
            layers=self.census.layers,
        )

    def _peak(self, num_tuned: int, num_merged: int) -> dry_run.Peak:
        left = [n - t for n, t in zip(self.num_per_layer, self._spread(num_tuned), strict=True)]
        if self.method == "flux":
            merged = self._spread(num_merged, left)
            slots = [Slots(t, m, rest) for t, m, rest in zip(self._spread(num_tuned), merged, left, strict=True)]
        elif self.method == "fmq":
            slots = [
                Slots(t, n - t, n - t, bits=self.bits)
                for t, n in zip(self._spread(num_tuned), self.num_per_layer, strict=True)
            ]
        else:
            slots = [Slots(t) for t in self._spread(num_tuned)]
        return self._dry(slots)

    def _dry(self, slots: list[Slots]) -> dry_run.Peak:
        return dry_run.train_peak(
            self.model,
            slots,
            self.batch,
            self.tokens,
            self.tuned_dtype,
            self.state_bytes,
            self.checkpointing,
            self.kernel,
        )

    def _offloaded(self) -> dry_run.Peak:
        return self._dry([Slots(n, offloaded=True) for n in self.num_per_layer])

    def _profile_bytes(self) -> int:
        if self.method != "flux":
            return 0
        slots = [Slots(0, n, n, bits=self.bits) for n in self.num_per_layer]
        return dry_run.forward_peak(self.model, slots, self.batch, self.tokens).num_bytes

    def _spread(self, count: int, most: list[int] | None = None) -> list[int]:
        """``count`` over the layers as evenly as their sizes allow."""
        most = most if most is not None else self.num_per_layer
        if not 0 <= count <= sum(most):
            raise ValueError(f"count: expected 0..{sum(most)} experts over the layers, got {count}")
        given = [0] * len(most)
        while count:
            open_layers = [i for i, limit in enumerate(most) if given[i] < limit]
            for i in open_layers[:count] if count < len(open_layers) else open_layers:
                share = max(1, count // len(open_layers)) if count >= len(open_layers) else 1
                step = min(share, most[i] - given[i], count)
                given[i] += step
                count -= step
        return given

    def _rows(self, by_kind: Counter[str], num_tuned: int, num_merged: int, host: int) -> tuple[Row, ...]:
        size = self.census.expert_parameters
        rest = by_kind["others"]
        rows = []
        for kind in KINDS:
            parameters = self.census.parameters.get(kind, 0)
            if parameters and kind != "routed experts":
                rows.append(Row(kind, parameters * self.dtype.itemsize, parameters))
                rest -= parameters * self.dtype.itemsize
        if rest:
            rows.append(Row("buffers", rest))
        frozen = num_merged if self.method == "flux" else sum(self.num_per_layer)
        names = {
            "tuned": ("tuned experts", num_tuned * size),
            "frozen": ("merged experts" if self.method == "flux" else f"experts in {self.bits} bit", frozen * size),
            "gradients": ("gradients", 0),
            "optimizer": ("optimizer state", 0),
            "activations": ("activations", 0),
        }
        rows += [Row(title, by_kind[key], count) for key, (title, count) in names.items() if by_kind[key]]
        if host:
            rows.append(Row("experts and state" if self.method == "fmd" else "whole model", host, 0, "host"))
        return tuple(rows)


def _too_small(usable: int, needed: int, planner: Planner) -> str:
    hint = "" if planner.checkpointing else ", or checkpointing"
    return (
        f"memory: {usable / 2**30:.2f} GiB usable, but {planner.method} needs at least {needed / 2**30:.2f} GiB for"
        f" batches of {planner.batch} x {planner.tokens} tokens; take a smaller batch or fewer tokens{hint}"
    )
