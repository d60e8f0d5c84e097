"""An in-process :class:`flwr.serverapp.Grid`: the same apps, no Ray, no sockets, no start-up.

Participants run one after another in this process, in the order in which messages were sent, so a run is
deterministic. :meth:`LocalGrid.send_and_receive` gives replies one at a time, as they are made: a server that takes
them in as they come needs memory for one reply, however many participants there are.

What a Flower engine guarantees is kept:

* each node has its own :class:`flwr.app.Context`, whose ``state`` lasts from message to message;
* an exception in the client app becomes an error reply, and that node's state stays as it was;
* neither side sees what the other does to a message: values are immutable bytes behind new containers;
* a participant that takes longer than the time limit is given up, and its reply is lost (:mod:`time_limit` says how);
  the limit holds for each node, since nodes stand for devices in parallel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fluxlib.federation.client import time_limit
from fluxlib.federation.protocol import wire

log = logging.getLogger(__name__)

FIRST_NODE_ID = SUPERLINK_NODE_ID + 1
"""Node ids count up from here, in order of partitions."""


class LocalGrid(Grid):
    """Runs ``client_app`` for ``num_nodes`` nodes in this process.

    Args:
        client_app: what every node runs.
        num_nodes: number of nodes, one per data partition.
        node_config: further entries of a node's configuration, by partition; ``None`` for none.
        run_id: identifier that messages and contexts carry.
        on_given_up: called when a node is given up, before the next one starts: what that call may still be writing
            to must not be used any more.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        node_config: Callable[[int], dict[str, Any]] | None = None,
        run_id: int = 1,
        on_given_up: Callable[[], None] | None = None,
    ) -> None:
        if num_nodes < 1:
            raise ValueError(f"num_nodes is {num_nodes}, allowed is at least 1")
        self.client_app = client_app
        self.num_nodes = num_nodes
        self._node_config = node_config
        self._on_given_up = on_given_up
        self._run = Run.create_empty(run_id)
        self._contexts: dict[int, Context] = {}
        self._waiting: dict[str, Message] = {}
        self._count = 0
        self._changed: set[int] = set()

    def set_run(self, run: Run) -> None:
        """Replace the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message from the server to ``dst_node_id``; call it inside :meth:`identity`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All node ids, in order of partitions."""
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self.num_nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; each is delivered when its reply is pulled."""
        return [self._accept(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the messages with these ids; an id is answered once."""
        replies = (self._deliver(self._waiting.pop(i), None) for i in message_ids if i in self._waiting)
        return [reply for reply in replies if reply is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Deliver messages one at a time and give each reply as it is made; late ones are left out."""
        for message in messages:
            self._accept(message)
            reply = self._deliver(self._waiting.pop(message.metadata.message_id), timeout)
            if reply is not None:
                yield reply

    @contextmanager
    def identity(self) -> Iterator[LocalGrid]:
        """Say who sends the messages made inside: Flower keeps this per process, its engines set it themselves."""
        before = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self._run.run_id, SUPERLINK_NODE_ID, 0
        try:
            yield self
        finally:
            TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before

    def context(self, node_id: int) -> Context:
        """The context of ``node_id``, made when first asked for.

        Raises:
            ValueError: no such node.
        """
        if node_id not in self._contexts:
            partition = node_id - FIRST_NODE_ID
            if not 0 <= partition < self.num_nodes:
                last = FIRST_NODE_ID + self.num_nodes - 1
                raise ValueError(f"node_id is {node_id}, allowed are {FIRST_NODE_ID} to {last}")
            config = {PARTITION_ID_KEY: partition, NUM_PARTITIONS_KEY: self.num_nodes}
            extra = self._node_config(partition) if self._node_config else {}
            self._contexts[node_id] = Context(self._run.run_id, node_id, {**config, **extra}, RecordDict(), {})
        return self._contexts[node_id]

    def take_changed(self) -> list[int]:
        """Nodes whose state may have changed since the last call, in increasing order."""
        changed, self._changed = sorted(self._changed), set()
        return changed

    def _accept(self, message: Message) -> str:
        self._count += 1
        message_id = f"{self._run.run_id}-{self._count}"
        message.metadata.__dict__["_message_id"] = message_id
        self._waiting[message_id] = message
        return message_id

    def _deliver(self, message: Message, timeout: float | None) -> Message | None:
        node_id = message.metadata.dst_node_id
        try:
            stored = self.context(node_id)
            outgoing, state = time_limit.call(timeout, self._work, message, stored)
            stored.state = state
            self._changed.add(node_id)
        except time_limit.TimeLimitExceeded as error:
            log.warning("participant at node %d is given up, its reply is lost: %s", node_id, error)
            if self._on_given_up:
                self._on_given_up()
            return None
        except Exception as error:  # a participant's fault costs its reply, never the run
            log.warning("participant at node %d failed: %s: %s", node_id, type(error).__name__, error)
            reason = f"{type(error).__name__}: {error}"
            outgoing = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        self._count += 1
        outgoing.metadata.__dict__["_message_id"] = f"{self._run.run_id}-{self._count}"
        return outgoing

    def _work(self, message: Message, stored: Context) -> tuple[Message, RecordDict]:
        """The client app's reply and the node's state after it; nothing that is kept is changed."""
        state = RecordDict({name: record.copy() for name, record in stored.state.items()})
        context = Context(stored.run_id, stored.node_id, dict(stored.node_config), state, dict(stored.run_config))
        incoming = Message(content=wire.share(message.content), metadata=message.metadata)
        reply = self.client_app(incoming, context)
        if not reply.has_error():
            reply = Message(content=wire.share(reply.content), metadata=reply.metadata)
        return reply, context.state
