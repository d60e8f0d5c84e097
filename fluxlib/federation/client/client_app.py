"""The Flower app of every participant, on every engine: a message in, a reply out.

What the work is stands in :mod:`fluxlib.federation.client.participant`; what is around it, here in :func:`answer`.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fluxlib.federation.client import background_profile, local_copy, node_state, participant
from fluxlib.federation.protocol import messages, parcels
from fluxlib.federation.protocol.messages import Instruction

app = ClientApp(mods=[parcels.use_parcels])

Result = TypeVar("Result")
WORK: dict[str, Callable[[Instruction, Context], RecordDict]] = {
    messages.JOIN: participant.join,
    messages.PROFILE: participant.profile,
    messages.TRAIN: participant.train,
}
"""What is done on a message of each type."""


class TimeLimitExceeded(TimeoutError):
    """A participant took longer than it may; the message says how long that was."""


@app.query("join")
@app.query("profile")
@app.train()
def answer(message: Message, context: Context) -> Message:
    """The reply to a message; with a ``state-dir``, what it changes is kept there.

    A participant's folder outlives a server that is killed. When the server asks for the same round once more, the
    participant gives the same reply again, and its state stays as it was after the first one.
    """
    instruction, kind = Instruction.from_records(message.content), message.metadata.message_type
    if kind != messages.JOIN and instruction.participant != (mine := participant.number_of(context)):
        raise participant.ParticipantError(f"message is for participant {instruction.participant}, this is {mine}")
    folder = participant.state_folder(context)
    if folder is None:
        return Message(_work(kind, instruction, context), reply_to=message)
    state, reply, given = folder / node_state.STATE, folder / "reply.safetensors", RecordDict()
    asked = ConfigRecord({"run": instruction.config.numbers, "round": instruction.round})
    if "held" not in context.state:
        node_state.restore(state, context.state)
    if kind == messages.TRAIN and node_state.restore(reply, given) and given.pop("asked") == asked:
        return Message(given, reply_to=message)
    content = _work(kind, instruction, context)
    node_state.keep(state, context.state)
    if kind == messages.TRAIN and not messages.asks_for_resync(content):
        node_state.keep(reply, RecordDict({**content, "asked": asked}))
        background_profile.start(folder, context.state)
    return Message(content, reply_to=message)


def _work(kind: str, instruction: Instruction, context: Context) -> RecordDict:
    """What the participant does, unless it takes too long; what fails or hangs leaves the state as it was.

    A SuperNode does one message after another: without a limit here, one that hangs would block all that follow. Who
    joins has none, since it loads the base model first.
    """
    limit_s = None if kind == messages.JOIN else instruction.config.federation.round_timeout_s
    state = RecordDict({name: record.copy() for name, record in context.state.items()})
    own = Context(context.run_id, context.node_id, context.node_config, state, context.run_config)
    try:
        content = in_time(limit_s, WORK[kind], instruction, own)
    except local_copy.ResyncNeeded:
        local_copy.LocalCopy.forget(state)
        content = messages.resync_request()
    except BaseException:
        local_copy.workspace.cache_clear()  # the model may be half customised, or a call that hangs still at work there
        raise
    context.state = state
    return content


def in_time(limit_s: float | None, function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)``, or what it raises; TimeLimitExceeded: it is not back within ``limit_s``, if given.

    A Python call cannot be interrupted from outside, so it runs in a thread of its own. When its time is over, an
    exception ends that thread as soon as it is back in Python; a call that never comes back from C is left behind.
    Either way the caller goes on, and must not use anything that the call may still be writing to.
    """
    if limit_s is None:
        return function(*arguments)
    outcome: Future[Result] = Future()
    start, late = time.monotonic(), TimeLimitExceeded(f"it took longer than the {limit_s:g} s it may take")

    def work() -> None:
        try:
            found = function(*arguments)
            if time.monotonic() - start > limit_s:  # what came back too late on a busy machine
                raise late
            outcome.set_result(found)
        except BaseException as error:  # given to the caller, who decides
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="limited", daemon=True)
    thread.start()
    try:
        thread.join(limit_s)
    finally:  # also when who waits is interrupted
        if not outcome.done():
            # Of all exceptions the one that ends a thread; no handler of ``Exception`` keeps it alive.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    if not outcome.done():
        raise late
    return outcome.result()
