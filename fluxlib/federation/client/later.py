"""The profile for the next round, made after the reply: while the server waits for others, aggregates and evaluates.

A node whose configuration has a ``state-dir`` and ``background-profile = true`` answers first. Then a process of its
own reads what the participant holds from that folder, profiles it, and leaves the result there; the next message
picks it up, or waits for it. The process is not Flower's: a client app's own process is ended soon after its reply. If
it is gone without a result (killed, out of memory), the profile is made when it is needed, from the same model and
samples, so the numbers are the same however a profile came about.

Everywhere else the participant profiles before it answers, in the same order as ever: one process can do one thing.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fluxlib.federation.client import disk
from fluxlib.federation.client.state import load_state, save_state
from fluxlib.methods.base import ParticipantState
from fluxlib.profiling import Profile

log = logging.getLogger(__name__)

BACKGROUND = "background-profile"
"""Entry of a node's configuration: profile after the reply. It needs a ``state-dir``."""

PENDING = "later"
"""Record of a participant's state: a profile that is still to be made, or being made."""

Span = tuple[str, float, float, int]
"""A phase, its start and end in seconds since 1970 on this machine's clock, and the round it belongs to."""

_started: list[subprocess.Popen[bytes]] = []


def note(state: RecordDict, round_number: int, **about: Any) -> None:
    """Write down that the model held now is to be profiled; ``about`` is what :func:`main` needs to know."""
    state[PENDING] = ConfigRecord({"round": round_number, **about})


def start(folder: Path, state: RecordDict) -> None:
    """Start the process if there is something to do; ``folder`` must hold ``state`` already."""
    if PENDING not in state:
        return
    with _open_lock(folder) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # passed on: it is held until the process ends, however it ends
        command = [sys.executable, "-m", __name__, str(folder)]
        with (folder / "later.log").open("ab") as output:
            _started[:] = [process for process in _started if process.poll() is None]  # reaps those that have ended
            settings: dict[str, Any] = {"stdout": output, "stderr": output, "start_new_session": True}
            _started.append(subprocess.Popen(command, pass_fds=[lock.fileno()], **settings))


def finish(folder: Path | None, state: RecordDict, make: Callable[[int], Profile]) -> list[Span]:
    """Put a pending profile into ``state``; ``make`` is called with its round where no process has made it."""
    if PENDING not in state:
        return []
    number = int(state[PENDING]["round"])
    found, span = _wait(folder, number) if folder else (None, None)
    if found is None or span is None:
        begin = time.time()
        found = make(number)
        span = ("profile", begin, time.time(), number)
    save_state(state, ParticipantState(found, number))
    del state[PENDING]
    return [span]


def _wait(folder: Path, number: int) -> tuple[Profile | None, Span | None]:
    """The result of the process for that round, once it has ended; nothing where there is none."""
    with _open_lock(folder) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    result = RecordDict()
    if not disk.restore(folder / PENDING, result) or int(result["done"]["round"]) != number:
        log.warning("no profile of round %d was left in %s; it is made now", number, folder)
        return None, None
    done = result["done"]
    return load_state(result).profile, ("profile", float(done["start"]), float(done["end"]), number)


def _open_lock(folder: Path) -> Any:
    return (folder / "later.lock").open("ab")


def main(folder: Path) -> None:
    """What the process does."""
    from fluxlib.federation.client import participant

    state, result = RecordDict(), RecordDict()
    if not disk.restore(folder, state) or PENDING not in state:
        return
    begin, number = time.time(), int(state[PENDING]["round"])
    save_state(result, ParticipantState(participant.profile_held(state, number), number))
    result["done"] = ConfigRecord({"round": number, "start": begin, "end": time.time()})
    disk.keep(folder / PENDING, result)


if __name__ == "__main__":
    os.nice(5)  # what the participant is asked for next comes first
    main(Path(sys.argv[1]))
