"""Who is there: every node says which participant it is and what it holds, before the first round."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from fluxlib.config import RunConfig
from fluxlib.devices import catalogue
from fluxlib.federation.engines.exchange import is_from_a_node
from fluxlib.federation.engines.local_grid import LocalGrid
from fluxlib.federation.protocol import messages
from fluxlib.federation.protocol.messages import Instruction, JoinReport
from fluxlib.federation.protocol.sync import Delta, ExpertStore
from fluxlib.federation.server.outcome import RunFailed
from fluxlib.federation.server.replies import DAMAGED
from fluxlib.federation.server.roster import Member

log = logging.getLogger(__name__)

POLL_S = 0.5


def join(grid: Grid, config: RunConfig, store: ExpertStore) -> dict[int, Member]:
    """All participants of the run, by number; waits until enough nodes are connected.

    Raises:
        RunFailed: a participant is missing after ``config.join_timeout_s``, two nodes claim the same part of the data,
            or a node has another base model.
    """
    found: dict[int, Member] = {}
    problems: list[str] = []
    asked: set[int] = set()
    waiting: set[str] = set()
    deadline = time.monotonic() + config.federation.join_timeout_s
    while True:
        nodes = [node for node in grid.get_node_ids() if node not in asked]
        asked.update(nodes)
        for reply in _answers(grid, _invitations(nodes, config, store), waiting):
            _take(reply, config, store, found, problems)
        settled = problems and not nodes and not waiting
        if len(found) >= config.federation.participants or settled or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    if len(found) < config.federation.participants:
        missing = [str(number) for number in range(config.federation.participants) if number not in found]
        listed = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        reason = f"; {problems[0]}" if problems else ""
        raise RunFailed(
            f"{len(found)} of participants={config.federation.participants} joined within {config.federation.join_timeout_s:g} s; "
            f"missing: {listed}{reason}"
        )
    return found


def _answers(grid: Grid, invitations: Iterable[Message], waiting: set[str]) -> Iterator[Message]:
    """Answers that are there by now; ``waiting`` holds the messages that are not answered yet.

    A node that is gone must not hold up the others, so nobody is waited for here.
    """
    if isinstance(grid, LocalGrid):
        yield from grid.send_and_receive(invitations)
        return
    for invitation in invitations:
        waiting.update(identifier for identifier in grid.push_messages([invitation]) if identifier)
    for reply in grid.pull_messages(list(waiting)) if waiting else []:
        waiting.discard(reply.metadata.reply_to_message_id)
        if is_from_a_node(reply):
            yield reply


def _invitations(nodes: list[int], config: RunConfig, store: ExpertStore) -> Iterator[Message]:
    nothing = Delta(ArrayRecord(), 0, 0, store.digest_of_version[0], 0, 0)
    instruction = Instruction(config.model_dump_json(), 0, -1, store.wire, nothing)
    return (Message(instruction.to_records(), node, messages.JOIN, group_id="0") for node in nodes)


def _take(reply: Message, config: RunConfig, store: ExpertStore, found: dict[int, Member], problems: list[str]) -> None:
    node = reply.metadata.src_node_id
    try:
        if reply.has_error():
            raise ValueError(reply.error.reason)
        report = JoinReport.from_records(reply.content)
        if report.frozen_digest != store.frozen_digest:
            raise ValueError(f"participant {report.participant} has another base model than the server")
        if report.participant < 0:
            raise ValueError(f"participant is {report.participant}, allowed is 0 or more")
        if report.participant in found:
            raise ValueError(f"participant {report.participant} joined twice; each needs a partition-id of its own")
        if report.device and report.device not in catalogue.DEVICES:
            allowed = ", ".join(catalogue.DEVICES)
            raise ValueError(f"participant {report.participant}: device is {report.device!r}, allowed are {allowed}")
    except DAMAGED as error:
        problems.append(f"node {node}: {error}")
        log.warning("node %d cannot take part: %s", node, error)
        return
    if report.participant < config.federation.participants:
        found[report.participant] = Member(node, report.holding, report.device)
