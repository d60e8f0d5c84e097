"""Budgets: shares of all experts, refused by name when nothing could work."""

from __future__ import annotations

import re

import pytest

from fluxlib.config import make_config
from fluxlib.devices import catalogue
from fluxlib.devices.memory import plan
from fluxlib.federation.checks import make_budgets
from fluxlib.io import ConfigError
from fluxlib.methods.base import Budget


def budgets(tune_frac: float, merge_frac: float) -> list[Budget]:
    config = make_config({"federation.participants": 2, "budget.tune_frac": tune_frac, "budget.merge_frac": merge_frac})
    return make_budgets(config, num_layers=4, num_experts=16)


def test_shares_are_of_all_experts() -> None:
    assert budgets(0.25, 0.125) == [Budget(16, 8)] * 2


def test_slots_never_outnumber_experts_that_are_not_tuned() -> None:
    assert budgets(0.9, 0.1) == [Budget(58, 6)] * 2
    assert budgets(1.0, 0.5) == budgets(1.0, 0.0) == [Budget(64, 0)] * 2


@pytest.mark.parametrize(("tune_frac", "merge_frac", "name"), [(0.03, 0.2, "tune_frac"), (0.2, 0.01, "merge_frac")])
def test_too_little_is_refused_with_the_least_that_is_allowed(tune_frac: float, merge_frac: float, name: str) -> None:
    with pytest.raises(ConfigError, match=f"budget.{name} is") as caught:
        budgets(tune_frac, merge_frac)
    found = re.search(r"at least ([\d.]+\d)", str(caught.value))
    assert found
    (allowed, _) = budgets(**({"tune_frac": tune_frac, "merge_frac": merge_frac} | {name: float(found[1])}))
    assert allowed.num_tuned >= 4 and allowed.num_merged >= 4


def fitting(method: str, fleet: str, **more: object) -> list[Budget]:
    config = make_config({
        "method": method, "federation.participants": 2, "budget.by": "device", "clock.fleet": fleet,
        "clock.model": "llama-moe-3.5b", "clock.tokens_per_sample": 128, **more,
    })  # fmt: skip
    return make_budgets(config, num_layers=6, num_experts=16)


def test_budgets_follow_from_the_memory_of_each_participants_device() -> None:
    large, small = fitting("flux", "consumer")  # 24 and 16 GB
    assert 0 < small.num_tuned < large.num_tuned < 96 and small.num_merged >= 6
    planned = plan("llama-moe-3.5b", "24GiB", "flux", batch=16, tokens=128)
    assert large.num_tuned == int(96 * planned.num_tuned / planned.num_experts)
    assert fitting("flux", "cpu-laptop")[0].num_tuned > large.num_tuned  # 32 GB
    assert fitting("flux", "l20", **{"training.batch_size": 32})[0].num_tuned < fitting("flux", "l20")[0].num_tuned


def test_what_is_offloaded_needs_no_budget() -> None:
    assert fitting("fmd", "rtx-3060") == fitting("fmq", "rtx-4090") == [Budget(96, 0)] * 2


def test_a_device_that_a_method_does_not_fit_on_is_named() -> None:
    with pytest.raises(ConfigError, match="budget.by is 'device', fmes does not fit on rtx-4090: memory"):
        fitting("fmes", "rtx-4090")


def test_a_node_that_names_its_device_gets_that_ones_budget() -> None:
    config = make_config({
        "federation.participants": 2, "budget.by": "device", "clock.fleet": "l20", "clock.model": "llama-moe-3.5b",
        "clock.tokens_per_sample": 128,
    })  # fmt: skip
    l20, rtx = catalogue.DEVICES["l20"], catalogue.DEVICES["rtx-4090"]
    plain, named = (make_budgets(config, 6, 16, fleet) for fleet in (None, [l20, rtx]))
    assert named[0] == plain[0] and named[1].num_tuned < plain[1].num_tuned
