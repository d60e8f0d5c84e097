"""One run, one process: two that write the same tables and checkpoints would spoil both.

The lock is the operating system's own on an open file, so it ends with the process however that ends: a file that is
left behind holds nothing. It says who holds it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxlib.io import ConfigError


class RunInUse(ConfigError):
    """Another process holds the run."""


@contextmanager
def hold(folder: Path, run_id: str, role: str = "", wait_s: float = 0.0) -> Iterator[None]:
    """Hold the run called ``run_id`` in ``folder`` for the time of the block; RunInUse names another holder.

    Args:
        role: what may be held beside the run itself, such as following it from another process.
        wait_s: how long to wait for a holder; a process that is killed lets go a moment after it is gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{run_id}{f'.{role}' if role else ''}.lock"
    deadline = time.monotonic() + wait_s
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    raise RunInUse(
                        f"out is {folder}, in which {path.read_text().strip() or 'another process'} is running "
                        f"{run_id} at this moment; wait for it, end it, or choose another folder"
                    ) from None
            time.sleep(0.1)
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield
