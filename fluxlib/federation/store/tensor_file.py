"""One safetensors file for what must survive a process: written whole, and read only as it was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

DIGEST = "sha256"
"""Entry of the file's metadata with the digest of all else in it."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: str = "") -> None:
    """Write ``tensors`` in place of what is at ``path``, all at once, when they are on disk; ``about`` goes with them.

    Raises:
        OSError: the disk is full or gone (safetensors' own error says so too); what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, kept = path.with_suffix(".tmp"), {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
    save_file(kept, temporary, {"about": about, DIGEST: _digest(kept, about)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors and ``about`` of a file that :func:`write_tensors` wrote.

    Raises:
        OSError, SafetensorError: it cannot be read.
        ValueError: not a bit of it may differ from what was written, and one does.
    """
    with safe_open(path, "pt") as file:
        said, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if said.get(DIGEST) != _digest(tensors, about := said.get("about", "")):
        raise ValueError("its content is not what was written")
    return tensors, about


def _digest(tensors: Mapping[str, Tensor], about: str) -> str:
    total = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
