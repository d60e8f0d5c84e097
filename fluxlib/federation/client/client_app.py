"""The Flower app of every participant, on every engine; what it does is in :mod:`fluxlib.federation.client.participant`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fluxlib.federation.client import disk, participant, time_limit
from fluxlib.federation.protocol import messages

app = ClientApp()


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Say which participant this is and what it holds."""
    return participant.kept_on_disk(participant.join)(message, context)


@app.query("profile")
def profile(message: Message, context: Context) -> Message:
    """Profile the model before the first round, for first utilities."""
    return participant.kept_on_disk(_repeatable(_in_time(participant.profile)))(message, context)


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
        number = int(message.content["config"]["round"])
        run = messages.parse_config(str(message.content["config"]["run"])).numbers
        before = _go_back(context.state, number, run)
        reply = work(message, context)
        if message.metadata.message_type == messages.TRAIN:
            for name, record in before.items():
                context.state[_BEFORE + name] = record
            context.state[_DONE] = ConfigRecord({"number": number, "run": run})
        return reply

    return repeatable


def _go_back(state: RecordDict, number: int, run: str) -> dict[str, Any]:
    """Make ``state`` what it was before that round of that run, and give its records that are the participant's own."""
    done: Mapping[str, Any] = state[_DONE] if _DONE in state else {"number": 0, "run": ""}
    earlier = {name.removeprefix(_BEFORE): state[name] for name in list(state) if name.startswith(_BEFORE)}
    for name in [_DONE, *(_BEFORE + name for name in earlier)]:
        if name in state:
            del state[name]
    if done["run"] == run and int(done["number"]) >= number:
        _replace_own(state, earlier)
    return {name: state[name] for name in state if _is_own(name)}


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
        limit_s = messages.parse_config(str(message.content["config"]["run"])).federation.round_timeout_s
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
