"""What one participant does with a message: catch up, train or profile, remember, reply.

State between rounds lies in the node's Flower context, as records, so that every engine carries it: the experts
that differ from the base (:class:`~fluxlib.federation.client.held.Held`) and the profile of the model it held. The base
model and the task are read once per process.

Paper: section 3, steps of a participant. The profile is made of the model that was downloaded for this round, while
the server aggregates, and used in the next (stale by one).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, wraps
from itertools import islice
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fluxlib import methods, models, profiling, seeding, tasks
from fluxlib.config import RunConfig
from fluxlib.federation.client import disk, feedback, later
from fluxlib.federation.client.held import Held, ResyncNeeded, Workspace
from fluxlib.federation.client.own_data import read_examples
from fluxlib.federation.client.state import STATE_RECORDS, load_state, save_state
from fluxlib.federation.protocol import messages, privacy
from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.protocol.messages import Instruction
from fluxlib.federation.protocol.sync import NOTHING
from fluxlib.federation.protocol.wire import Form
from fluxlib.methods.base import Batch, LocalData, LocalRound, Method, ParticipantState, Update, Work
from fluxlib.methods.local import profile_account
from fluxlib.models.hardware import torch_device
from fluxlib.profiling import Profile
from fluxlib.tasks.batches import sample_batches
from fluxlib.tasks.partition import partition

PARTITION = "partition-id"
"""Entry of a node's configuration that says which part of the data is its own."""

DATA, DEVICE = "data", "device"
"""Further entries: a file of samples of its own, and its device in the catalogue."""


class ParticipantError(RuntimeError):
    """A node cannot do what it is asked; it becomes an error reply that names the reason."""


@lru_cache(maxsize=1)
def workspace(model: str, wire: Form, device: str = "cpu") -> Workspace:
    """The process's one model in memory, shared by all participants that run in it."""
    return Workspace(*models.load(model, device=torch_device(device)), wire)


def forget_workspace() -> None:
    """Drop the model in memory; the next message loads the base anew."""
    workspace.cache_clear()


def join(message: Message, context: Context) -> Message:
    """Reply with the version and digest of what this participant holds."""
    instruction = Instruction.from_records(message.content)
    space = _workspace(instruction, context)
    held = Held.load(context.state, space.base_digest)
    participant = _partition_id(context)
    report = messages.JoinReport(
        participant,
        instruction.round,
        held.version,
        held.digest,
        frozen_digest=space.frozen_digest,
        approximate=held.approximate(),
        device=str(context.node_config.get(DEVICE, "")),
    )
    return Message(report.to_records(), reply_to=message)


def profile(message: Message, context: Context) -> Message:
    """Catch up, profile the model that is held now, keep the profile, reply with the frequencies."""
    instruction = Instruction.from_records(message.content)
    config = messages.parse_config(instruction.config)
    participant = _expect(instruction, config, context)
    space = _workspace(instruction, context)
    try:
        held, _ = _catch_up(instruction, config, context, space)
    except ResyncNeeded:
        return _ask_for_resync(message, instruction, context)
    data = local_data(config, space, participant, instruction.round, own_samples(context))
    start = time.perf_counter()
    with _forgetting_on_error():
        found = profiling.profile(space.model, data.profile, bits=config.profiling.bits)
    seconds = time.perf_counter() - start
    save_state(context.state, ParticipantState(found, instruction.round))
    seen = torch.ones_like(found.frequency) if config.privacy.withhold_reports else found.frequency
    report = messages.ProfileReport(
        participant,
        instruction.round,
        held.version,
        held.digest,
        frequency=seen / seen.sum(1, keepdim=True) if config.privacy.withhold_reports else seen,
        work=profile_work(data, found.frequency.numel(), config),
        phases_s={"profile": seconds},
    )
    return Message(report.to_records(), reply_to=message)


