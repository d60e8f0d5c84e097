"""Named random generators: every source of chance has a name, so adding one does not shift the others.

Importing this, or :mod:`fluxlib.tasks`, imports no torch: names are checked before anything slow is started.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for the stream called ``names`` under the run's ``seed``."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for the stream called ``names`` under the run's ``seed``.

    >>> generator(0, "partition").initial_seed() == generator(0, "partition").initial_seed()
    True
    """
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))


def order(count: int, seed: int, *names: object) -> list[int]:
    """The numbers below ``count``, shuffled by the stream called ``names`` under the run's ``seed``."""
    import torch

    return list(torch.randperm(count, generator=generator(seed, *names)).tolist())
