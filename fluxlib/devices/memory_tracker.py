"""Bytes of tensors alive and their peak, by kind: on real tensors a measurement, on meta tensors a prediction."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """Bytes of tensors alive inside the ``with`` block, by kind, and their state at the moment of the peak.

    A tensor made inside counts as ``activations`` until :meth:`mark` gives it another kind; one made outside counts
    from its first :meth:`mark`. What a kernel allocates and frees inside one operation is not seen. The peak is that
    since the beginning, or since the last :meth:`cut`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.stretches: list[tuple[Counter[str], Counter[str], Counter[str]]] = []
        self._known: dict[int, tuple[str, int]] = {}
        self.peak_bytes = 0
        self._start: Counter[str] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Asking torch.compile costs a second at the first operation, and nothing is compiled here.

    def mark(self, tensor: Tensor, kind: str) -> None:
        """Count the tensor's memory as ``kind`` from now on; views share the memory of what they view."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            self.by_kind[self._known[key][0]] -= num_bytes
        else:
            weakref.finalize(storage, self._drop, key)
        self._known[key] = (kind, num_bytes)
        self.by_kind[kind] += num_bytes
        if (now := self.by_kind.total()) > self.peak_bytes:
            self.peak_bytes, self.at_peak = now, self.by_kind.copy()

    def cut(self) -> None:
        """End a stretch of the run: what was alive at its start, at its peak and now is appended to ``stretches``."""
        self.stretches.append((self._start, self.at_peak, self.by_kind.copy()))
        self._start, self.at_peak, self.peak_bytes = self.by_kind.copy(), self.by_kind.copy(), self.by_kind.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count what it made."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool or 1
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self.mark(tensor, "activations")
        return result

    def _drop(self, key: int) -> None:
        kind, num_bytes = self._known.pop(key)
        self.by_kind[kind] -= num_bytes
