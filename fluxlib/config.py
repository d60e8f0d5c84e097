"""Run configuration, and where things lie on disk.

A :class:`RunConfig` is everything that decides a run's numbers; two runs with equal configurations give equal
tables. Its groups follow the paper's sections. Names of methods, models and tasks are checked by the registries that
own them, ranges are checked here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fluxlib.io import ConfigError, checked, reading, shown

REPO_ROOT = Path(__file__).resolve().parent.parent
"""The checkout this package was imported from (the package is installed in editable mode)."""

PROFILES = ("smoke", "mini", "full", "paper", "tune")

AssignmentKind = Literal["flux", "random", "frequency", "utility"]
"""By what experts are chosen to be tuned; see :func:`fluxlib.roles.priorities`."""

MergeWeights = Literal["attention_frequency", "frequency", "uniform", "gate"]
"""What an expert weighs in its slot; see :func:`fluxlib.merging.merge_weights`."""

WireType = Literal["float32", "bfloat16", "int8"]
"""How weights travel between server and participants; see :mod:`fluxlib.federation.protocol.wire`."""

Offloading = Literal["overlapped", "on_demand"]
"""How experts come to a device that they do not fit on; see :mod:`fluxlib.devices.step`."""


NO_NUMBERS: dict[str, Any] = {
    "engine": True,
    "torch_device": True,
    "federation": {"round_timeout_s", "join_timeout_s"},
}
"""Settings of a run that no number depends on: engine, hardware and patience."""

RETIRED: dict[str, Any] = {
    "merging.clustering": "fused",
    "clock.shaped": False,
    "privacy.clip_norm": None,
    "privacy.clip_quantile": None,
    "privacy.noise_multiplier": 0.0,
    "privacy.noise": "server",
    "privacy.withhold_reports": False,
}
"""Settings that are gone, at the values at which a run that was stored with them is the same today."""


def data_dir() -> Path:
    """Folder of base models and results; the environment variable ``FLUXLIB_DATA`` moves it."""
    return Path(os.environ.get("FLUXLIB_DATA", REPO_ROOT / "data"))


def results_dir(profile: str) -> Path:
    """Folder of the result tables of ``profile``."""
    return data_dir() / "results" / profile


def figures_dir(profile: str) -> Path:
    """Folder of the figures of ``profile``; the environment variable ``FLUXLIB_FIGURES`` moves its parent."""
    return Path(os.environ.get("FLUXLIB_FIGURES", REPO_ROOT / "figures")) / profile


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class FederationConfig(_Group):
    """Who takes part, for how long, and how long they are waited for."""

    rounds: int = Field(10, ge=1, description="rounds of the run, at most")
    device_seconds: float | None = Field(None, gt=0, description="the run ends when the device clock has counted these")
    participants: int = Field(10, ge=1, le=100_000, description="participants among whom the samples are dealt")
    participants_per_round: int | None = Field(None, ge=1, description="None: every participant, every round")
    min_replies_frac: float = Field(0.5, gt=0, le=1, description="fewer good replies than this share: the run fails")
    round_timeout_s: float | None = Field(None, gt=0, description="time a participant may take for one message")
    join_timeout_s: float = Field(600.0, gt=0, description="time to wait for all participants to be there")


class DataConfig(_Group):
    """The task's samples and how they are dealt to the participants."""

    partition: Literal["dirichlet", "iid", "label"] = Field("dirichlet", description="by what samples are dealt")
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration: small = participants differ")
    equal_sizes: bool = Field(True, description="every participant has equally many samples")
    task_size: int | None = Field(
        None, ge=10, le=1_000_000, description="samples of the task before the 80/20 split; None: its own default"
    )
    path: str | None = Field(None, description="files of a public data set; None: they come from the hub")


