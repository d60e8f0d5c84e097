"""How many experts each participant may tune and hold merged; checked before any work."""

from __future__ import annotations

import math

from fluxlib.config import ConfigError, RunConfig
from fluxlib.methods.base import Budget


def make_budgets(config: RunConfig, num_layers: int, num_experts: int) -> list[Budget]:
    """The budget of every participant, in order: shares of all ``num_layers * num_experts`` routed experts.

    Slots never outnumber the experts that are not tuned.

    Paper: ``B_tune`` (section 6) and ``B_non`` (section 5.1); how they follow from a device's resources is not said.

    Raises:
        ConfigError: fewer tuned experts than layers, or fewer merged slots than layers that may need one; the
            message names the setting and the smallest value that is allowed.
    """
    total = num_layers * num_experts
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
