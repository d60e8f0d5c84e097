"""Rows of the study notebooks: their shape, the budgets they keep to, and verdicts on numbers by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from fluxlib import records
from fluxlib.analysis import claims, studies
from fluxlib.analysis.claims.judge import judge, weakest
from fluxlib.analysis.claims.tables import values as by_seed
from fluxlib.analysis.studies import bench as common
from fluxlib.analysis.studies import merging, profiling
from fluxlib.devices import catalogue, clock
from fluxlib.io import ConfigError


@pytest.fixture(scope="module")
def whole() -> studies.Bench:
    (found,) = studies.benches("mini-llama-moe", ["mini-piqa"], [0], held_out=4)
    return found


@pytest.fixture(scope="module")
def bench(whole: studies.Bench) -> studies.Bench:
    return dataclasses.replace(whole, parts=[part[:8] for part in whole.parts[:2]])


def test_unknown_tasks_and_no_seeds_stop_before_a_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"tasks: unknown \['mini-none'\]; allowed are mini-dolly"):
        next(studies.benches("no-such-model", ["mini-none"], [0]))
    with pytest.raises(ConfigError, match="at least one"):
        next(studies.benches("no-such-model", [], [0]))
    with pytest.raises(ConfigError, match="seeds: at least one"):
        next(studies.benches("no-such-model", ["mini-piqa"], []))


def test_held_out_samples_are_nobodys(whole: studies.Bench) -> None:
    held = {tuple(row.tolist()) for row in whole.held_out[0]["input_ids"]}
    local = {tuple(row.tolist()) for batch in whole.local(10**6) for row in batch["input_ids"]}
    assert len(whole.held_out[0]["input_ids"]) == 4
    assert not held & local


def test_rows_of_section_4_fit_the_table_and_leave_the_model_as_it_was(bench: studies.Bench) -> None:
    before = [tensor.clone() for tensor in bench.model.state_dict().values()]
    rows = [
        *profiling.activation([bench], 4),
        *profiling.by_bits([bench], 4, bits=(4,)),
        *profiling.by_samples([bench], (2,), 4),
        *profiling.drift([bench], rounds=1, participants=1, num_samples=4),
        *profiling.round_saving("mini-llama-moe", "llama-moe-3.5b"),
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, bench.model.state_dict().values(), strict=True))
    table = studies.measurements(rows, "01_profiling-test")
    records.validate("measurements", table)
    shares = table[table["study"] == "activation"].groupby("layer")["value"].sum()
    assert shares.to_numpy() == pytest.approx(np.ones(len(shares)), abs=1e-5)
    saved = table[table["study"] == "round_saving"]
    assert saved["value"].between(0, 1).all() and len(saved) == len(catalogue.LINKS) * len(profiling.SAMPLES)
    assert "error of a 4-bit profile: paper 11.01 %, ours" in claims.in_notebook("01_profiling", table, "a test")


@pytest.mark.parametrize("tuned_by", ["frequency", "random"])
def test_every_variant_keeps_to_the_budget(bench: studies.Bench, tuned_by: str) -> None:
    (case,) = merging.cases([bench], 4, tuned_by, tune_fraction=0.5, merge_fraction=0.25)
    assert int(case.tuned.sum()) == bench.num_experts // 2
    some = merging.VARIANTS if tuned_by == "frequency" else {"single": {"budgets": "single"}, "adaptive": {}}
    for setting, rules in some.items():
        slots = sum(len(plan.groups) for plan in case.plan(**rules))
        assert slots <= case.num_merged if setting == "single" else slots == case.num_merged, setting
    assert all(len(group) == 1 for plan in case.discard() for group in plan.groups)


def test_who_is_tuned_has_two_rules(bench: studies.Bench) -> None:
    with pytest.raises(ValueError, match="'frequency' or 'random', got 'luck'"):
        merging.cases([bench], 4, "luck", 0.25, 0.25)
    known = bench.profile(4)
    busiest = known.frequency[common.tuned_experts(known, 0.25)]
    assert busiest.min() >= known.frequency[~common.tuned_experts(known, 0.25)].max()


def test_own_share_counts_what_only_flux_does() -> None:
    rows = pd.DataFrame(merging.own_share_on_the_clock("mini-llama-moe", "llama-moe-3.5b"))
    seconds = rows[(rows["study"] == "phase_device_s") & (rows["x"] == 64)].set_index("setting")["value"]
    own = sum(seconds[f"1 Gb/s: {phase}"] for phase in merging.OWN_PHASES)
    total = sum(value for name, value in seconds.items() if name.startswith("1 Gb/s"))
    work = common.typical_round(clock.shapes("llama-moe-3.5b").num_experts, 64, 256, 32)
    server_s = clock.server_seconds([work] * 10, clock.shapes("llama-moe-3.5b"))
    share = rows[(rows["setting"] == "1 Gb/s, serial") & (rows["x"] == 64)]["value"].item()
    assert share == pytest.approx(own / (total + server_s))


@pytest.mark.parametrize(
    ("values", "reach", "better", "expected"),
    [
        ([0.5, 0.6, 0.55], 0.476, "larger", "agrees"),
        ([0.5, 0.6], 0.476, "larger", "agrees in direction"),  # two seeds have a range, no interval
        ([0.1, 0.2], 0.476, "larger", "agrees in direction"),
        ([-0.1, 0.2], 0.476, "larger", "does not"),
        ([0.0, 0.0], 0.0, "larger", "does not"),
        ([45.0, 50.0, 45.0], 40, "larger", "agrees"),
        ([0.9, 1.2], 40, "larger", "does not"),
        ([1.1, 3.0], 40, "larger", "agrees in direction"),
        ([0.9], 0.476, "larger", "agrees in direction"),  # one seed is an anecdote
        ([0.9, 0.1, 0.9], 0.476, "larger", "agrees in direction"),  # every seed, but the interval includes 0
        ([0.9, 0.9, 0.9, 0.9, -0.01], 0.476, "larger", "agrees in direction"),  # the interval, but not every seed
        ([0.1, 0.9, 0.5], 0.0, "larger", "agrees in direction"),  # a direction alone: the same rule
        ([0.01, 0.012, 0.01], 0.02, "smaller", "agrees"),
        ([0.01, 0.02], 0.02, "smaller", "agrees in direction"),
        ([0.01], 0.02, "smaller", "agrees in direction"),
        ([0.03, 0.03], 0.02, "smaller", "does not"),
        ([0.05, 0.15, 0.10], 0.1101, "smaller", "does not"),  # neither every seed nor the interval keeps it
    ],
)
def test_verdicts_by_hand(values: list[float], reach: float, better: str, expected: str) -> None:
    assert judge(np.array(values), reach, better) == expected


def test_what_the_model_makes_positive_must_reach_its_size_and_needs_no_seeds() -> None:
    saved = {"none": 0.282, "seeded": False}
    assert [judge(np.array([v]), 0.282, **saved) for v in (0.05, 0.282)] == ["does not", "agrees"]


def test_no_effect_may_differ_by_seed() -> None:
    without = np.array([0.7, 0.6, 0.7])
    held = ([0.1, 0.2, 0.1], [0.4, 0.5, 0.4], [0.8, 0.5, 0.8])
    found = [judge(np.array(v), 0.29, "smaller", without) for v in held]
    assert found == ["agrees", "agrees in direction", "does not"]


def test_ratios_are_judged_on_their_logarithms() -> None:
    halved_and_fourfold = np.array([0.5, 0.5, 4.0])  # arithmetic mean 1.67, geometric mean 1
    assert judge(halved_and_fourfold, 1.0, ratio=True) == "does not"
    assert weakest(["agrees", "does not", "agrees in direction"]) == "does not"


def test_two_settings_meet_on_the_seeds_and_tasks_that_both_have() -> None:
    rows = [studies.row("error", setting, value, model="m", task=task, seed=seed)
            for setting, seed, task, value in (("a", 0, "t", 1.0), ("a", 1, "t", 2.0), ("a", 1, "u", 8.0),
                                               ("b", 1, "t", 4.0), ("b", 2, "t", 9.0))]  # fmt: skip
    ratio = {"study": "error", "setting": "a", "over": "b"}
    assert by_seed(pd.DataFrame(rows), ratio).to_dict() == {1: 0.5}
    assert by_seed(pd.DataFrame(rows), {"study": "error", "setting": "a"}).to_dict() == {0: 1.0, 1: 5.0}


def test_the_ends_of_a_study_are_compared_where_it_has_two() -> None:
    rows = [studies.row("growth", "", value, model="m", task="t", seed=seed, layer=3, x=x)
            for seed, first in ((0, 2.0), (1, 8.0)) for x, value in ((0, first), (3, 1.0))]  # fmt: skip
    table, ends = pd.DataFrame(rows), {"study": "growth", "layer": "last", "x": "first", "over": "last"}
    assert by_seed(table, ends).to_dict() == {0: 2.0, 1: 8.0}
    assert by_seed(table[table["x"] == 0], ends).empty and by_seed(table[:0], ends).empty
