"""The Flower app of every participant, on every engine; what it does is in :mod:`fluxlib.federation.participant`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fluxlib.federation import disk, messages, participant, time_limit

app = ClientApp()


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Say which participant this is and what it holds."""
    return participant.kept_on_disk(participant.join)(message, context)


@app.query("profile")
def profile(message: Message, context: Context) -> Message:
    """Profile the model before the first round, for first utilities."""
    return participant.kept_on_disk(_in_time(participant.profile))(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local work."""
    return participant.kept_on_disk(_repeatable(_in_time(participant.train)))(message, context)


_DONE, _BEFORE = "round-done", "before-"
_SHARED = ("held", "experts", "run", _DONE)


def _repeatable(work: Callable[[Message, Context], Message]) -> Callable[[Message, Context], Message]:
    """``work`` that gives the same reply when a server that was killed asks for the same round once more.

    What a participant keeps on disk outlives the server's last round. So it also keeps what it had before that round
    (its profile, and what it owes by rounding), and goes back to it. The experts it holds need no going back: a delta
    that starts earlier than needed leads to the same.
    """

    def repeatable(message: Message, context: Context) -> Message:
        if not context.node_config.get(disk.STATE_DIR):  # elsewhere nothing outlives the server
            return work(message, context)
        number, state = int(message.content["config"]["round"]), context.state
        if _DONE in state and int(state[_DONE]["number"]) >= number:
            earlier = {name.removeprefix(_BEFORE): state[name] for name in list(state) if name.startswith(_BEFORE)}
            _replace_own(state, earlier)
        before = {name: state[name] for name in state if _is_own(name)}
        reply = work(message, context)
        state = context.state
        for name in [name for name in state if name.startswith(_BEFORE)]:
            del state[name]
        for name, record in before.items():
            state[_BEFORE + name] = record
        state[_DONE] = ConfigRecord({"number": number})
        return reply

    return repeatable


def _is_own(name: str) -> bool:
    return name not in _SHARED and not name.startswith(_BEFORE)


def _replace_own(state: RecordDict, records: Mapping[str, Any]) -> None:
    for name in [name for name in state if _is_own(name)]:
        del state[name]
    for name, record in records.items():
        state[name] = record


def _in_time(work: Callable[[Message, Context], Message]) -> Callable[[Message, Context], Message]:
    """``work``, unless it takes longer than the run allows; what fails or hangs leaves the node's state as it was.

    A SuperNode does one message after another: without a limit here, one that hangs would block all that follow.
    """

    def limited(message: Message, context: Context) -> Message:
        limit_s = messages.parse_config(str(message.content["config"]["run"])).round_timeout_s
        state = RecordDict({name: record.copy() for name, record in context.state.items()})
        own = Context(context.run_id, context.node_id, context.node_config, state, context.run_config)
        try:
            reply = time_limit.call(limit_s, work, message, own)
        except time_limit.TimeLimitExceeded:
            participant.forget_workspace()  # it may still be at work there
            raise
        context.state = own.state
        return reply

    return limited
