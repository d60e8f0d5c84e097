"""The Flower app of every participant, on every engine: a message in, a reply out.

What the work is stands in :mod:`fluxlib.federation.client.participant`; what is around it, here in :func:`answer`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fluxlib.federation.client import background_profile, local_copy, node_state, participant, time_limit
from fluxlib.federation.protocol import messages
from fluxlib.federation.protocol.messages import Instruction

app = ClientApp()

Work = Callable[[Instruction, Context], RecordDict]


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Say which participant this is and what it holds."""
    return answer(participant.join, message, context)


@app.query("profile")
def profile(message: Message, context: Context) -> Message:
    """Profile the model before the first round, for first utilities."""
    return answer(participant.profile, message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local work."""
    return answer(participant.train, message, context)


def answer(work: Work, message: Message, context: Context) -> Message:
    """The reply to a message; with a ``state-dir``, what it changes is kept there.

    A participant's folder outlives a server that is killed. When the server asks for the same round once more, the
    participant gives the same reply again, and its state stays as it was after the first one.
    """
    instruction, kind = Instruction.from_records(message.content), message.metadata.message_type
    limit_s = None  # who joins loads the base model first
    if kind != messages.JOIN:
        if instruction.participant != (mine := participant.number_of(context)):
            raise participant.ParticipantError(f"message is for participant {instruction.participant}, this is {mine}")
        limit_s = instruction.config.federation.round_timeout_s
    folder = participant.state_folder(context)
    if folder is None:
        return Message(_in_time(limit_s, work, instruction, context), reply_to=message)
    if "held" not in context.state:
        node_state.restore(folder, context.state)
    content = _given_before(folder / "reply", instruction) if kind == messages.TRAIN else None
    if content is None:
        content = _in_time(limit_s, work, instruction, context)
        node_state.keep(folder, context.state)
        if kind == messages.TRAIN and not messages.asks_for_resync(content):
            node_state.keep(folder / "reply", RecordDict({**content, "asked": _asked(instruction)}))
            background_profile.start(folder, context.state)
    return Message(content, reply_to=message)


def _asked(instruction: Instruction) -> ConfigRecord:
    return ConfigRecord({"run": instruction.config.numbers, "round": instruction.round})


def _given_before(folder: Path, instruction: Instruction) -> RecordDict | None:
    kept = RecordDict()
    if node_state.restore(folder, kept) and kept.pop("asked") == _asked(instruction):
        return kept
    return None


def _in_time(limit_s: float | None, work: Work, instruction: Instruction, context: Context) -> RecordDict:
    """What ``work`` gives, unless it takes longer than ``limit_s``; what fails or hangs leaves the state as it was.

    A SuperNode does one message after another: without a limit here, one that hangs would block all that follow.
    """
    state = RecordDict({name: record.copy() for name, record in context.state.items()})
    own = Context(context.run_id, context.node_id, context.node_config, state, context.run_config)
    try:
        content = time_limit.call(limit_s, _or_resync, work, instruction, own)
    except BaseException:
        local_copy.forget_workspace()  # the model may be half customised, or a call that hangs still at work there
        raise
    context.state = own.state
    return content


def _or_resync(work: Work, instruction: Instruction, context: Context) -> RecordDict:
    try:
        return work(instruction, context)
    except local_copy.ResyncNeeded:
        local_copy.LocalCopy.forget(context.state)
        return messages.resync_request()
