"""Which node is which participant, and what the server believes each of them to hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Message

from fluxlib.federation.protocol.sync import Holding

NOBODY = -1
"""Number of a node that is no participant of this run."""


@dataclass(frozen=True)
class Member:
    """A participant's node, what it holds, and its device if it said so."""

    node_id: int
    holding: Holding
    device: str = ""


class Roster:
    """All participants of a run; empty until :meth:`enrol`."""

    def __init__(self) -> None:
        self.nodes: dict[int, int] = {}
        self._participants: dict[int, int] = {}
        self._held: dict[int, Holding] = {}
        self.devices: dict[int, str] = {}
        """Devices of the catalogue, of those participants that said what theirs is."""

    def enrol(self, members: Mapping[int, Member]) -> None:
        """Take in every participant's node and what it holds, by participant."""
        self.nodes = {participant: member.node_id for participant, member in members.items()}
        self._participants = {node: participant for participant, node in self.nodes.items()}
        self._held = {participant: member.holding for participant, member in members.items()}
        self.devices = {participant: member.device for participant, member in members.items() if member.device}

    def sender(self, reply: Message) -> int:
        """The participant that a reply came from, or :data:`NOBODY`."""
        return self._participants.get(reply.metadata.src_node_id, NOBODY)

    def held(self, participant: int) -> Holding:
        """What ``participant`` holds; nothing where that is not known."""
        return self._held.get(participant, Holding())

    def confirm(self, participant: int, holding: Holding) -> None:
        """``participant`` said that it holds this."""
        self._held[participant] = holding

    def forget(self, participant: int) -> None:
        """What ``participant`` holds is not known any more: it will get every expert."""
        self._held[participant] = Holding()

    def in_order(self, replies: Iterable[Message]) -> Iterable[Message]:
        """Replies by participant where all are at hand: the order of addition decides the last bits of a mean.

        An engine that gives replies as they are made (the in-process one) gives them in this order already.
        """
        return sorted(replies, key=self.sender) if isinstance(replies, list) else replies
