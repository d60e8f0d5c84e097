"""Experts in host memory, the most recently used of them on the device: how FMD trains a model that does not fit.

There are two forms, the setting ``offloading``. ``on_demand``, the paper's: an expert is copied when its layer needs
it, its gradient when it is made, and everything waits for that; the optimizer steps after the backward pass.
``overlapped``: on CUDA an expert is copied on a stream of its own while the one before it computes, the first of the
next layer too, and gradients travel back the same way; a layer's optimizer may step on the host, in a thread, while
earlier layers are still at their backward pass. Both forms move what is computed with (16 bit, if the model computes in
that) between pinned memory and the device, and compute the same numbers. On a CPU nothing is copied and the accounting
is the same. What either costs on a device is :mod:`fluxlib.devices.step`'s matter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fluxlib.config import Offloading

from .adapter import Adapter
from .dispatch import SlotExperts
from .find import ExpertKey, check_expert
from .replace import replace_all

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Traffic:
    """Account of a :class:`DeviceSet`.

    Attributes:
        hits: Uses of an expert that was on the device.
        misses: Uses of one that had to be copied there (ahead of time or not).
        to_device_bytes, to_host_bytes: Weights copied to the device, gradients copied back.
    """

    hits: int = 0
    misses: int = 0
    to_device_bytes: int = 0
    to_host_bytes: int = 0


@dataclass
class _Entry:
    """An expert on the device: tensors, the state of the host's they were copied from, when they are ready."""

    tensors: dict[str, Tensor]
    version: int
    ready: Any = None
    is_ahead: bool = False


class DeviceSet:
    """At most ``capacity`` experts on the device.

    Args:
        capacity: Number of experts, of all layers together; from 2 on, one is copied ahead of its use.
        offloading: ``overlapped``, or ``on_demand``: nothing is copied ahead, and every copy is waited for.

    Raises:
        ValueError: No room for a single expert.
    """

    def __init__(self, capacity: int, offloading: Offloading = "overlapped") -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected room for at least 1 expert, got {capacity}")
        self.capacity, self.overlaps = capacity, offloading == "overlapped"
        self.traffic = Traffic()
        self.layers: dict[int, OffloadedExperts] = {}
        self.next_layer: dict[ExpertKey, ExpertKey] = {}
        """What came after a layer's last expert, the last time."""
        self._entries: OrderedDict[ExpertKey, _Entry] = OrderedDict()
        self._working: dict[ExpertKey, _Entry] = {}
        self._before: ExpertKey | None = None
        self._stream: Any = None

    def get(
        self, key: ExpertKey, host: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Tensors of an expert on the device, current with the host's, in ``dtype`` (None: the host's)."""
        if self._before is not None and self._before[0] != key[0]:
            self.next_layer[self._before] = key
        self._before = key
        entry = self._current(key, host)
        if entry is None:
            entry = self._load(key, host, device, dtype)
        elif not entry.is_ahead:
            self.traffic.hits += 1
        entry.is_ahead = False
        self._entries.move_to_end(key)
        if entry.ready is not None:
            torch.cuda.current_stream(device).wait_event(entry.ready)
        return entry.tensors

    def ahead(
        self, key: ExpertKey, host: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        """Start copying an expert that will be used next, unless it is there or would push out the one in use."""
        if self.overlaps and self.capacity > 1 and self._current(key, host) is None:
            self._load(key, host, device, dtype).is_ahead = True

    def stream(self, device: torch.device) -> Any:
        """The stream that copies."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def _current(self, key: ExpertKey, host: Mapping[str, Tensor]) -> _Entry | None:
        entry = self._entries.get(key)
        return entry if entry is not None and entry.version == _version(host) else None

    def _load(
        self, key: ExpertKey, host: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None
    ) -> _Entry:
        stale = self._entries.pop(key, None)
        while len(self._entries) >= self.capacity:
            stale = self._entries.popitem(last=False)[1]
        entry = self._as_computed(key, host, dtype)
        self.traffic.misses += 1
        self.traffic.to_device_bytes += sum(tensor.numel() * tensor.element_size() for tensor in entry.tensors.values())
        if device.type == "cuda":
            self._copy(entry, stale, device)
        self._entries[key] = entry
        return entry

    def _as_computed(self, key: ExpertKey, host: Mapping[str, Tensor], dtype: torch.dtype | None) -> _Entry:
        """The host's tensors in ``dtype``; a copy of another type is kept on the host until they change."""
        tensors, version = {name: tensor.detach() for name, tensor in host.items()}, _version(host)
        if all(tensor.dtype == (dtype or tensor.dtype) for tensor in tensors.values()):
            return _Entry(tensors, version)
        kept = self._working.get(key)
        if kept is None:
            empty = {n: torch.empty_like(t, dtype=dtype, pin_memory=t.is_pinned()) for n, t in tensors.items()}
            kept = self._working[key] = _Entry(empty, -1)
        if kept.version != version:
            for name, tensor in tensors.items():
                kept.tensors[name].copy_(tensor)
            kept.version = version
        return _Entry(dict(kept.tensors), version)

    def _copy(self, entry: _Entry, stale: _Entry | None, device: torch.device) -> None:
        """Copy to the device, into the buffers of an expert that goes; on the copying stream where that overlaps."""
        if stale is None:
            stale = _Entry({n: torch.empty_like(t, device=device) for n, t in entry.tensors.items()}, -1)
        stream = self.stream(device) if self.overlaps else torch.cuda.current_stream(device)
        # What computes with the old contents is already in the queue of the current stream.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for name, tensor in entry.tensors.items():
                stale.tensors[name].copy_(tensor, non_blocking=True)
                stale.tensors[name].record_stream(stream)
            entry.ready = torch.cuda.Event()
            entry.ready.record(stream)
        entry.tensors = stale.tensors
        if not self.overlaps:
            entry.ready.synchronize()


