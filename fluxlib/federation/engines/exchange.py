"""Messages out and replies in, one reply at a time and in order of participants, on every engine.

The in-process grid makes each reply when it is asked for. On Flower's own engines all participants work at once, and a
reply waits on the SuperLink until it is fetched: fetching them in order of participants gives every engine the same
order of addition (it decides the last bits of a mean) and the server app one reply in memory, however many there are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid

from fluxlib.federation.engines.local_grid import LocalGrid

log = logging.getLogger(__name__)

POLL_S = 0.2


def exchange(grid: Grid, messages: Iterable[Message], timeout_s: float | None) -> Iterator[Message]:
    """Replies to ``messages``, in their order; one that is not there when ``timeout_s`` is over is left out."""
    if isinstance(grid, LocalGrid):
        yield from grid.send_and_receive(messages, timeout=timeout_s)
        return
    waiting = [identifier for message in messages for identifier in grid.push_messages([message]) if identifier]
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    for identifier in waiting:
        yield from _fetch(grid, identifier, deadline)


def is_from_a_node(reply: Message) -> bool:
    """Whether a node made it; where none did in time, or its node is gone, the SuperLink says so in its place."""
    if reply.metadata.src_node_id != SUPERLINK_NODE_ID:
        return True
    log.warning("no reply to message %s: %s", reply.metadata.reply_to_message_id, reply.error.reason)
    return False


def _fetch(grid: Grid, identifier: str, deadline: float | None) -> Iterator[Message]:
    """The reply to one message: none or one. What has come is fetched even when the time is over."""
    while True:
        found = list(grid.pull_messages([identifier]))
        replies = [reply for reply in found if is_from_a_node(reply)]
        if found or (deadline is not None and time.monotonic() >= deadline):
            yield from replies
            return
        time.sleep(POLL_S)
