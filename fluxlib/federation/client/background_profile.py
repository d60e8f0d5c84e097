"""The profile for the next round, made after the reply: while the server waits for others, aggregates and evaluates.

A node whose configuration has a ``state-dir`` and ``background-profile = true`` answers first. Then a process of its
own (a client app's is ended soon after its reply) reads what the participant holds from that folder, profiles it, and
leaves the result there; the next message picks it up, or waits for it. If there is no result, the profile is made when
it is needed, from the same model and samples, so the numbers are the same however it came about.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fluxlib.federation.client import node_state
from fluxlib.federation.client.local_copy import LocalCopy, workspace
from fluxlib.federation.client.local_data import local_data
from fluxlib.federation.protocol import messages
from fluxlib.federation.protocol.messages import Instruction
from fluxlib.methods.base import ParticipantState
from fluxlib.methods.local import profile
from fluxlib.moe.adapter import Adapter

log = logging.getLogger(__name__)

BACKGROUND = "background-profile"
"""Entry of a node's configuration: profile after the reply. It needs a ``state-dir``."""

PENDING = "pending-profile"
"""Record of a participant's state: a profile that is still to be made, or being made."""

RESULT, LOCK, LOG = "profile.safetensors", "profile.lock", "profile.log"

_started: list[subprocess.Popen[bytes]] = []


def note(state: RecordDict, instruction: Instruction, device: str, samples: str) -> None:
    """Write down that the model held now is to be profiled, and all that is needed for it."""
    state[PENDING] = ConfigRecord({
        "run": instruction.config.model_dump_json(), "round": instruction.round,
        "participant": instruction.participant, "device": device, "samples": samples,
    })  # fmt: skip


def start(folder: Path, state: RecordDict) -> None:
    """Start the process if there is something to do; ``folder`` must hold ``state`` already."""
    if PENDING not in state:
        return
    with (folder / LOCK).open("ab") as lock, (folder / LOG).open("ab") as output:
        fcntl.flock(lock, fcntl.LOCK_EX)  # passed on: it is held until the process ends, however it ends
        command = [sys.executable, "-m", __name__, str(folder)]
        _started[:] = [process for process in _started if process.poll() is None]  # reaps those that have ended
        settings: dict[str, Any] = {"stdout": output, "stderr": output, "start_new_session": True}
        _started.append(subprocess.Popen(command, pass_fds=[lock.fileno()], **settings))


def finish(folder: Path, state: RecordDict) -> None:
    """Put the pending profile into ``state``, from the process or made now."""
    result = RecordDict()
    with (folder / LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the process
    node_state.restore(folder / RESULT, result)
    if node_state.load_state(result).profile_round != state[PENDING]["round"]:
        log.warning("no profile of round %d was left in %s; it is made now", state[PENDING]["round"], folder)
        result = _make(state)
    state.update(result)
    del state[PENDING]


def _make(state: RecordDict) -> RecordDict:
    """The pending profile of ``state``, of the model and the samples of that round."""
    pending: Any = state[PENDING]
    number, config = pending["round"], messages.parse_config(pending["run"])
    space = workspace(config.model, config.wire.downlink, pending["device"], Adapter.of(config), config.torch_dtype)
    space.load(LocalCopy.load(state, space.base_digest))
    data = local_data(config, space.tokenizer, pending["participant"], number, pending["samples"])
    result = RecordDict()
    node_state.save_state(result, ParticipantState(profile(space.model, data, config), number))
    return result


def main(folder: Path) -> None:
    """What the process does."""
    state = RecordDict()
    if node_state.restore(folder / node_state.STATE, state) and PENDING in state:
        node_state.keep(folder / RESULT, _make(state))


if __name__ == "__main__":
    os.nice(5)  # what the participant is asked for next comes first
    main(Path(sys.argv[1]))