class OffloadedExperts(SlotExperts):
    """Experts that live in host memory, each a parameter of its own: gradients and optimizer state are per expert.

    An expert that saw no token has no gradient, and an optimizer leaves it and its state alone. The parameters share
    the original's (pinned) memory: training writes into the original. ``model.to(device)`` leaves them on the host.

    Args:
        layer: Number of the layer, part of the key in the set.
        optimizer: Makes the optimizer that steps as soon as the layer's gradients are on the host; None: the caller's
            does, when it likes. Gradients are gone afterwards.
        worker: What it steps in; the layer's next use waits for it. None: it steps at once.
        adapter: Experts stay as they are, and its B's, on the device, learn: nothing travels back.
    """

    def __init__(
        self,
        original: nn.Module,
        device_set: DeviceSet,
        layer: int,
        optimizer: MakeOptimizer | None = None,
        worker: ThreadPoolExecutor | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__(original, adapter, layer)
        self.device_set = device_set
        device_set.layers[layer] = self
        stacks = {name: getattr(original, name) for name in self.layout.names}
        for stack in stacks.values():
            stack.data = stack.data.cpu().pin_memory() if torch.cuda.is_available() else stack.data.cpu()
        # .data gives each view a version counter of its own: an update of one expert leaves the others current.
        self.host = _HostParameters(
            {f"{n}_{e}": nn.Parameter(s.data[e].data) for n, s in stacks.items() for e in range(self.num_experts)}
        ).requires_grad_(adapter is None)
        self._versions = self._now()
        self._finish_return: Callable[[], None] = lambda: None
        self._optimizer = optimizer(self.host.parameters()) if optimizer else None
        self._worker = worker
        self._update: Future[None] | None = None

    def parameters_of(self, expert: int) -> dict[str, nn.Parameter]:
        """Host parameters of one expert, by stack name."""
        check_expert(expert, self.num_experts)
        return {name: self.host.get_parameter(f"{name}_{expert}") for name in self.layout.names}

    def at_rest(self, expert: int) -> dict[str, Tensor]:
        """Tensors of an expert, on the host."""
        self.wait()
        return {name: parameter.detach() for name, parameter in self.parameters_of(expert).items()}

    def write_back(self) -> None:
        """What weights learned is in the original's memory already, once the last step is done."""
        self.wait()
        super().write_back()

    def discard(self) -> None:
        """Refuse to forget what was trained, for the original's memory was written to."""
        self.wait()
        changed = [e for e, (now, before) in enumerate(zip(self._now(), self._versions, strict=True)) if now != before]
        if changed:
            raise ValueError(f"write: offloaded experts are trained in place, expected True; changed were {changed}")

    def fetch(self, slot: int, upcoming: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of an expert on the device, in ``dtype``; that of the next one starts to travel."""
        self.wait()
        there, key = self.device_set, (self.layer, slot)
        tensors = there.get(key, self.parameters_of(slot), self.device, dtype)
        following = (self.layer, upcoming[0]) if upcoming else there.next_layer.get(key)
        if following is not None and (layer := there.layers.get(following[0])) is not None:
            there.ahead(following, layer.parameters_of(following[1]), self.device, dtype)
        return tensors

    def add_gradients(self, slot: int, gradients: Mapping[str, Tensor]) -> None:
        """See :class:`~fluxlib.moe.dispatch.Slots`."""
        parameters = self.parameters_of(slot)
        self.device_set.traffic.to_host_bytes += sum(g.numel() * g.element_size() for g in gradients.values())
        if self.device.type == "cuda":
            before, self._finish_return = self._finish_return, self._send_back(parameters, gradients)
            before()
            if not self.device_set.overlaps:
                self._finish_return()
                self._finish_return = lambda: None
        else:
            _accumulate(parameters, gradients)

    def end_gradients(self, counts: Sequence[int]) -> list[Tensor | None]:
        """See :class:`~fluxlib.moe.dispatch.Slots`."""
        self._finish_return()
        self._finish_return = lambda: None
        if self._optimizer is not None:
            self._update = self._worker.submit(self._step) if self._worker else None
            if self._update is None:
                self._step()
        return super().end_gradients(counts)

    def wait(self) -> None:
        """Until the layer's own optimizer, if it has one, is done with its last step."""
        if self._update is not None:
            self._update.result()
            self._update = None

    def _step(self) -> None:
        assert self._optimizer is not None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _send_back(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Callable[[], None]:
        """Start copying gradients to the host; the function returned waits and adds them up."""
        stream = self.device_set.stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        arrived = {name: torch.empty(g.shape, dtype=g.dtype, pin_memory=True) for name, g in gradients.items()}
        with torch.cuda.stream(stream):
            for name, gradient in gradients.items():
                arrived[name].copy_(gradient, non_blocking=True)
                gradient.record_stream(stream)
            done: Any = torch.cuda.Event()
            done.record(stream)

        def finish() -> None:
            done.synchronize()
            _accumulate(parameters, arrived)

        return finish

    def _now(self) -> list[int]:
        return [_version(self.parameters_of(expert)) for expert in range(self.num_experts)]


def offload(
    model: nn.Module,
    capacity: int,
    offloading: Offloading = "overlapped",
    optimizer: MakeOptimizer | None = None,
    adapter: Adapter | None = None,
) -> DeviceSet:
    """Put an :class:`OffloadedExperts` at every MoE layer, in place, and freeze everything but the experts.

    Args:
        capacity: Experts that may be on the device at once, of all layers together.
        optimizer: Makes a layer's optimizer from its parameters; it steps by itself after every backward pass, behind
            that of earlier layers where ``offloading`` overlaps. None: the caller's optimizer steps.
        adapter: Its B's learn, and the caller's optimizer steps; None: whole experts learn.

    Raises:
        ValueError: No capacity, or experts that were replaced before.
    """
    device_set = DeviceSet(capacity, offloading)
    worker = ThreadPoolExecutor(1) if optimizer and device_set.overlaps else None
    replace_all(
        model, lambda layer: OffloadedExperts(layer.experts, device_set, layer.index, optimizer, worker, adapter)
    )
    return device_set


class _HostParameters(nn.ParameterDict):
    """Parameters that ``model.to(...)`` leaves where they are."""

    def _apply(self, fn: Any, recurse: bool = True) -> _HostParameters:
        return self


@torch.no_grad()
def _accumulate(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        held = parameters[name].grad
        gradient = gradient.to(parameters[name].dtype)
        parameters[name].grad = gradient if held is None else held.add_(gradient)


def _version(tensors: Mapping[str, Tensor]) -> int:
    """Changes with every write into the tensors."""
    return sum(tensor._version for tensor in tensors.values())
