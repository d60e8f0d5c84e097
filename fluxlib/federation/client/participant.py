"""What one participant does with a message: catch up, train or profile, remember, reply.

State between rounds lies in the node's Flower context, so that every engine carries it: its copy of the global model,
the method's state, and what rounding took from its changes.

Paper: section 3, steps of a participant. The profile is made of the model that was downloaded for this round, while
the server aggregates, and used in the next (stale by one).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from flwr.app import ConfigRecord, Context, RecordDict

from fluxlib import methods, seeding
from fluxlib.config import RunConfig
from fluxlib.federation.client import background_profile
from fluxlib.federation.client.local_copy import LocalCopy, Workspace, workspace
from fluxlib.federation.client.local_data import local_data
from fluxlib.federation.client.node_state import STATE_DIR, load_state, save_state
from fluxlib.federation.protocol import messages
from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.messages import Instruction
from fluxlib.federation.protocol.sync import NOTHING, ModelVersion
from fluxlib.methods.base import LocalData, LocalRound, ParticipantState, Work
from fluxlib.methods.local import profile as make_profile
from fluxlib.methods.local import profile_account
from fluxlib.moe.adapter import Adapter

PARTITION, DATA, DEVICE = "partition-id", "data", "device"
"""Entries of a node's configuration: which part of the data is its own, its own samples, its device."""

RESIDUAL = "residual"
"""Record of a participant's state: what rounding took from its changes."""


class ParticipantError(RuntimeError):
    """A node cannot do what it is asked; it becomes an error reply that names the reason."""


def join(instruction: Instruction, context: Context) -> RecordDict:
    """Which participant this is, and the version and digest of what it holds."""
    space = _workspace(instruction.config, context)
    held = LocalCopy.load(context.state, space.base_digest).version
    device = str(context.node_config.get(DEVICE, ""))
    report = messages.JoinReport(number_of(context), instruction.round, held, space.frozen_digest, device)
    return report.to_records()


def profile(instruction: Instruction, context: Context) -> RecordDict:
    """Catch up, profile the model that is held now, keep the profile, reply with the frequencies."""
    config = instruction.config
    space, held, data = _catch_up(instruction, context)
    start = time.perf_counter()
    found = make_profile(space.model, data, config)
    phases_s = {"profile": time.perf_counter() - start}
    save_state(context.state, ParticipantState(found, instruction.round))
    size = found.frequency.numel()
    work = Work(size, **profile_account(data, size, config))
    report = messages.ProfileReport(instruction.participant, instruction.round, held, found.frequency, work, phases_s)
    return report.to_records()


def train(instruction: Instruction, context: Context) -> RecordDict:
    """Catch up, do the method's part of the round, keep its state, reply with the update."""
    if instruction.roles is None or instruction.budget is None:
        raise ParticipantError("a training message needs roles and a budget")
    config, number, participant = instruction.config, instruction.round, instruction.participant
    space, held, data = _catch_up(instruction, context)
    method = methods.get(config.method)
    local = LocalRound(
        load_state(context.state), instruction.roles, instruction.budget, data, config, number,
        seeding.generator(config.seed, "train", number, participant),
    )  # fmt: skip
    update, state = method.train(space.model, local)
    if method.afterwards and config.profiling.stale:
        wanted = str(context.node_config.get(background_profile.BACKGROUND, "")).lower() in ("true", "1")
        if wanted and state_folder(context) is not None:
            background_profile.note(context.state, instruction, _torch_device(config, context), _samples(context))
        else:
            start = time.perf_counter()
            state = ParticipantState(make_profile(space.model, data, config), number)
            update = replace(update, phases_s=update.phases_s | {"profile": time.perf_counter() - start})
    save_state(context.state, state)

    sent = wires.moved(update.changes)
    changes, residual = wires.encode_changes(sent, config.wire.uplink, context.state.get(RESIDUAL, {}))
    if residual:
        context.state[RESIDUAL] = wires.make_record(residual)
    work = replace(
        update.work,
        num_downloaded=instruction.delta.num_experts,
        num_uploaded=len(sent),
        upload_bits=min(update.work.upload_bits, wires.bits_per_weight(config.wire.uplink)),
    )
    return messages.TrainReport(participant, number, held, replace(update, work=work)).to_records(changes)


def number_of(context: Context) -> int:
    """This participant's number; it is the number of its part of the data."""
    if PARTITION not in context.node_config:
        raise ParticipantError(f"node configuration lacks {PARTITION!r}; it has {sorted(context.node_config)}")
    return int(context.node_config[PARTITION])


def state_folder(context: Context) -> Path | None:
    """Where this participant keeps its state; each has a folder of its own."""
    folder = context.node_config.get(STATE_DIR)
    return Path(str(folder)) / f"participant-{number_of(context)}" if folder else None


def _catch_up(instruction: Instruction, context: Context) -> tuple[Workspace, ModelVersion, LocalData]:
    """Finish the last round's profile, apply the delta, make the model in memory this participant's, draw its data."""
    state, numbers = context.state, instruction.config.numbers
    space = _workspace(instruction.config, context)
    before = LocalCopy.load(state, space.base_digest)
    unknown = instruction.delta.since == NOTHING and before.version.number > 0
    if unknown or ("run" in state and state["run"]["config"] != numbers):  # what is kept is of another run
        for name in state.keys() & {background_profile.PENDING, "profile", "participant", "slots", RESIDUAL}:
            del state[name]
    state["run"] = ConfigRecord({"config": numbers})
    if background_profile.PENDING in state and (folder := state_folder(context)):
        background_profile.finish(folder, state)
    held = before.updated(instruction.delta, space.base)
    held.save(state)
    space.load(held)
    samples = _samples(context)
    data = local_data(instruction.config, space.tokenizer, instruction.participant, instruction.round, samples)
    return space, held.version, data


def _samples(context: Context) -> str:
    return str(context.node_config.get(DATA, ""))


def _workspace(config: RunConfig, context: Context) -> Workspace:
    device = _torch_device(config, context)
    return workspace(config.model, config.wire.downlink, device, Adapter.of(config), config.torch_dtype)


def _torch_device(config: RunConfig, context: Context) -> str:
    """Where this participant computes: its own setting, or the run's where the nodes are this machine's."""
    of_run = "cpu" if config.engine == "deployment" else config.torch_device
    if config.engine == "simulation" and of_run.startswith("cuda"):
        of_run = "cuda"  # a worker sees the one that it was given, whichever that is
    return str(context.node_config.get("torch-device", of_run))