def train(message: Message, context: Context) -> Message:
    """Catch up, do the method's part of the round, keep its state, reply with the update."""
    begin = time.time()
    instruction = Instruction.from_records(message.content)
    config = messages.parse_config(instruction.config)
    participant = _expect(instruction, config, context)
    space = _workspace(instruction, context)
    try:
        held, earlier = _catch_up(instruction, config, context, space)
    except ResyncNeeded:
        return _ask_for_resync(message, instruction, context)
    if instruction.roles is None or instruction.budget is None:
        raise ParticipantError("a training message needs roles and a budget")
    data = local_data(config, space, participant, instruction.round, own_samples(context))
    chance = seeding.generator(config.seed, "train", instruction.round, participant)
    method, ready = methods.get(config.method), time.time()
    with _forgetting_on_error():
        local = LocalRound(
            load_state(context.state), instruction.roles, instruction.budget, data, config, instruction.round, chance
        )
        update, state = method.train(space.model, local)
        update, state = _profile_for_next(method, update, state, space, data, config, instruction, context)
    save_state(context.state, state)
    secret = privacy.noise_generator(config, "noise", instruction.round, participant)
    update, within = privacy.protect(update, config, instruction.clip_norm, secret)
    if feedback.is_used(config.wire.uplink):
        update = replace(update, changes=feedback.add_residual(update.changes, context.state))
    work = replace(
        update.work,
        num_downloaded=instruction.delta.num_experts + instruction.delta.num_approximate,
        num_uploaded=len(update.changes),
        upload_bits=min(update.work.upload_bits, wires.bits_per_weight(config.wire.uplink)),
    )
    report = messages.TrainReport(
        participant,
        instruction.round,
        held.version,
        held.digest,
        update=replace(update, work=work),
        within=within if config.privacy.clip_quantile else None,
        spans=(*earlier, *_spans(begin, ready, update.phases_s, instruction.round)),
    )
    content = report.to_records(config.wire.uplink)
    if feedback.is_used(config.wire.uplink):
        feedback.keep_residual(update.changes, content["arrays"], config.wire.uplink, context.state)
    return Message(content, reply_to=message)


def profile_held(state: RecordDict, round_number: int) -> Profile:
    """The profile of what ``state`` holds, on the samples of that round: what a process in the background does."""
    about = state[later.PENDING]
    config = messages.parse_config(str(about["run"]))
    space = workspace(config.model, str(about["wire"]), str(about["device"]))  # type: ignore[arg-type]
    space.load(Held.load(state, space.base_digest))
    own = Path(str(about["data"])) if about["data"] else None
    return make_profile(config, space, int(about["participant"]), round_number, own)


def make_profile(
    config: RunConfig, space: Workspace, participant: int, round_number: int, own: Path | None = None
) -> Profile:
    """What the method makes of the samples that a participant profiles in that round; ``space`` holds its model."""
    method = methods.get(config.method)
    assert method.afterwards is not None
    with _forgetting_on_error():
        return method.afterwards(space.model, local_data(config, space, participant, round_number, own), config)


def own_samples(context: Context) -> Path | None:
    """The file of samples that this node's operator gave it; ``None``: its part of the run's task."""
    path = context.node_config.get(DATA)
    return Path(str(path)) if path else None


def local_data(
    config: RunConfig, space: Workspace, participant: int, round_index: int, own: Path | None = None
) -> LocalData:
    """This round's batches of ``participant``; they depend on its samples, seed, round and participant alone."""
    if own is not None:
        examples = read_examples(own)
    else:
        task, parts = load_task(config)
        examples = [task.train[index] for index in parts[participant]]

    def draw(name: str, count: int, size: int) -> list[Batch]:
        chance = seeding.generator(config.seed, name, round_index, participant)
        return list(islice(sample_batches(examples, space.tokenizer, size, config.training.max_tokens, chance), count))

    return LocalData(
        train=draw("batches", config.training.local_steps, config.training.batch_size),
        profile=draw("profile", config.profiling.batches, config.training.batch_size),
    )


def load_task(config: RunConfig) -> tuple[tasks.Task, list[list[int]]]:
    """The run's task and the training samples of each participant, by index; read once per process."""
    return _load_task(
        config.task,
        config.seed,
        config.data.task_size,
        config.data.path,
        config.federation.participants,
        config.data.partition,
        config.data.alpha,
        config.data.equal_sizes,
    )


@lru_cache(maxsize=4)
def _load_task(
    name: str,
    seed: int,
    size: int | None,
    path: str | None,
    num_participants: int,
    scheme: str,
    alpha: float,
    equal_sizes: bool,
) -> tuple[tasks.Task, list[list[int]]]:
    task = tasks.load(name, seed=seed, size=size, path=path)
    chance = seeding.generator(seed, "partition")
    return task, partition(task.train, num_participants, chance, scheme, alpha, equal_sizes)  # type: ignore[arg-type]


def profile_work(data: LocalData, num_experts: int, config: RunConfig) -> Work:
    """The account of a profile made before training, in the round's critical path."""
    return Work(num_experts, first_profile=True, **profile_account(data, num_experts, config))


