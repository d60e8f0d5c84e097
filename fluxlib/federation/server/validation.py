"""What a reply must satisfy before it may change the global model, and the name of every reason to refuse one."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import Message
from torch import Tensor

from fluxlib.federation.protocol.messages import MOST, TrainReport, asks_for_resync
from fluxlib.federation.protocol.sync import ModelVersion
from fluxlib.federation.protocol.wire import Form, Shapes
from fluxlib.methods.base import ExpertKey, Update

# What reading damaged or hostile records may raise; anything else is a fault of this library and is not hidden.
DAMAGED = (
    KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, MemoryError, zipfile.BadZipFile,
)  # fmt: skip

MOST_NORM = 1e6
"""Largest norm of a change to one tensor that is believed: finite numbers beyond it ruin a model as surely as NaN."""

REASONS: dict[str, str] = {
    "error": "the participant reported an error instead of a result",
    "missing": "no reply came within the time limit",
    "duplicate": "a second reply to the same request",
    "unknown": "a reply to no request of this round, or from another participant than was asked",
    "stale": "trained on another version, or in another round, than asked",
    "malformed": "not the records a reply has, or bytes that are not what they claim to be",
    "unknown_expert": "a change to an expert or tensor that the model does not have",
    "unassigned_expert": "a change to an expert that this participant was not to tune",
    "incomplete": "an expert with some of its tensors left out",
    "wrong_shape": "a tensor of another shape than the model's",
    "not_finite": "NaN or infinity among changes, loss, tokens or utilities, or a change or count beyond all reason",
    "negative": "a negative number of tokens or samples",
}
"""Why a reply is refused; the key is what the ``participants`` table holds in ``rejected``."""


class Rejected(ValueError):
    """A reply that must not be aggregated; ``reason`` is one of :data:`REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"reason is {reason!r}, allowed are {', '.join(REASONS)}")
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True)
class Expected:
    """What a good reply of one participant looks like: who, when, trained on what, allowed to change what."""

    participant: int
    round: int
    held: ModelVersion
    wire: Form
    assigned: Tensor
    """Bool ``[layers, experts]``: experts this participant was to tune."""
    shapes: Shapes
    """Shapes of every tensor of every expert of the model."""
    most_tokens: float = MOST
    """Tokens that may have been routed to one expert: changes are averaged in proportion to them."""


def read_reply(reply: Message, expected: Expected) -> TrainReport:
    """A reply as a report that may be aggregated.

    Raises:
        Rejected: any other reply, with the reason.
    """
    if reply.has_error():
        raise Rejected("error", reply.error.reason or f"code {reply.error.code}")
    if asks_for_resync(reply.content):
        raise Rejected("stale", "what it holds is not what it should hold, even after it was sent every expert")
    try:
        report = TrainReport.from_records(reply.content, expected.wire, expected.shapes)
    except DAMAGED as error:
        raise Rejected("malformed", f"{type(error).__name__}: {error}") from None
    if report.participant != expected.participant:
        raise Rejected("unknown", f"participant {expected.participant} answered as {report.participant}")
    if (report.round, report.held) != (expected.round, expected.held):
        raise Rejected(
            "stale",
            f"trained on version {report.held.number} in round {report.round}, asked for version "
            f"{expected.held.number} in round {expected.round}",
        )
    check_numbers(report.update, expected)
    for key, tensors in report.update.changes.items():
        check_expert(key, tensors, expected)
    return report


def check_numbers(update: Update, expected: Expected) -> None:
    """Refuse an account that must not count.

    Raises:
        Rejected: wrong_shape, not_finite or negative.
    """
    shape = tuple(expected.assigned.shape)
    for name, table in (("tokens", update.tokens), ("utilities", update.utilities)):
        if tuple(table.shape) != shape:
            raise Rejected("wrong_shape", f"{name} must be {shape}, got {tuple(table.shape)}")
    if not abs(update.loss) <= MOST or update.num_samples > MOST:
        raise Rejected("not_finite", f"training loss is {update.loss}, samples are {update.num_samples}")
    if not (update.tokens.abs() <= expected.most_tokens).all() or torch.isinf(update.utilities).any():
        raise Rejected("not_finite", f"tokens beyond {expected.most_tokens:g}, or utilities that are not finite")
    if update.num_samples < 0 or (update.tokens < 0).any() or (update.utilities < 0).any():
        raise Rejected("negative", "samples, tokens or utilities are negative")


def check_expert(key: ExpertKey, tensors: Mapping[str, Tensor], expected: Expected) -> None:
    """Refuse a change that must not be aggregated.

    Raises:
        Rejected: unknown_expert, unassigned_expert, incomplete, wrong_shape or not_finite.
    """
    where, shapes = f"layer {key[0]}, expert {key[1]}", expected.shapes.get(key)
    if shapes is None:
        raise Rejected("unknown_expert", f"{where} does not exist")
    if not expected.assigned[key]:
        raise Rejected("unassigned_expert", f"{where} was not to be tuned by this participant")
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise Rejected("unknown_expert", f"{where} has no tensor {extra[0]!r}, it has {', '.join(shapes)}")
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise Rejected("incomplete", f"{where} lacks {', '.join(missing)}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise Rejected("wrong_shape", f"{where}, {name} must be {shapes[name]}, got {tuple(tensor.shape)}")
        if not believable(tensor):
            raise Rejected("not_finite", f"{where}, {name} holds NaN or infinity, or its norm is beyond {MOST_NORM:g}")


def believable(tensor: Tensor) -> bool:
    """Whether the norm is at most :data:`MOST_NORM`; NaN and infinity are not. One pass, no mask."""
    return bool(torch.linalg.vector_norm(tensor, dtype=torch.float32) <= MOST_NORM)
