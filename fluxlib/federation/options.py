"""What a run is asked for besides its configuration, what comes out, and what can be refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fluxlib import methods, models, tasks
from fluxlib.config import ConfigError, RunConfig, check_writable
from fluxlib.devices import catalogue
from fluxlib.federation.server.budgets import make_budgets
from fluxlib.federation.server.outcome import RoundOutcome
from fluxlib.federation.store.tables import Row
from fluxlib.models.hardware import torch_device
from fluxlib.moe import find

OnRound = Callable[[Row], "bool | None"]
"""Called with each new row of ``rounds``; returning True ends the run after that round."""

OnOutcome = Callable[[RoundOutcome], None]
"""Called with what happened in a round, roles included, before its row of ``rounds``."""


@dataclass(frozen=True)
class Options:
    """What a run's numbers do not depend on.

    ``out`` is the folder of tables and checkpoints, ``None`` to write nothing. ``superlink`` names the connection of
    Flower's configuration that the deployment engine uses. ``keep_experts`` also writes the tuned experts.
    """

    out: Path | None = None
    on_round: OnRound | None = None
    on_outcome: OnOutcome | None = None
    superlink: str | None = None
    keep_experts: bool = False


@dataclass(frozen=True)
class RunResult:
    """A run's tables, where they were written, and the tuned global model."""

    run_id: str
    rounds: pd.DataFrame
    participants: pd.DataFrame
    path: Path | None
    model: Any
    timeline: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def files(self) -> dict[str, Path]:
        """The table files by name; empty when nothing was written."""
        if self.path is None:
            return {}
        return {name: table_path(self.path, name, self.run_id) for name in ("rounds", "participants", "timeline")}


def experts_path(out: Path, run_id: str) -> Path:
    """Where a run's tuned experts lie in the folder ``out``: safetensors under ``"<layer>.<expert>.<tensor>"``."""
    return out / "experts" / f"{run_id}.safetensors"


def table_path(out: Path, table: str, run_id: str) -> Path:
    """Where a run's table lies in the folder ``out``."""
    return out / table / f"{run_id}.parquet"


def check(config: RunConfig, out: Path | None = None) -> None:
    """Refuse what cannot be run, before any work: names, budgets, an output folder that cannot be written.

    Raises:
        ConfigError: naming the parameter, what is allowed and what came.
    """
    try:
        methods.get(config.method)
        if config.task not in tasks.TASKS:
            raise ValueError(f"task is {config.task!r}, allowed are {', '.join(tasks.TASKS)}")
        torch_device(config.torch_device)
        catalogue.fleet(config.clock.fleet, config.federation.participants)
        catalogue.link(config.clock.link)
        num_train = len(tasks.load(config.task, config.seed, config.data.task_size, config.data.path).train)
        if config.federation.participants > num_train:
            raise ValueError(
                f"participants is {config.federation.participants}, allowed is at most {num_train} training samples"
            )
        settings = models.config(config.model)
        if config.clock.model not in ("self", config.model):
            models.config(config.clock.model)
        shape = _moe_shape(settings)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    make_budgets(config, *shape)
    if out is not None:
        check_writable(out)


def _moe_shape(settings: Any) -> tuple[int, int]:
    """MoE layers and experts per layer of a model, from its configuration alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        found = find.layers(AutoModelForCausalLM.from_config(settings))
    return len(found), max(layer.num_experts for layer in found)