def _catch_up(
    instruction: Instruction, config: RunConfig, context: Context, space: Workspace
) -> tuple[Held, list[later.Span]]:
    """Finish the last round's profile, apply the delta, and make the model that of this participant.

    Raises:
        ResyncNeeded: the delta does not fit what is held.
    """
    state, before = context.state, Held.load(context.state, space.base_digest)
    unknown = instruction.delta.from_version == NOTHING and before.version > 0
    if unknown or str(state["run"]["config"] if "run" in state else config.numbers) != config.numbers:
        for name in (later.PENDING, *STATE_RECORDS, feedback.RESIDUAL):  # what is kept is of another run
            if name in state:
                del state[name]
    state["run"] = ConfigRecord({"config": config.numbers})

    def make(round_number: int) -> Profile:
        space.load(before)
        return make_profile(config, space, instruction.participant, round_number, own_samples(context))

    spans = later.finish(_folder(context), state, make)
    held = before.updated(instruction.delta, space.base)
    held.save(state)
    space.load(held)
    return held, spans


def _profile_for_next(
    method: Method,
    update: Update,
    state: ParticipantState,
    space: Workspace,
    data: LocalData,
    config: RunConfig,
    instruction: Instruction,
    context: Context,
) -> tuple[Update, ParticipantState]:
    """The profile that the next round will use: made now, or noted for when the reply is out."""
    if method.afterwards is None or not config.profiling.stale:
        return update, state
    wanted = str(context.node_config.get(later.BACKGROUND, "")).lower() in ("true", "1")
    if _folder(context) is not None and wanted:
        device = _torch_device(config, context)
        samples = str(own_samples(context) or "")
        about = {"run": instruction.config, "participant": instruction.participant, "data": samples}
        later.note(context.state, instruction.round, wire=instruction.wire, device=device, **about)
        return update, state
    start = time.perf_counter()
    found = method.afterwards(space.model, data, config)
    phases = update.phases_s | {"profile": time.perf_counter() - start}
    return replace(update, phases_s=phases), ParticipantState(found, instruction.round)


def _spans(begin: float, ready: float, phases_s: Mapping[str, float], round_number: int) -> list[later.Span]:
    """Phases one after another, as they were: methods measure how long each took, and nothing happens between."""
    spans, now = [("catch_up", begin, ready, round_number)], ready
    for name, seconds in phases_s.items():
        spans.append((name, now, now + seconds, round_number))
        now += seconds
    return spans


def _folder(context: Context) -> Path | None:
    """Where this participant keeps its state; each has a folder of its own."""
    folder = context.node_config.get(disk.STATE_DIR)
    return Path(str(folder)) / f"participant-{_partition_id(context)}" if folder else None


def kept_on_disk(handler: Callable[[Message, Context], Message]) -> Callable[[Message, Context], Message]:
    """``handler`` with the node's state read from its folder before and written to it after, where it has one."""

    @wraps(handler)
    def kept(message: Message, context: Context) -> Message:
        folder = _folder(context) if context.node_config.get(disk.STATE_DIR) else None
        if folder is None:
            return handler(message, context)
        if "held" not in context.state:
            disk.restore(folder, context.state)
        reply = handler(message, context)
        disk.keep(folder, context.state)
        if message.metadata.message_type == messages.TRAIN:
            later.start(folder, context.state)
        return reply

    return kept


@contextmanager
def _forgetting_on_error() -> Iterator[None]:
    """Whatever goes wrong may leave the model half customised: the next participant gets a fresh one."""
    try:
        yield
    except BaseException:
        forget_workspace()
        raise


def _workspace(instruction: Instruction, context: Context) -> Workspace:
    config = messages.parse_config(instruction.config)
    return workspace(config.model, instruction.wire, _torch_device(config, context))


def _torch_device(config: RunConfig, context: Context) -> str:
    """Where this participant computes: its own setting, or the run's where the nodes are this machine's."""
    of_run = "cpu" if config.engine == "deployment" else config.torch_device
    if config.engine == "simulation" and of_run.startswith("cuda"):
        of_run = "cuda"  # a worker sees the one that it was given, whichever that is
    return str(context.node_config.get("torch-device", of_run))


def _partition_id(context: Context) -> int:
    if PARTITION not in context.node_config:
        raise ParticipantError(f"node configuration lacks {PARTITION!r}; it has {sorted(context.node_config)}")
    return int(context.node_config[PARTITION])


def _expect(instruction: Instruction, config: RunConfig, context: Context) -> int:
    """This participant's number, once it is sure that the message is meant for it."""
    participant = _partition_id(context)
    if participant != instruction.participant:
        raise ParticipantError(f"message is for participant {instruction.participant}, this is {participant}")
    if participant >= config.federation.participants:
        raise ParticipantError(f"{PARTITION} is {participant}, allowed is 0 to {config.federation.participants - 1}")
    return participant


def _ask_for_resync(message: Message, instruction: Instruction, context: Context) -> Message:
    """Forget what was held, so that a full delta is accepted whatever its version."""
    for name in ("held", "experts"):
        if name in context.state:
            del context.state[name]
    content = messages.resync_request(instruction.participant, instruction.round, 0, "")
    return Message(content, reply_to=message)
