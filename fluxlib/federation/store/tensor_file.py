"""One safetensors file for what must survive a process: written whole, and read only as it was written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fluxlib.io import reading, replacing

DIGEST = "sha256"
"""Entry of the file's metadata with the digest of all else in it."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: str = "") -> None:
    """Write ``tensors``, and ``about`` with them, in place of what is at ``path``, all at once; OSError by name."""
    kept = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(kept, temporary, {"about": about, DIGEST: _digest(kept, about)})
        except SafetensorError as error:
            raise OSError(str(error)) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors and ``about`` of a file of :func:`write_tensors`; ConfigError: one bit is not as it was written."""
    with reading(str(path)):
        with safe_open(path, "pt") as file:
            said, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if said.get(DIGEST) != _digest(tensors, about := said["about"]):
            raise ValueError("its content is not what was written")
    return tensors, about


def _digest(tensors: Mapping[str, Tensor], about: str) -> str:
    total = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()
