"""Who is there: every node says which participant it is and what it holds, before the first round."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fluxlib.config import RunConfig
from fluxlib.devices import catalogue
from fluxlib.federation.protocol import messages
from fluxlib.federation.protocol.messages import Instruction, JoinReport
from fluxlib.federation.protocol.sync import ExpertStore, ModelVersion
from fluxlib.federation.results import RunFailed
from fluxlib.io import brief, shown

log = logging.getLogger(__name__)

POLL_S = 0.5


@dataclass
class Member:
    """A participant's node, what the server believes it to hold, and its device if it said so."""

    node_id: int
    held: ModelVersion = ModelVersion()
    device: str = ""


def join(grid: Grid, config: RunConfig, store: ExpertStore) -> dict[int, Member]:
    """All participants of the run, by number; waits until enough nodes are connected, and for nobody's answer alone.

    Raises:
        RunFailed: a participant is missing after ``federation.join_timeout_s``, two nodes claim the same part of the
            data, or a node has another base model.
    """
    invitation = Instruction(config, 0, -1)
    wanted, limit_s = config.federation.participants, config.federation.join_timeout_s
    found: dict[int, Member] = {}
    problems: list[str] = []
    asked: set[int] = set()
    waiting: set[str] = set()
    deadline = time.monotonic() + limit_s
    while True:
        nodes = [node for node in grid.get_node_ids() if node not in asked]
        for node in nodes:
            message = grid.create_message(invitation.to_records(), messages.JOIN, node, "0")
            waiting.update(name for name in grid.push_messages([message]) if name)
        asked.update(nodes)
        for reply in grid.pull_messages(sorted(waiting)) if waiting else ():
            waiting.discard(reply.metadata.reply_to_message_id)
            node = reply.metadata.src_node_id
            if node not in asked:  # the SuperLink answers for a node that is gone
                continue
            try:
                number, member = _read(reply, store)
                if number in found:
                    raise ValueError(f"participant {number} joined twice; each needs a partition-id of its own")
            except ValueError as error:
                problems.append(f"node {node}: {error}")
                log.warning("node %d cannot take part: %s", node, error)
                continue
            if number < wanted:
                found[number] = member
        settled = problems and not nodes and not waiting
        if len(found) >= wanted or settled or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    if len(found) < wanted:
        missing = brief(", ".join(str(number) for number in range(wanted) if number not in found), 60)
        reason = f"; {problems[0]}" if problems else ""
        raise RunFailed(
            f"{len(found)} of federation.participants={wanted} joined within {limit_s:g} s; missing: {missing}{reason}"
        )
    return found


def _read(reply: Message, store: ExpertStore) -> tuple[int, Member]:
    """A participant's number and what it said of itself."""
    if reply.has_error():
        raise ValueError(brief(reply.error.reason))
    report = JoinReport.from_records(reply.content)
    if report.frozen_digest != store.frozen_digest:
        raise ValueError(f"participant {report.participant} has another base model than the server")
    if report.device and report.device not in catalogue.DEVICES:
        device, allowed = shown(report.device), ", ".join(catalogue.DEVICES)
        raise ValueError(f"participant {report.participant}: device is {device}, allowed are {allowed}")
    return report.participant, Member(reply.metadata.src_node_id, report.held, report.device)
