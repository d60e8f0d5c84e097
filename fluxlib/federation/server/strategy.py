"""The server's part of a round as a Flower :class:`flwr.serverapp.strategy.Strategy`.

``configure_train`` assigns roles and makes one message per sampled participant, with the delta that participant
lacks. ``aggregate_train`` takes replies one at a time, refuses what must not be aggregated, adds the rest into a
running mean per expert and applies it to the global model. Neither holds more than one reply or one message at a
time, so the server's memory does not grow with the number of participants.

Paper: section 3, steps of the server; section 6, per-expert aggregation.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fluxlib import roles, seeding
from fluxlib.config import RunConfig
from fluxlib.federation.protocol import messages
from fluxlib.federation.protocol.messages import Instruction, ProfileReport
from fluxlib.federation.protocol.privacy import Guard
from fluxlib.federation.protocol.sync import ExpertStore, Holding
from fluxlib.federation.server.outcome import Download, FirstProfile, Outcome, RoundOutcome
from fluxlib.federation.server.replies import DAMAGED, Expected, Rejected, read_reply
from fluxlib.federation.server.robust import Aggregate, make_aggregate
from fluxlib.federation.server.roster import Roster
from fluxlib.methods.base import Budget, ExpertKey, Method, Roles

log = logging.getLogger(__name__)


class FluxStrategy(Strategy):
    """Per-expert federated averaging with role assignment and delta synchronisation.

    Args:
        config: the run.
        method: what assigns roles; participants run the method of the same name.
        store: the global model.
        budgets: one per participant.

    ``roster`` must know every participant before anything is sent.
    """

    def __init__(self, config: RunConfig, method: Method, store: ExpertStore, budgets: Sequence[Budget]) -> None:
        self.config = config
        self.method = method
        self.store = store
        self.budgets = list(budgets)
        self.roster = Roster()
        self.profiled: set[int] = set()
        self.role_state = roles.RoleState.start(torch.ones(config.federation.participants, *store.shape))
        self.guard = Guard(config)
        self.aggregating_s = 0.0
        self.last: RoundOutcome | None = None
        self._config_text = config.model_dump_json()
        self._current: dict[int, Outcome] = {}
        self._resync: list[int] = []
        self._profiles: dict[int, FirstProfile] = {}

    # Before a round: who takes part, and what the server must know of them first.

    def sample(self, server_round: int) -> list[int]:
        """Participants of this round, in increasing order."""
        count = self.config.federation.participants_per_round or self.config.federation.participants
        chance = seeding.generator(self.config.seed, "sample", server_round)
        return sorted(torch.randperm(self.config.federation.participants, generator=chance)[:count].tolist())

    def epsilon(self, server_round: int) -> float:
        """Share of the budget that exploits in this round (counted from 1)."""
        return roles.epsilon_schedule(server_round - 1, self.config.federation.rounds, self.config.roles.epsilon)

    def configure_profile(self, server_round: int, participants: Iterable[int]) -> Iterator[Message]:
        """Ask participants of whom no utilities are known for a profile, if the method uses one."""
        for participant in participants:
            if self.method.profiles and participant not in self.profiled:
                message, download = self._message(messages.PROFILE, server_round, participant)
                self._profiles[participant] = FirstProfile(download)
                yield message

    def aggregate_profile(self, server_round: int, replies: Iterable[Message]) -> None:
        """First utilities from the replies; a participant that fails here keeps uniform ones for now."""
        first = self.role_state.first.clone()
        for reply in replies:
            participant = self.roster.sender(reply)
            if participant not in self._profiles:
                continue
            try:
                if reply.has_error():
                    raise ValueError(reply.error.reason)
                if messages.asks_for_resync(reply.content):
                    self.roster.forget(participant)
                    continue
                report = ProfileReport.from_records(reply.content)
                first[participant] = roles.first_utilities(report.frequency.reshape(self.store.shape))
            except DAMAGED as error:
                log.warning("profile of participant %d refused: %s", participant, error)
                continue
            asked = self._profiles[participant]
            held = asked.download.after
            if held is not None and (report.version, report.digest) == (held.version, held.digest):
                self.roster.confirm(participant, held)
            self.profiled.add(participant)
            self._profiles[participant] = replace(
                asked,
                work=report.work,
                seconds=sum(report.phases_s.values()),
            )
        self.role_state = replace(self.role_state, first=first)

    # Training.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """One message per sampled participant, made when it is sent; ``arrays`` is not used, the store is."""
        participants = self.sample(server_round)
        assigned = self.method.assign(
            select(self.role_state, participants),
            [self.budgets[participant] for participant in participants],
            self.epsilon(server_round),
            seeding.generator(self.config.seed, "assign", server_round),
            self.config,
        )
        self._current, self._resync = {}, []
        for row, participant in enumerate(participants):
            part = Roles(assigned.exploit[row], assigned.explore[row])
            outcome = Outcome(participant, part, self.budgets[participant])
            if participant in self._profiles:
                outcome.count_first_profile(self._profiles.pop(participant))
            self._current[participant] = outcome
        return (self._train_message(server_round, participant) for participant in participants)

    def configure_resync(self, server_round: int) -> Iterator[Message]:
        """The same request again, with every expert, to those who asked for it."""
        asked, self._resync = self._resync, []
        return (self._train_message(server_round, participant) for participant in asked)

    def notice_resync(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Pass replies on, except those that ask for every expert anew; :meth:`configure_resync` answers these."""
        for reply in replies:
            participant = self.roster.sender(reply)
            if reply.has_content() and messages.asks_for_resync(reply.content) and participant in self._current:
                self.roster.forget(participant)
                self._resync.append(participant)
            else:
                yield reply

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take replies in, refuse bad ones by name, apply each expert's combined change times the server's step size.

        Returns the new values of the experts that changed, and the round's metrics.

        Raises:
            RunFailed: fewer good replies than ``min_replies_frac`` of those asked; nothing is applied.
        """
        mean = make_aggregate(self.config)
        utilities = torch.full_like(self.role_state.measured, math.nan)
        extra: list[tuple[int, str]] = []
        for reply in self.roster.in_order(replies):
            self._accept(server_round, reply, mean, utilities, extra)
        self.aggregating_s = time.time()
        changes = mean.result()
        self.last = RoundOutcome(
            server_round,
            self.epsilon(server_round) if self.method.explores else math.nan,
            tuple(self._current.values()),
            tuple(extra),
            len(changes),
        )
        self.last.require(self.config.federation.min_replies_frac)
        changes = self.guard.finish(server_round, changes, mean.num_tuners, len(self.last.accepted))
        self.store.apply(changes)
        self._remember_utilities(utilities)
        num_samples = sum(outcome.num_samples for outcome in self.last.accepted)
        return self.store.record(changes), MetricRecord(
            {"train_loss": self.last.train_loss, "num-examples": num_samples}
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: the full global model is evaluated on the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, see :meth:`configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Log what this run is."""
        layers, experts = self.store.shape
        tuned = sorted({budget.num_tuned for budget in self.budgets})
        log.info(
            "%s: %d participants, %d MoE layers of %d experts, budgets of %s tuned experts",
            self.config.run_id, self.config.federation.participants, layers, experts,
            f"{tuned[0]} to {tuned[-1]}" if len(tuned) > 1 else tuned[0],
        )  # fmt: skip

    # Details.

    def _message(
        self, kind: str, server_round: int, participant: int, outcome: Outcome | None = None
    ) -> tuple[Message, Download]:
        held = self.roster.held(participant)
        merged = self._merged(outcome) if self.config.wire.merged == "4bit" else frozenset()
        delta = self.store.delta(held.version, held.digest, held.approximate, merged)
        bound = self.guard.bound if outcome else None
        assigned, budget = (outcome.roles, outcome.budget) if outcome else (None, None)
        header = (self._config_text, server_round, participant, self.store.wire)
        instruction = Instruction(*header, delta, assigned, budget, bound)
        content, group = instruction.to_records(), str(server_round)
        message = Message(content, self.roster.nodes[participant], kind, group_id=group)
        return message, Download.of(delta, self.store.wire)

    def _merged(self, outcome: Outcome | None) -> frozenset[ExpertKey]:
        """Experts that a participant neither tunes nor probes; before training that is not known, and all may be."""
        if outcome is None:
            return frozenset(self.store.keys)
        kept = outcome.roles.exploit | outcome.roles.explore
        return frozenset((layer, expert) for layer, expert in (~kept).nonzero().tolist())

    def _train_message(self, server_round: int, participant: int) -> Message:
        outcome = self._current[participant]
        message, download = self._message(messages.TRAIN, server_round, participant, outcome)
        outcome.download = outcome.download.then(download)
        outcome.sent_s = time.time()
        return message

    def _accept(
        self,
        server_round: int,
        reply: Message,
        mean: Aggregate,
        utilities: Tensor,
        extra: list[tuple[int, str]],
    ) -> None:
        participant = self.roster.sender(reply)
        outcome = self._current.get(participant)
        if outcome is None or outcome.rejected != "missing":
            reason = "unknown" if outcome is None else "duplicate"
            extra.append((participant, reason))
            log.warning("round %d: reply of participant %d refused: %s", server_round, participant, reason)
            return
        try:
            report = read_reply(reply, self._expected(server_round, outcome))
        except Rejected as error:
            outcome.rejected, outcome.detail = error.reason, error.detail
            if error.reason == "stale":
                self.roster.forget(participant)
            outcome.uplink_bytes += _payload(reply)
            log.warning("round %d: reply of participant %d refused: %s", server_round, participant, error)
            return
        update = report.update
        outcome.accept(update, report.num_bytes)
        outcome.spans, outcome.received_s = report.spans, time.time()
        assert outcome.download.after is not None
        self.roster.confirm(participant, outcome.download.after)
        mean.add(*self.guard.admit(update.changes, update.tokens, report.within))
        utilities[participant] = update.utilities

    def _expected(self, server_round: int, outcome: Outcome) -> Expected:
        held = outcome.download.after or Holding()
        return Expected(
            outcome.participant,
            server_round,
            held.version,
            held.digest,
            self.config.wire.uplink,
            outcome.roles.exploit,
            self.store.shapes,
            self.config.training.local_steps * self.config.training.batch_size * self.config.training.max_tokens,
        )

    def _remember_utilities(self, utilities: Tensor) -> None:
        tuned = torch.zeros_like(utilities, dtype=torch.bool)
        explored = torch.zeros_like(tuned)
        assert self.last is not None
        for outcome in self.last.accepted:
            tuned[outcome.participant] = outcome.roles.exploit
            explored[outcome.participant] = outcome.roles.explore
        at_least = [
            roles.num_probed(self.config.roles, int(count)) if self.method.explores else 0
            for count in explored.sum(dim=(1, 2))
        ]
        asked = tuned if self.method.utilities else torch.zeros_like(tuned)
        optional, due = tuned | explored, torch.tensor(at_least)
        self.role_state = roles.update(self.role_state, utilities, asked, optional, due)
        faults = self.role_state.faults
        for fault in faults:
            log.warning("participant %d: %d %s utilities", fault.participant, fault.count, fault.kind)
        for outcome in self.last.accepted:
            mine = [fault for fault in faults if fault.participant == outcome.participant]
            outcome.utility_faults = ", ".join(f"{fault.count} {fault.kind}" for fault in mine)
        self.last = replace(self.last, faults=faults)


def select(state: roles.RoleState, participants: Sequence[int]) -> roles.RoleState:
    """The role state of some participants, in the given order."""
    rows = torch.as_tensor(participants)
    return replace(
        state,
        measured=state.measured[rows],
        first=state.first[rows],
        measured_round=state.measured_round[rows],
    )


def _payload(reply: Message) -> int:
    """Bytes of a refused reply, as far as it can be read."""
    try:
        return sum(len(array.data) for array in reply.content["arrays"].values())
    except DAMAGED:
        return 0
