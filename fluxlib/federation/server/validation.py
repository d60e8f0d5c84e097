"""What a reply must satisfy before it may change the global model, and the name of every reason to refuse one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import Message
from torch import Tensor

from fluxlib.config import RunConfig
from fluxlib.federation.protocol.messages import MOST, TrainReport, asks_for_resync
from fluxlib.federation.protocol.sync import ModelVersion
from fluxlib.federation.protocol.wire import Form, Shapes, WireError
from fluxlib.io import brief
from fluxlib.methods.base import ExpertKey, Update, Work

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
    "not_finite": "NaN or infinity among changes, loss, tokens or utilities, or more of anything than was asked for",
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
    most: Mapping[str, float] = field(default_factory=dict)
    """See :func:`most_counts`; what is not in it has no bound but :data:`MOST`."""


def read_reply(reply: Message, expected: Expected) -> TrainReport:
    """A reply as a report that may be aggregated; Rejected, with the reason, for any other reply."""
    if reply.has_error():
        raise Rejected("error", brief(reply.error.reason or f"code {reply.error.code}"))
    if asks_for_resync(reply.content):
        raise Rejected("stale", "what it holds is not what it should hold, even after it was sent every expert")
    try:
        report = TrainReport.from_records(reply.content, expected.wire, expected.shapes)
    except WireError as error:
        raise Rejected("malformed", str(error)) from None
    if report.participant != expected.participant:
        raise Rejected("unknown", f"participant {expected.participant} answered as {report.participant}")
    if (report.round, report.held) != (expected.round, expected.held):
        raise Rejected(
            "stale",
            f"trained on version {report.held.number} in round {report.round}, asked for version "
            f"{expected.held.number} in round {expected.round}",
        )
    check_numbers(report.update, expected)
    check_work(report.update.work, expected.assigned.numel(), expected.most)
    for key, tensors in report.update.changes.items():
        check_expert(key, tensors, expected)
    return report


def check_numbers(update: Update, expected: Expected) -> None:
    """Rejected for an account that must not count: wrong_shape, not_finite or negative."""
    shape = tuple(expected.assigned.shape)
    for name, table in (("tokens", update.tokens), ("utilities", update.utilities)):
        if tuple(table.shape) != shape:
            raise Rejected("wrong_shape", f"{name} must be {shape}, got {tuple(table.shape)}")
    samples, tokens = (expected.most.get(name, MOST) for name in ("train_samples", "train_tokens"))
    if not abs(update.loss) <= MOST or update.num_samples > samples:
        raise Rejected("not_finite", f"training loss is {update.loss}, samples are {update.num_samples} of {samples:g}")
    if not (update.tokens.abs() <= tokens).all() or torch.isinf(update.utilities).any():
        raise Rejected("not_finite", f"tokens beyond {tokens:g}, or utilities that are not finite")
    if update.num_samples < 0 or (update.tokens < 0).any() or (update.utilities < 0).any():
        raise Rejected("negative", "samples, tokens or utilities are negative")


def most_counts(config: RunConfig, num_experts: int) -> dict[str, float]:
    """What a round can ask for at most: bounds of :class:`~fluxlib.methods.base.Work`, by field or a part of its name.

    What is counted for each expert, which is looked at in passes of its own, has a bound as many times as large.
    """
    training, looks = config.training, config.profiling.batches
    steps, batch, tokens = training.local_steps, training.batch_size, training.max_tokens
    each = num_experts * 2 * config.roles.num_probes * max(steps, looks, 4) * batch
    return {
        "train_steps": steps, "train_samples": steps * batch, "train_tokens": steps * batch * tokens,
        "profile_samples": looks * batch, "profile_tokens": looks * batch * tokens,
        "num": num_experts, "bits": 32, "samples": each, "tokens": each * tokens,
    }  # fmt: skip


def check_work(work: Work, num_experts: int, most: Mapping[str, float]) -> None:
    """Rejected for an account of work that a round cannot be (not_finite): the device clock would run over."""
    for name, count in vars(work).items():
        first, last = name.partition("_")[0], name.rpartition("_")[2]
        bound = most.get(name, most.get(first, most.get(last, MOST)))
        least = num_experts if name == "num_experts" else int(last == "bits")
        if not least <= count <= bound:
            raise Rejected("not_finite", f"work.{name} is {count:g}, allowed is {least} to {bound:g}")


def check_expert(key: ExpertKey, tensors: Mapping[str, Tensor], expected: Expected) -> None:
    """Rejected for a change that must not be aggregated, for any of the other :data:`REASONS`."""
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