class TrainingConfig(_Group):
    """Local steps of a participant."""

    local_steps: int = Field(4, ge=1, description="optimizer steps of a participant in a round")
    batch_size: int = Field(16, ge=1, description="samples of a step")
    max_tokens: int = Field(128, ge=8, description="tokens of a sample, at most; longer prompts are cut")
    learning_rate: float = Field(3e-3, gt=0, description="of the local optimizer")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="of the local steps; it begins anew every round")
    micro_batch: int | None = Field(
        None, ge=1, description="samples of a step that are computed at once, gradients add up; None: all of them"
    )
    checkpointing: bool = Field(
        False, description="activations are computed again in the backward pass instead of kept: less memory, more time"
    )
    fmq_bits: Literal[2, 3, 4, 8, 16] = Field(4, description="of the experts while FMQ tunes them; 16: it is FMD")


class AdapterConfig(_Group):
    """What of an expert is tuned: all of it, or a low-rank product on top of it."""

    kind: Literal["none", "lora"] = Field("none", description="lora: weights are W + alpha / rank B A, B alone learns")
    rank: int = Field(8, ge=1, description="of the product; B is [out, rank], A [rank, in] is drawn and never sent")
    alpha: float = Field(16.0, gt=0, description="the product counts alpha / rank times")

    @property
    def used_rank(self) -> int:
        """The rank; 0 where whole experts are tuned."""
        return self.rank if self.kind == "lora" else 0


class EvaluationConfig(_Group):
    """Scoring the global model on the server's test split."""

    samples: int | None = Field(None, ge=1, description="test samples scored each round; None: all")
    every: int = Field(1, ge=1, description="rounds from one score to the next")


class BudgetConfig(_Group):
    """What fits on a participant, as shares of all routed experts of the model."""

    by: Literal["shares", "device"] = Field(
        "shares", description="shares: the two below; device: the most that fits its memory, at clock.model's shapes"
    )
    tune_frac: float = Field(0.25, gt=0, le=1, description="B_tune as a share of all experts")
    merge_frac: float = Field(0.25, ge=0, le=1, description="B_non as a share of all experts")


class ProfilingConfig(_Group):
    """Section 4: which experts a participant's data uses."""

    bits: Literal[2, 3, 4, 8, 16] = Field(4, description="of the experts while they are profiled; 16: as they are")
    batches: int = Field(2, ge=1, description="batches that are profiled")
    stale: bool = Field(True, description="the profile is that of the round before, made while the server works")


class MergingConfig(_Group):
    """Section 5: what becomes of experts that are not tuned."""

    budgets: Literal["adaptive", "uniform", "single", "joint"] = Field("adaptive", description="slots per layer, eq. 1")
    weights: MergeWeights = Field("attention_frequency", description="of an expert in its slot, eq. 2")
    align_neurons: bool = Field(False, description="permute neurons to match before experts are averaged")


class RolesConfig(_Group):
    """Section 6: who tunes which expert."""

    assignment: AssignmentKind = Field("flux", description="what is exploited; see fluxlib.roles.priorities")
    epsilon: Literal["dynamic", "paper"] | float = Field(
        "dynamic", description="share of B_tune that exploits; see fluxlib.roles.epsilon_schedule"
    )
    explore_by: Literal["probes", "guided_probes", "backward"] = Field(
        "probes", description="utilities of explored experts: forward passes, or one backward pass for all of them"
    )
    exploration: Literal["random", "oldest"] = Field(
        "random", description="which experts are explored: drawn at random, or least recently measured first"
    )
    num_probes: int = Field(1, ge=1, description="directions that an explored expert is probed in")
    probes_per_round: int | None = Field(8, ge=0, description="explored experts probed each round; None: all of them")

    @property
    def probe_limit(self) -> int | None:
        """Explored experts whose utility is measured in a round, at most; a backward pass measures all at once."""
        return None if self.explore_by == "backward" else self.probes_per_round


class WireConfig(_Group):
    """How weights travel between server and participants."""

    uplink: WireType = Field("float32", description="type of changes on their way to the server")
    downlink: WireType = Field("float32", description="type of experts on their way to participants")
    max_staleness: int | None = Field(
        None, ge=0, description="rounds that experts a participant does not tune may lag behind; None: the method's own"
    )


