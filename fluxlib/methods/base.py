"""The one type that all methods share, a :class:`Method`, and what goes in and out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fluxlib.config import RunConfig
from fluxlib.moe.find import ExpertKey
from fluxlib.profiling import Profile
from fluxlib.roles import Roles, RoleState

Batch = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` and ``labels``, each ``[B, T]`` long; label -100 is not scored."""


@dataclass(frozen=True)
class Budget:
    """What fits on a participant: ``num_tuned`` experts with gradients, ``num_merged`` frozen merged slots."""

    num_tuned: int
    num_merged: int


@dataclass(frozen=True)
class Work:
    """What one participant did in one round, in units that do not depend on its device.

    The device clock (:mod:`fluxlib.devices.clock`) turns this into seconds for any device and any model's shapes.
    Counts of experts are over all layers; tokens are real tokens, padding excluded.
    """

    __pydantic_config__ = {"extra": "forbid"}  # where one is read, nothing else is taken for one

    num_experts: int
    """Routed experts of the whole model: the unit that fractions are taken of when shapes change."""
    num_tuned: int = 0
    """Experts with a gradient and an optimizer state."""
    num_updated: int = 0
    """Those of them that got a token: the others have no gradient, no step and no change."""
    num_frozen: int = 0
    """Frozen expert slots held beside them: merged groups and explored experts."""
    num_merge_sources: int = 0
    """Experts read to make the merged slots."""
    train_steps: int = 0
    train_samples: int = 0
    train_tokens: int = 0
    routed_tokens: int = 0
    """(token, expert) choices of the training tokens, over all layers and steps."""
    slot_tokens: int = 0
    """(token, slot) pairs that were computed for them: fewer where choices of one token fall on one merged slot."""
    tuned_tokens: int = 0
    """Those of the choices that went to experts whose weight gradients are computed: the tuned ones, and those that
    are only watched."""
    profile_samples: int = 0
    profile_tokens: int = 0
    profile_bits: int = 16
    num_quantized: int = 0
    """Experts quantised for the profile."""
    probe_samples: int = 0
    probe_tokens: int = 0
    """Of forward passes through the whole model that looking takes, however many experts are looked at."""
    expert_probe_samples: int = 0
    expert_probe_tokens: int = 0
    """Of the passes made for each of the explored experts alone, together; more experts take more of them."""
    adapter_rank: int = 0
    """Of the low-rank products that are learned and sent; 0: whole experts are."""
    weight_bits: int = 16
    """Bits per weight of the experts while training (FMQ: 4)."""
    offloaded: bool = False
    """Whether experts (FMD), or with few ``weight_bits`` their optimizer state (FMQ), may live in host memory."""
    num_downloaded: int = 0
    num_uploaded: int = 0
    download_bits: float = 16.0
    """Bits per weight of the downloaded experts on the link, on average."""
    upload_bits: float = 16.0
    hidden_profile: bool = False
    """Whether the profile is for the next round and nothing of it is in the reply: it runs beside upload and server."""


@dataclass(frozen=True)
class ParticipantState:
    """What stays on the device between rounds besides the model it holds; immutable."""

    profile: Profile | None = None
    profile_round: int = 0


@dataclass(frozen=True)
class Update:
    """What leaves the device: changes of exploited experts, utilities, counts, and an account of the work."""

    changes: dict[ExpertKey, dict[str, Tensor]]
    """New minus old weights of each exploited expert, by tensor name; with an adapter of its B's, ``[out, rank]``."""
    utilities: Tensor
    """``[layers, experts]``, eq. 3; NaN where not measured this round."""
    tokens: Tensor
    """``[layers, experts]`` tokens routed to each expert during training."""
    loss: float
    num_samples: int
    work: Work
    phases_s: dict[str, float] = field(default_factory=dict)
    """Measured seconds by phase: ``merge``, ``train``, ``probe``, ``profile`` …"""


@dataclass(frozen=True)
class LocalData:
    """What a participant trains and profiles on this round; batches are made by :mod:`fluxlib.tasks.batches`."""

    train: Sequence[Batch]
    profile: Sequence[Batch]


@dataclass(frozen=True)
class LocalRound:
    """What a participant is given for one round, besides the model that it holds."""

    state: ParticipantState
    roles: Roles
    budget: Budget
    data: LocalData
    config: RunConfig
    number: int
    """Of the round; the first is 1."""
    generator: torch.Generator


AssignFn = Callable[[RoleState, Sequence[Budget], float, torch.Generator, RunConfig], Roles]
TrainFn = Callable[[torch.nn.Module, LocalRound], tuple[Update, ParticipantState]]


@dataclass(frozen=True)
class Method:
    """A federated fine-tuning method: two functions, from which all that differs follows; comparing is one loop.

    ``assign(role_state, budgets, epsilon, generator, config)``, on the server: who tunes and who explores what.
    ``train(model, local)``, on a participant: does the :class:`LocalRound` and leaves ``model`` exactly as it found it.
    ``profiles``: participants are asked for a profile of the model they hold before their first round, so that
    ``assign`` knows their frequencies (``role_state.first``) and ``train`` the profile (``state.profile``).
    ``utilities``: they report the utilities of what they tuned, and a missing one is a fault.
    ``explores``: the budget is split by epsilon, which is empty in the tables otherwise.
    ``explored_place``: memory that an explored expert takes, as a share of a tuned one's place in the budget.
    ``afterwards``: participants profile the model that they held in this round, before training, for the next one. That
    may be when the reply is out, so nothing of it can be in the reply (stale by one).
    ``max_staleness``: rounds that the copies of experts which a participant does not tune may lag behind.
    """

    name: str
    title: str
    assign: AssignFn
    train: TrainFn
    profiles: bool
    utilities: bool = False
    explores: bool = False
    explored_place: float = 0.0
    afterwards: bool = False
    max_staleness: int = 0
