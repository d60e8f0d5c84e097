"""Where models compute: the CPU, or the accelerator of the machine at hand."""

from __future__ import annotations

import torch


def torch_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first GPU, else Apple's, else the CPU.

    Raises:
        ValueError: this machine has none of that name; the message lists what it has.
    """
    there = _there()
    if name == "auto":
        return torch.device(there[0])
    if name not in there and f"{name}:0" not in there:
        raise ValueError(f"torch_device is {name!r}, allowed on this machine are auto, {', '.join(there)}")
    return torch.device(name)


def _there() -> list[str]:
    """Names of this machine's devices, the best first."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