class AggregationConfig(_Group):
    """Section 6: how the changes of one expert become one. Other rules and a bound limit what bad participants do."""

    rule: Literal["mean", "trimmed_mean", "median"] = Field(
        "mean", description="how the changes of one expert are combined"
    )
    trim_frac: float = Field(0.2, gt=0, lt=0.5, description="share of an expert's tuners that may be bad")
    clip_norm: float | None = Field(None, gt=0, description="a participant's larger change is scaled to this norm")


class ClockConfig(_Group):
    """Whose seconds the device clock counts; see fluxlib/devices/clock.py."""

    fleet: str = Field(
        "paper", description="devices of the participants: a fleet or a device of devices/catalogue.yaml"
    )
    link: str = Field(
        "1gbps",
        description="connection of each participant: one of devices/catalogue.yaml, or a rate such as 2.5mbps",
    )
    model: str = Field("self", description="the model whose shapes count; self: the run's own")
    tokens_per_sample: int | None = Field(None, ge=1, description="None: the run's own token counts")
    offloading: Offloading = Field(
        "overlapped", description="how experts come that do not fit: behind the arithmetic, or when a layer needs them"
    )


class RunConfig(_Group):
    """One federated run: who trains what, how, within which budget, and which clock counts the time.

    A setting is named by its group and its own name: ``merging.budgets``. Fractions are of all routed experts of the
    model. Times are in seconds, sizes in bytes.
    """

    method: str = Field("flux", description="what a participant does in a round; see docs/add-a-method.md")
    model: str = Field("mini-llama-moe", description="a mini model, a folder, or a hub name")
    task: str = Field("mini-gsm8k", description="a generated task or a public data set; see data/README.md")
    seed: int = Field(0, ge=0, lt=2**63, description="every source of chance derives from it")
    variant: str = Field(
        "", pattern=r"^([a-z0-9]+([.-][a-z0-9]+)*)?$", description="name of a run with something changed"
    )
    engine: Literal["local", "simulation", "deployment"] = Field("local", description="what runs the Flower apps")
    torch_device: str = Field(
        "cpu",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="where models compute; auto: a GPU if there is one. Nodes of a deployment say so for themselves",
    )
    torch_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of weights and arithmetic; what is tuned is kept in 32 bits by both sides"
    )

    federation: FederationConfig = FederationConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    adapter: AdapterConfig = AdapterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    budget: BudgetConfig = BudgetConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    merging: MergingConfig = MergingConfig()
    roles: RolesConfig = RolesConfig()
    wire: WireConfig = WireConfig()
    aggregation: AggregationConfig = AggregationConfig()
    clock: ClockConfig = ClockConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        """What cannot be together is refused."""
        roles = self.roles
        asked, present = self.federation.participants_per_round, self.federation.participants
        if asked is not None and asked > present:
            allowed = f"allowed is at most federation.participants={present}"
            raise ValueError(f"federation.participants_per_round is {asked}, {allowed}")
        if isinstance(roles.epsilon, float) and not 0 < roles.epsilon <= 1:
            allowed = "allowed are 'dynamic', 'paper' and more than 0 up to 1"
            raise ValueError(f"roles.epsilon is {roles.epsilon}, {allowed}")
        total = self.budget.tune_frac + self.budget.merge_frac
        if total > 1 and self.budget.tune_frac < 1:
            sums = f"budget.tune_frac + budget.merge_frac is {total:g}"
            raise ValueError(f"{sums}, allowed is at most 1 (more slots than experts)")
        probes = self.method == "flux" and roles.assignment == "flux" and roles.probe_limit != 0
        if probes and roles.explore_by != "backward" and self.torch_dtype != "float32":
            raise ValueError(
                f"roles.explore_by is {roles.explore_by!r}, allowed with torch_dtype {self.torch_dtype!r} is "
                "'backward': 16 bits round away what so small a step changes"
            )
        return self

    @property
    def numbers(self) -> str:
        """Digest of what the numbers depend on: runs that differ in engine, hardware or patience only have the same."""
        text = self.model_dump_json(exclude=NO_NUMBERS)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def run_id(self) -> str:
        """Name of the run in the store: the things that runs are compared by."""
        model, task = (Path(name).name for name in (self.model, self.task))
        return "-".join(part for part in (self.method, self.variant, model, task, f"seed{self.seed}") if part)

    @property
    def sized_as(self) -> str:
        """The model whose shapes the device clock and the memory planner count."""
        return self.model if self.clock.model == "self" else self.clock.model

    def settings(self, changed_only: bool = False) -> dict[str, Any]:
        """Every setting by its full name (``merging.budgets``), as plain values; only those that are not defaults."""
        return flatten(self.model_dump(mode="json", exclude_defaults=changed_only))

    def updated(self, changes: Mapping[str, Any]) -> RunConfig:
        """This configuration with some settings changed, by full names, and validated as in :func:`make_config`."""
        return make_config(self.settings() | flatten(changes))


