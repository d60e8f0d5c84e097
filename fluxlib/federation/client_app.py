"""The Flower app of every participant, on every engine; what it does is in :mod:`fluxlib.federation.participant`."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fluxlib.federation import participant

app = ClientApp()


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Say which participant this is and what it holds."""
    return participant.kept_on_disk(participant.join)(message, context)


@app.query("profile")
def profile(message: Message, context: Context) -> Message:
    """Profile the model before the first round, for first utilities."""
    return participant.kept_on_disk(participant.profile)(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local work."""
    return participant.kept_on_disk(participant.train)(message, context)
