"""One run, one process: two that write the same tables and checkpoints would spoil both.

The lock is the operating system's own on an open file, so it ends with the process however that ends: nothing has to
be removed after a crash. The file says who holds it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxlib.config import ConfigError


class RunInUse(ConfigError):
    """Another process holds the run."""


@contextmanager
def hold(folder: Path, run_id: str, role: str = "", wait_s: float = 0.0) -> Iterator[None]:
    """Hold the run called ``run_id`` in ``folder`` for the time of the block.

    Args:
        role: what may be held beside the run itself, such as following it from another process.
        wait_s: how long to wait for a holder; a process that is killed lets go a moment after it is gone.

    Raises:
        RunInUse: another process holds it; the message names its process number and machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{run_id}{f'.{role}' if role else ''}.lock"
    deadline = time.monotonic() + wait_s
    while (file := _acquire(path, run_id, last=time.monotonic() >= deadline)) is None:
        time.sleep(0.1)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: whoever waits for it finds that out in _acquire
        os.close(file)


def _acquire(path: Path, run_id: str, last: bool) -> int | None:
    """The locked file; ``None`` to try again: somebody holds it, or removed it between our opening and our locking."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
        os.close(file)
        if not last:
            return None
        raise RunInUse(
            f"out is {path.parent}, in which {holder} is running {run_id} at this moment; "
            "wait for it, end it, or choose another folder"
        ) from None
    try:
        if os.path.samestat(path.stat(), os.fstat(file)):
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return file
    except FileNotFoundError:
        pass
    os.close(file)
    return None
