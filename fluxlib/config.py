"""Run configuration, and where things lie on disk.

A :class:`RunConfig` is everything that decides a run's numbers; two runs with equal configurations give equal
tables. Names of methods, models and tasks are checked by the registries that own them, ranges are checked here.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

REPO_ROOT = Path(__file__).resolve().parent.parent
"""The checkout this package was imported from (the package is installed in editable mode)."""

PROFILES = ("smoke", "mini", "full", "paper", "tune")

AssignmentKind = Literal["flux", "random", "frequency", "utility", "proportional"]
"""By what experts are chosen to be tuned; see :func:`fluxlib.roles.priorities`."""

WireType = Literal["float32", "bfloat16", "int8"]
"""How weights travel between server and participants; see :mod:`fluxlib.federation.wire`."""


NO_NUMBERS = ("engine", "torch_device", "round_timeout_s", "join_timeout_s")
"""Settings of a run that no number depends on: engine, hardware and patience."""


class ConfigError(ValueError):
    """A run, a notebook or a command was asked for something that cannot be done; the message says what can."""


def data_dir() -> Path:
    """Folder of base models and results; the environment variable ``FLUXLIB_DATA`` moves it."""
    return Path(os.environ.get("FLUXLIB_DATA", REPO_ROOT / "data"))


def results_dir(profile: str) -> Path:
    """Folder of the result tables of ``profile``."""
    return data_dir() / "results" / profile


def figures_dir(profile: str) -> Path:
    """Folder of the figures of ``profile``; the environment variable ``FLUXLIB_FIGURES`` moves its parent."""
    return Path(os.environ.get("FLUXLIB_FIGURES", REPO_ROOT / "figures")) / profile


def check_writable(folder: Path) -> Path:
    """Create ``folder`` and a file in it, before hours of work depend on it.

    Raises:
        ConfigError: naming the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ConfigError(f"cannot write to the output folder {folder}: {error.strerror}") from None