GROUPS = {name: type(value) for name, value in RunConfig() if isinstance(value, BaseModel)}
"""The groups of a :class:`RunConfig`, by name."""


def flatten(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by full names, from names with dots and groups as mappings in any mixture; a later one wins.

    >>> flatten({"seed": 1, "merging": {"budgets": "joint"}, "clock.link": "lte"})
    {'seed': 1, 'merging.budgets': 'joint', 'clock.link': 'lte'}
    """
    flat: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping) and (name in GROUPS or any(old.startswith(f"{name}.") for old in RETIRED)):
            flat |= {f"{name}.{inner}": setting for inner, setting in value.items()}
        else:
            flat[name] = value
    return flat


SETTINGS = tuple(RunConfig().settings())
"""Full names of all settings."""


def make_config(parameters: Mapping[str, Any]) -> RunConfig:
    """Validate ``parameters`` into a :class:`RunConfig`; a setting is given as ``merging.budgets`` or in its group.

    Raises:
        ConfigError: one line per bad parameter: its name, what is allowed and what came.
    """
    nested: dict[str, Any] = {}
    for name, value in flatten(parameters).items():
        if (name, value) in RETIRED.items():
            continue
        with reading("configuration"):
            group, dot, inner = checked("the name of a setting", name, str).partition(".")
            _ = checked(name, value, str) if isinstance(value, str) else value
        if name in GROUPS:
            names = ", ".join(f"{name}.{inner}" for inner in GROUPS[name].model_fields)
            raise ConfigError(f"{name} is a group of settings, got {shown(value)}; allowed are {names}")
        if dot and group in GROUPS:
            nested.setdefault(group, {})[inner] = value
        else:
            nested[name] = value
    try:
        return RunConfig(**nested)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def _resembling(name: str) -> list[str]:
    """Settings whose own name is the last part of ``name``, or else those that are spelled most like it."""
    own = {full: full.rpartition(".")[2] for full in SETTINGS}
    wanted = name.rpartition(".")[2]
    similar = get_close_matches(wanted, own.values(), n=2, cutoff=0.75)
    return [full for full in SETTINGS if own[full] == wanted] or [full for full in SETTINGS if own[full] in similar]


def _explain(item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    name = ".".join(path[:2] if path[0] in GROUPS else path[:1]) if path else "configuration"
    if item["type"] == "extra_forbidden":
        group = path[0] if path[0] in GROUPS else None
        if near := _resembling(".".join(path)):
            return f"unknown parameter {shown(name)}; did you mean {' or '.join(near)}? docs/settings.md has all"
        allowed = [f"{group}.{inner}" for inner in GROUPS[group].model_fields] if group else SETTINGS
        return f"unknown parameter {shown(name)}; allowed are {', '.join(allowed)}"
    came = "" if item["type"] == "value_error" else f", got {shown(item['input'])}"
    return f"{name}: {item['msg'].removeprefix('Value error, ')}{came}"
