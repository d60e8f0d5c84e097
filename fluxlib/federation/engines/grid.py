"""How messages reach participants and replies come back: in this process, or through a SuperLink.

:class:`LocalGrid` is an in-process :class:`flwr.serverapp.Grid`: the same apps, no Ray, no sockets, no start-up.
Participants run one after another, in the order in which messages are sent, so a run is deterministic. As on a Flower
engine each node has a :class:`flwr.app.Context`, whose ``state`` lasts from message to message; records are copied on
their way; after an exception, which becomes an error reply, the node's state is as it was; a late reply is lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import httpx
from flwr.app import DEFAULT_TTL, Context, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fluxlib.federation.client.client_app import TimeLimitExceeded
from fluxlib.federation.protocol import parcels
from fluxlib.federation.protocol.wire import WireError

log = logging.getLogger(__name__)

SERVER_NODE_ID = 1
"""Node ids of participants count up from the next one, in order of partitions, as on Flower's engines."""

RAISED = 2
"""Flower's error code of a client app that raised an exception."""

POLL_S = 0.2

TRIES = 10
"""Times that a SuperLink is asked which answers with an error of its own: its database is locked for moments."""


def send_and_receive(grid: Grid, messages: Iterable[Message], timeout_s: float | None) -> Iterator[Message]:
    """Replies to ``messages``, one at a time and in their order; one that is late is left out.

    The order of replies is the order of addition, which decides the last bits of a mean. In process a reply is made
    when it is asked for. On a SuperLink all participants work at once, and a reply waits there until it is fetched.
    Either way the server has one reply in memory, however many participants there are.
    """
    sent = []
    for message in messages:
        if not isinstance(grid, LocalGrid):
            message.content = parcels.pack(message.content)
        sent += [(name, message.metadata.dst_node_id) for name in grid.push_messages([message]) if name]
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    for name, node_id in sent:
        yield from _fetch(grid, name, node_id, deadline)


def _fetch(grid: Grid, name: str, node_id: int, deadline: float | None) -> Iterator[Message]:
    """The reply to one message: none or one. What has come is fetched even when the time is over."""
    while True:
        for reply in _pull(grid, name):
            if reply.metadata.src_node_id == node_id:
                if reply.has_content():
                    with suppress(WireError):  # what is no parcel is left as it is, and refused for what is in it
                        reply.content = parcels.unpack(reply.content)
                yield reply
            else:  # the SuperLink answers for a node that is gone, or did not answer in time
                log.warning("no reply of node %d: %s", node_id, reply.error.reason)
            return
        if deadline is not None and time.monotonic() >= deadline:
            return
        time.sleep(POLL_S)


def _pull(grid: Grid, name: str) -> list[Message]:
    for _ in range(TRIES - 1):
        try:
            return list(grid.pull_messages([name]))
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500:
                raise
            log.warning("the SuperLink failed, it is asked again: %s", error)
            time.sleep(POLL_S)
    return list(grid.pull_messages([name]))


class LocalGrid(Grid):
    """Runs ``client_app`` for ``num_nodes`` nodes in this process, one per data partition.

    ``node_config`` gives further entries of a node's configuration, by partition.
    """

    run: Any = None

    def __init__(
        self, client_app: ClientApp, num_nodes: int, node_config: Callable[[int], dict[str, Any]] = lambda _: {}
    ) -> None:
        self.client_app, self.num_nodes, self._node_config = client_app, num_nodes, node_config
        self._contexts: dict[int, Context] = {}
        self._waiting: dict[str, Message] = {}
        self._count = 0

    def set_run(self, run: Any) -> None:
        """Nothing here depends on Flower's account of the run."""

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message from the server to ``dst_node_id``."""
        self._count += 1
        about = Metadata(
            run_id=1, message_id=str(self._count), src_node_id=SERVER_NODE_ID, dst_node_id=dst_node_id,
            reply_to_message_id="", group_id=group_id, created_at=time.time(), ttl=ttl or DEFAULT_TTL,
            message_type=message_type,
        )  # fmt: skip
        return make_message(about, content)

    def get_node_ids(self) -> Iterable[int]:
        """All node ids, in order of partitions."""
        return range(SERVER_NODE_ID + 1, SERVER_NODE_ID + 1 + self.num_nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; each is delivered when its reply is pulled."""
        accepted = {message.metadata.message_id: message for message in messages}
        self._waiting |= accepted
        return list(accepted)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Replies to the messages with these ids, each made when it is asked for; an id is answered once."""
        for name in message_ids:
            if name in self._waiting and (reply := self._deliver(self._waiting.pop(name))) is not None:
                yield reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies in order; how long a participant may take is in its instruction, so ``timeout`` is not used."""
        return self.pull_messages(self.push_messages(messages))

    def context(self, node_id: int) -> Context:
        """The context of ``node_id``, made when first asked for; ValueError: no such node."""
        if node_id not in self._contexts:
            partition = node_id - SERVER_NODE_ID - 1
            if not 0 <= partition < self.num_nodes:
                last = SERVER_NODE_ID + self.num_nodes
                raise ValueError(f"node_id is {node_id}, allowed are {SERVER_NODE_ID + 1} to {last}")
            config = {"partition-id": partition, "num-partitions": self.num_nodes, **self._node_config(partition)}
            self._contexts[node_id] = Context(1, node_id, config, RecordDict(), {})
        return self._contexts[node_id]

    def _deliver(self, message: Message) -> Message | None:
        """The reply, if it is in time; what the node's state was is kept until it is there."""
        node_id = message.metadata.dst_node_id
        try:
            stored = self.context(node_id)
            context = Context(1, node_id, dict(stored.node_config), copied(stored.state), {})
            reply = self.client_app(make_message(message.metadata, copied(message.content)), context)
            if reply.has_content():
                reply.content = copied(reply.content)
            stored.state = context.state
            return reply
        except TimeLimitExceeded as error:
            log.warning("participant at node %d is given up, its reply is lost: %s", node_id, error)
            return None
        except Exception as error:  # a participant's fault costs its reply, never the run
            log.warning("participant at node %d failed: %s: %s", node_id, type(error).__name__, error)
            return Message(Error(RAISED, f"{type(error).__name__}: {error}"), reply_to=message)


def copied(records: RecordDict) -> RecordDict:
    """Records of their own with the same entries; arrays, whose bytes cannot change, are shared."""
    return RecordDict({name: record.copy() for name, record in records.items()})
