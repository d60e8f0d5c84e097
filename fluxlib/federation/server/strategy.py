"""The server's part of a round, in its order: sample, profile, assign, send, receive, check, aggregate, apply.

Requests are made when they are sent and replies are taken in one at a time: each is checked, its changes are added
into a running mean per expert, and it is let go. So the server's memory does not grow with the number of participants.

Paper: section 3, steps of the server; section 6, per-expert aggregation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fluxlib import methods, roles, seeding
from fluxlib.config import RunConfig
from fluxlib.federation.checks import make_budgets
from fluxlib.federation.engines.grid import send_and_receive
from fluxlib.federation.protocol import messages
from fluxlib.federation.protocol.messages import Instruction, ProfileReport
from fluxlib.federation.protocol.sync import ExpertStore, ModelVersion
from fluxlib.federation.protocol.wire import moved, whole
from fluxlib.federation.results import Participation, RoundResult
from fluxlib.federation.server.aggregation import ExpertMean, RobustAggregate, clip
from fluxlib.federation.server.join import Member
from fluxlib.federation.server.validation import Expected, Rejected, check_work, most_counts, read_reply
from fluxlib.io import brief
from fluxlib.methods.base import ExpertKey

log = logging.getLogger(__name__)

NOBODY = -1
"""Number of a node that is no participant of this round."""

ROLES = ("measured", "first", "measured_round")
"""Fields of the role state that have a row for each participant."""


class FluxStrategy:
    """Per-expert federated averaging; ``members`` must name every participant before the first round."""

    def __init__(self, grid: Grid, config: RunConfig, store: ExpertStore) -> None:
        self.grid, self.config, self.store = grid, config, store
        self.method = methods.get(config.method)
        asked = config.wire.max_staleness
        self.max_staleness = self.method.max_staleness if asked is None else asked
        self.budgets = make_budgets(config, *store.shape)
        self.members: dict[int, Member] = {}
        self.profiled: set[int] = set()
        self.role_state = roles.RoleState.start(torch.ones(config.federation.participants, *store.shape))
        self.most = most_counts(config, self.role_state.first[0].numel())
        self.current: dict[int, Participation] = {}
        self.last: RoundResult | None = None
        """The newest round, also one that failed."""
        self._senders: dict[int, int] = {}
        self._again: list[int] = []

    def run_round(self, number: int) -> RoundResult:
        """One round, counted from 1; RunFailed: fewer good replies than ``min_replies_frac``, nothing is applied."""
        participants = self.sample(number)
        self.profile(number, [one for one in participants if one not in self.profiled])
        self.assign(number, participants)
        return self.aggregate(number, self.receive(number))

    def sample(self, number: int) -> list[int]:
        """Participants of this round, in increasing order; nothing is known of their part yet."""
        federation, nothing = self.config.federation, torch.zeros(self.store.shape, dtype=torch.bool)
        chance = seeding.generator(self.config.seed, "sample", number)
        count = federation.participants_per_round or federation.participants
        sampled = sorted(torch.randperm(federation.participants, generator=chance)[:count].tolist())
        self.current = {one: Participation(one, self.budgets[one], roles.Roles(nothing, nothing)) for one in sampled}
        self._senders = {self.members[one].node_id: one for one in sampled}
        return sampled

    def epsilon(self, number: int) -> float:
        """Share of the budget that exploits in this round."""
        return roles.epsilon_schedule(number - 1, self.config.federation.rounds, self.config.roles.epsilon)

    def profile(self, number: int, participants: Sequence[int]) -> None:
        """Take first utilities from profiles, if the method uses them; who fails here keeps uniform ones for now."""
        if not self.method.profiles:
            return
        first = self.role_state.first.clone()
        for reply in self._ask(messages.PROFILE, number, participants):
            sender = self.sender(reply)
            if sender == NOBODY:
                continue
            try:
                if reply.has_error():
                    raise ValueError(brief(reply.error.reason))
                if messages.asks_for_resync(reply.content):
                    self.members[sender].held = ModelVersion()
                    continue
                report = ProfileReport.from_records(reply.content)
                if report.frequency.shape != self.store.shape:
                    raise ValueError(f"frequency must be {self.store.shape}, got {tuple(report.frequency.shape)}")
                check_work(report.work, first[0].numel(), self.most)
                first[sender] = roles.first_utilities(report.frequency)
            except ValueError as error:
                log.warning("profile of participant %d refused: %s", sender, error)
                continue
            after = self.current[sender].held
            if report.held == after:
                self.members[sender].held = after
            self.current[sender].profile_work = report.work
            self.current[sender].phases_s["profile"] = sum(report.phases_s.values())
            self.profiled.add(sender)
        self.role_state = replace(self.role_state, first=first)

    def assign(self, number: int, participants: Sequence[int]) -> None:
        """Who tunes and who explores which experts."""
        state, rows = self.role_state, torch.as_tensor(participants)
        sampled = replace(state, **{name: getattr(state, name)[rows] for name in ROLES})
        budgets = [self.budgets[one] for one in participants]
        chance = seeding.generator(self.config.seed, "assign", number)
        assigned = self.method.assign(sampled, budgets, self.epsilon(number), chance, self.config)
        for row, one in enumerate(participants):
            self.current[one].roles = assigned[row]

    def receive(self, number: int) -> Iterator[Message]:
        """Replies to the round's requests; who asks for every expert anew is asked once more, with every expert."""
        self._again = []
        yield from self._ask(messages.TRAIN, number, list(self.current))
        yield from self._ask(messages.TRAIN, number, self._again)

    def aggregate(self, number: int, replies: Iterable[Message]) -> RoundResult:
        """Take replies in, refuse bad ones by name, apply each expert's combined change to the global model."""
        how = self.config.aggregation
        mean: ExpertMean | RobustAggregate
        mean = ExpertMean() if how.rule == "mean" else RobustAggregate(how.rule, how.trim_frac)
        utilities = torch.full_like(self.role_state.measured, math.nan)
        extra: list[tuple[int, str]] = []
        for reply in replies:
            sender = self.sender(reply)
            everything = sender != NOBODY and reply.has_content() and messages.asks_for_resync(reply.content)
            if everything and sender not in self._again:
                self.members[sender].held = ModelVersion()
                self._again.append(sender)
            elif reason := self._accept(number, reply, sender, mean, utilities):
                extra.append((sender, reason))
        changed = moved(mean.result())
        epsilon = self.epsilon(number) if self.method.explores else math.nan
        self.last = result = RoundResult(number, epsilon, tuple(self.current.values()), tuple(extra), len(changed))
        result.require(self.config.federation.min_replies_frac)
        self.store.apply(changed)
        self._remember_utilities(result, utilities)
        return result

    def sender(self, reply: Message) -> int:
        """The participant of this round that a reply came from, or :data:`NOBODY`."""
        return self._senders.get(reply.metadata.src_node_id, NOBODY)

    def _ask(self, kind: str, number: int, participants: Iterable[int]) -> Iterator[Message]:
        """Replies to a request for each, which is made when it is sent."""
        requests = (self._message(kind, number, self.current[one]) for one in participants)
        return send_and_receive(self.grid, requests, self.config.federation.round_timeout_s)

    def _message(self, kind: str, number: int, part: Participation) -> Message:
        """A request with the experts that the participant lacks; before training it has no roles."""
        member, wire = self.members[part.participant], self.config.wire
        lazy: frozenset[ExpertKey] = frozenset()
        if self.max_staleness:  # of experts that it does not tune an older copy will do
            lazy = frozenset((layer, expert) for layer, expert in (~part.roles.exploit).nonzero().tolist())
        delta = self.store.delta(member.held, lazy, self.max_staleness)
        part.send(delta, wire.downlink)
        instruction = Instruction(self.config, number, part.participant, delta)
        if kind == messages.TRAIN:
            instruction = replace(instruction, roles=part.roles, budget=part.budget)
        return self.grid.create_message(instruction.to_records(), kind, member.node_id, str(number))

    def _accept(
        self, number: int, reply: Message, sender: int, mean: ExpertMean | RobustAggregate, utilities: Tensor
    ) -> str:
        """Add a good reply to ``mean`` and ``utilities``; the reason why a reply that nobody asked for is refused."""
        part = self.current.get(sender)
        if part is None or part.rejected != "missing":
            reason = "unknown" if part is None else "duplicate"
            log.warning("round %d: reply of participant %d refused: %s", number, sender, reason)
            return reason
        form, shapes = self.config.wire.uplink, self.store.shapes
        expected = Expected(sender, number, part.held, form, part.roles.exploit, shapes, self.most)
        try:
            report = read_reply(reply, expected)
        except Rejected as error:
            part.rejected, part.detail = error.reason, error.detail
            with suppress(Exception):  # as far as it can be read
                part.uplink_bytes += sum(len(array.data) for array in reply.content["arrays"].values())
            if error.reason == "stale":
                self.members[sender].held = ModelVersion()
            log.warning("round %d: reply of participant %d refused: %s", number, sender, error)
            return ""
        part.accept(report.update, report.num_bytes)
        self.members[sender].held = part.held
        changes = clip(report.update.changes, self.config.aggregation.clip_norm)
        changes = whole(changes, part.roles.exploit, form, shapes)
        mean.add(changes, report.update.tokens)
        utilities[sender] = report.update.utilities
        return ""

    def _remember_utilities(self, result: RoundResult, utilities: Tensor) -> None:
        tuned = torch.zeros_like(utilities, dtype=torch.bool)
        explored = torch.zeros_like(tuned)
        due = torch.zeros(len(tuned), dtype=torch.long)
        for part in result.accepted:
            tuned[part.participant], explored[part.participant] = part.roles.exploit, part.roles.explore
            if self.method.explores and self.method.utilities:
                due[part.participant] = roles.num_probed(self.config.roles, int(part.roles.explore.sum()))
        asked = tuned if self.method.utilities else torch.zeros_like(tuned)
        self.role_state = roles.update(self.role_state, utilities, asked, tuned | explored, due)
        for part in result.accepted:
            mine = [fault for fault in self.role_state.faults if fault.participant == part.participant]
            part.utility_faults = ", ".join(f"{fault.count} {fault.kind}" for fault in mine)
            if mine:
                log.warning("participant %d: %s utilities", part.participant, part.utility_faults)
