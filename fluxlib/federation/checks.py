"""What can be refused before any work: names, sizes, budgets, a folder that cannot be written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from fluxlib import methods, models, tasks
from fluxlib.config import RunConfig
from fluxlib.devices import catalogue
from fluxlib.devices.dry_run import meta_model
from fluxlib.devices.memory import METHODS as PLANNED
from fluxlib.devices.memory import share_that_fits
from fluxlib.io import ConfigError, check_writable, reading
from fluxlib.methods.base import Budget
from fluxlib.models.loading import torch_device
from fluxlib.moe import find


def check(config: RunConfig, out: Path | None = None) -> None:
    """Refuse what cannot be run: ConfigError names the parameter, what is allowed and what came."""
    people = config.federation.participants
    try:
        methods.get(config.method)
        torch_device(config.torch_device)
        catalogue.fleet(config.clock.fleet, people)
        catalogue.link(config.clock.link)
        num_train = len(tasks.load(config.task, config.seed, config.data.task_size, config.data.path).train)
        if people > num_train:
            raise ValueError(f"federation.participants is {people}, allowed is at most {num_train} training samples")
        if config.clock.model not in ("self", config.model):
            with reading("clock.model"):
                models.config(config.clock.model)
        layers = find.layers(meta_model(models.config(config.model), torch.float32))
        make_budgets(config, len(layers), max(layer.num_experts for layer in layers))
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    if out is not None:
        check_writable(out)


def make_budgets(
    config: RunConfig, num_layers: int, num_experts: int, fleet: Sequence[catalogue.Device] | None = None
) -> list[Budget]:
    """The budget of every participant, in order: shares of all ``num_layers * num_experts`` routed experts.

    With ``budget.by="device"`` the largest shares that fit the memory of each one's device: of ``fleet``, the
    run's own if it is not given. Slots never outnumber the experts that are not tuned.

    Paper: ``B_tune`` (section 6) and ``B_non`` (section 5.1); how they follow from a device's resources is not said.

    Raises:
        ConfigError: fewer tuned experts than layers, or fewer merged slots than layers that may need one; the
            message names the setting and the smallest value that is allowed. Or a device that the method does not
            fit on, by name.
    """
    total = num_layers * num_experts
    if config.budget.by == "device":
        fleet = fleet or catalogue.fleet(config.clock.fleet, config.federation.participants)
        return [_fitting(config, device, num_layers, total) for device in fleet]
    least = math.ceil(10_000 / num_experts - 1e-9) / 10_000  # upwards: a value that is printed is one that is accepted
    tuned = min(total, round(config.budget.tune_frac * total))
    if tuned < num_layers:
        raise ConfigError(
            f"budget.tune_frac is {config.budget.tune_frac:g}, allowed is at least {least:g}: a participant may tune "
            f"{tuned} experts, the model has {num_layers} MoE layers and each needs one"
        )
    slots = min(total - tuned, round(config.budget.merge_frac * total))
    needed = min(num_layers, total - tuned)
    if slots < needed:
        raise ConfigError(
            f"budget.merge_frac is {config.budget.merge_frac:g}, allowed is at least {least:g}: {slots} merged slots "
            f"do not give each of {needed} layers with experts that are not tuned a slot"
        )
    return [Budget(tuned, slots)] * config.federation.participants


def _fitting(config: RunConfig, device: catalogue.Device, num_layers: int, total: int) -> Budget:
    """The largest budget that fits on ``device``, rounded down to whole experts of the model that is trained.

    At least one is tuned and one slot a layer merged: a small model has no smaller share, however little would fit.
    """
    if config.method not in PLANNED:
        raise ConfigError(
            f"budget.by is 'device', allowed for method {config.method!r} is 'shares': memory is planned for "
            f"{', '.join(PLANNED)}"
        )
    try:
        tuned_share, merged_share = share_that_fits(config, int(device.memory_bytes))
    except ValueError as error:
        raise ConfigError(f"budget.by is 'device', {config.method} does not fit on {device.name}: {error}") from None
    if config.method in ("fmd", "fmq"):  # they tune everything; what does not fit waits in host memory
        return Budget(total, 0)
    tuned = max(1, int(tuned_share * total))
    return Budget(tuned, min(total - tuned, max(num_layers, int(merged_share * total))))
