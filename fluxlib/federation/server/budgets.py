"""How many experts each participant may tune and hold merged; checked before any work."""

from __future__ import annotations

import math

from fluxlib.config import ConfigError, RunConfig
from fluxlib.methods.base import Budget


def make_budgets(config: RunConfig, num_layers: int, num_experts: int) -> list[Budget]:
    """The budget of every participant, in order.

    ``tune_fraction`` and ``merge_fraction`` are shares of all ``num_layers * num_experts`` routed experts.
    ``budget_spread`` s makes participants differ: evenly spaced from (1 - s) to (1 + s) times the common budget,
    the smallest first. A participant that can hold everything tuned needs no merged slots.

    Paper: ``B_tune`` (section 6) and ``B_non`` (section 5.1); how they follow from a device's resources is not said.

    Raises:
        ConfigError: fewer tuned experts than layers, or fewer merged slots than layers that may need one; the
            message names the parameter and the smallest value that is allowed.
    """
    total = num_layers * num_experts
    scales = _scales(config.federation.participants, 0.0)
    smallest = scales[0]
    tuned = [min(total, round(config.budget.tune_frac * total * scale)) for scale in scales]
    if tuned[0] < num_layers:
        least = _round_up(num_layers / (total * smallest))
        raise ConfigError(
            f"tune_fraction is {config.budget.tune_frac:g}, allowed is at least {least:g}: the smallest participant may "
            f"tune {tuned[0]} experts, the model has {num_layers} MoE layers and each needs one"
        )
    merged = [
        min(total - number, round(config.budget.merge_frac * total * scale))
        for number, scale in zip(tuned, scales, strict=True)
    ]
    for number, slots in zip(tuned, merged, strict=True):
        needed = min(num_layers, total - number)
        if slots < needed:
            least = _round_up(num_layers / (total * smallest))
            raise ConfigError(
                f"merge_fraction is {config.budget.merge_frac:g}, allowed is at least {least:g}: {slots} merged slots do "
                f"not give each of {needed} layers with experts that are not tuned a slot"
            )
    return [Budget(number, slots) for number, slots in zip(tuned, merged, strict=True)]


def _scales(participants: int, spread: float) -> list[float]:
    if participants == 1:
        return [1.0]
    return [1 - spread + 2 * spread * index / (participants - 1) for index in range(participants)]


def _round_up(value: float) -> float:
    """To four digits after the point, upwards: a value that is printed must be one that is accepted."""
    return math.ceil(value * 10_000 - 1e-9) / 10_000
