"""The Flower app of every participant, on every engine; what it does is in :mod:`fluxlib.federation.participant`."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fluxlib.federation import messages, participant, time_limit

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
    return participant.kept_on_disk(_in_time(participant.train))(message, context)


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