class RunConfig(BaseModel):
    """One federated run: who trains what, how, within which budget, and which clock counts the time.

    Fractions are of all routed experts of the model. Times are in seconds, sizes in bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    method: str = "flux"
    model: str = "mini-llama-moe"
    task: str = "mini-gsm8k"
    seed: int = Field(0, ge=0, lt=2**63)
    variant: str = Field(
        "", pattern=r"^([a-z0-9]+([.-][a-z0-9]+)*)?$", description="name of a run with something changed"
    )
    engine: Literal["local", "simulation", "deployment"] = Field("local", description="what runs the Flower apps")
    torch_device: str = Field(
        "cpu",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="where models compute; auto: a GPU if there is one. Nodes of a deployment say so for themselves",
    )
    round_timeout_s: float | None = Field(None, gt=0, description="time a participant may take for one message")
    join_timeout_s: float = Field(600.0, gt=0, description="time to wait for all participants to be there")

    rounds: int = Field(10, ge=1)
    participants: int = Field(10, ge=1, le=100_000)
    participants_per_round: int | None = Field(None, ge=1, description="None: every participant, every round")
    min_replies_frac: float = Field(0.5, gt=0, le=1, description="fewer good replies than this share: the run fails")

    partition: Literal["dirichlet", "iid", "label"] = "dirichlet"
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration: small = participants differ")
    equal_sizes: bool = True
    task_size: int | None = Field(
        None, ge=10, le=1_000_000, description="samples of the task before the 80/20 split; None: its own default"
    )
    data_path: str | None = Field(None, description="files of a public data set; None: they come from the hub")

    local_steps: int = Field(4, ge=1)
    batch_size: int = Field(16, ge=1)
    max_tokens: int = Field(128, ge=8)
    learning_rate: float = Field(3e-3, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    server_learning_rate: float = Field(1.0, gt=0, description="factor on an expert's aggregated change")
    eval_samples: int | None = Field(None, ge=1, description="test samples scored each round; None: all")
    eval_every: int = Field(1, ge=1)

    tune_fraction: float = Field(0.25, gt=0, le=1, description="B_tune as a share of all experts")
    merge_fraction: float = Field(0.25, ge=0, le=1, description="B_non as a share of all experts")
    budget_spread: float = Field(
        0.0, ge=0, lt=1, description="participants' budgets vary evenly by this share, up and down"
    )

    fmq_bits: Literal[2, 3, 4, 8, 16] = Field(4, description="of the experts while FMQ tunes them; 16: it is FMD")
    profile_bits: Literal[2, 3, 4, 8, 16] = 4
    profile_batches: int = Field(2, ge=1)
    stale_profile: bool = True
    layer_budget: Literal["adaptive", "uniform", "single", "joint"] = "adaptive"
    clustering: Literal["fused", "per_layer"] = "fused"
    merge_weights: Literal["attention_frequency", "frequency", "uniform", "gate"] = "attention_frequency"
    align_neurons: bool = False
    assignment: AssignmentKind = Field("flux", description="what is exploited; see roles.priorities")
    epsilon: Literal["dynamic", "paper"] | float = Field(
        "dynamic", description="share of B_tune that exploits; see roles.epsilon_schedule"
    )
    coverage: int | None = Field(None, ge=1, description="rounds that an expert may go untuned by all; None: any")
    max_tuners: int | None = Field(None, ge=1, description="participants that tune one expert at a time; None: all")
    uncertainty: float = Field(0.0, ge=0, description="weight of the bonus for utilities measured long ago")
    explore_by: Literal["probes", "backward"] = Field(
        "probes", description="utilities of explored experts: forward passes, or one backward pass for all of them"
    )
    num_probes: int = Field(1, ge=1)
    probes_per_round: int | None = Field(8, ge=0, description="explored experts probed each round; None: all of them")

    uplink_wire: WireType = Field("float32", description="type of changes on their way to the server")
    downlink_wire: WireType = Field("float32", description="type of experts on their way to participants")
    merged_downlink: Literal["exact", "4bit", "server"] = Field(
        "exact", description="how experts travel that the participant will only merge; server: merged by it"
    )

    aggregation: Literal["mean", "trimmed_mean", "median", "krum"] = Field(
        "mean", description="how the changes of one expert are combined; see federation.robust"
    )
    trim_fraction: float = Field(0.2, gt=0, lt=0.5, description="share of an expert's tuners that may be bad")
    clip_norm: float | None = Field(None, gt=0, description="bound on the norm of a participant's whole change")
    clip_quantile: float | None = Field(None, gt=0, lt=1, description="quantile of the norms that clip_norm follows")
    noise_multiplier: float = Field(0.0, ge=0, description="standard deviation of the noise, in units of clip_norm")
    noise: Literal["server", "participant"] = Field("server", description="who adds it: central or local privacy")
    withhold_reports: bool = Field(False, description="participants send no utilities, token counts or frequencies")

    fleet: str = "paper"
    link: str = "1gbps"
    clock_model: str = "self"
    clock_tokens_per_sample: int | None = Field(None, ge=1, description="None: the run's own token counts")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.participants_per_round is not None and self.participants_per_round > self.participants:
            raise ValueError(
                f"participants_per_round is {self.participants_per_round}, "
                f"allowed is at most participants={self.participants}"
            )
        if isinstance(self.epsilon, float) and not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon is {self.epsilon}, allowed are 'dynamic', 'paper' and more than 0 up to 1")
        asked = self.participants_per_round or self.participants
        if self.max_tuners is not None and self.max_tuners < self.tune_fraction * asked:
            raise ValueError(
                f"max_tuners is {self.max_tuners}, allowed is at least tune_fraction times the {asked} participants "
                f"of a round, {self.tune_fraction * asked:g} (there must be places for all of their budgets)"
            )
        if (self.noise_multiplier or self.clip_quantile) and self.clip_norm is None:
            name = "noise_multiplier" if self.noise_multiplier else "clip_quantile"
            raise ValueError(f"{name} is set and clip_norm is not; it needs a norm to refer to")
        central = self.noise_multiplier and self.noise == "server"
        if central and self.clip_quantile and self.noise_multiplier >= self.fewest_replies / 10:
            raise ValueError(
                f"noise_multiplier is {self.noise_multiplier:g}, allowed with clip_quantile is less than "
                f"{self.fewest_replies / 10:g}, a tenth of the {self.fewest_replies} replies that min_replies_frac "
                "asks for: the noisy count of those within the norm would cost more than that noise allows"
            )
        if central and self.aggregation != "mean":
            raise ValueError(f"aggregation is {self.aggregation!r}, allowed with noise on the server is 'mean'")
        if self.withhold_reports and self.assignment != "random":
            raise ValueError(f"assignment is {self.assignment!r}, allowed with withhold_reports is 'random'")
        if self.merged_downlink == "server" and not self.stale_profile:
            raise ValueError("stale_profile is False, allowed with merged_downlink 'server' is True")
        if self.merged_downlink == "server" and self.withhold_reports:
            raise ValueError(
                "withhold_reports is True, allowed with merged_downlink 'server' is False: it needs profiles"
            )
        if self.tune_fraction + self.merge_fraction > 1 and self.tune_fraction < 1:
            raise ValueError(
                f"tune_fraction + merge_fraction is {self.tune_fraction + self.merge_fraction:g}, allowed is at most 1 "
                "(more slots than experts)"
            )
        return self

    @property
    def fewest_replies(self) -> int:
        """Good replies without which a round, and with it the run, fails."""
        return math.ceil(self.min_replies_frac * (self.participants_per_round or self.participants) - 1e-9)

    @property
    def numbers(self) -> str:
        """Digest of what the numbers depend on: runs that differ in engine, hardware or patience only have the same."""
        text = self.model_dump_json(exclude=set(NO_NUMBERS))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def probe_limit(self) -> int | None:
        """Explored experts whose utility is measured in a round, at most; a backward pass measures all at once."""
        return None if self.explore_by == "backward" else self.probes_per_round

    @property
    def run_id(self) -> str:
        """Name of the run in the store: the things that runs are compared by."""
        model, task = (Path(name).name for name in (self.model, self.task))
        return "-".join(part for part in (self.method, self.variant, model, task, f"seed{self.seed}") if part)


def make_config(parameters: dict[str, Any]) -> RunConfig:
    """Validate ``parameters`` into a :class:`RunConfig`.

    Raises:
        ConfigError: one line per bad parameter: its name, what is allowed and what came.
    """
    try:
        return RunConfig(**parameters)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] == "extra_forbidden":
        return f"unknown parameter {name!r}; allowed are {', '.join(RunConfig.model_fields)}"
    came = "" if item["type"] == "value_error" else f", got {item['input']!r}"
    return f"{name}: {item['msg'].removeprefix('Value error, ')}{came}"
