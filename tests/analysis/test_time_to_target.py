"""Time to target on curves made by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from fluxlib.analysis.statistics import geometric, interval
from fluxlib.analysis.time_to_target import by_loss, crossing, reach, times_to_target, without_reference


def run(method: str, seed: int, metrics: list[float], round_s: float, variant: str = "") -> pd.DataFrame:
    """One run, round 0 included, every round taking ``round_s`` on the device clock and 2 s here."""
    index = np.arange(len(metrics))
    fixed = {"method": method, "variant": variant, "seed": seed, "model": "mini-llama-moe", "task": "mini-gsm8k"}
    fixed |= {"metric_name": "exact_match", "clock_model": "llama-moe-3.5b", "link": "1gbps"}
    frame = pd.DataFrame({"round": index, "metric": metrics, "device_s": round_s * index, "wall_s": 2.0 * index})
    return frame.assign(round_device_s=round_s * (index > 0), run_id=f"{method}-{variant}-{seed}", **fixed)


@pytest.fixture
def rounds() -> pd.DataFrame:
    return pd.concat(
        [
            run("fmd", 0, [0.0, 0.4, 0.8], 10.0),
            run("fmd", 1, [0.0, 0.6, 1.0], 10.0),
            run("flux", 0, [0.0, 0.45, 0.9], 2.0),
            run("flux", 1, [0.0, 0.45, 0.9], 4.0),
        ],
        ignore_index=True,
    )


def test_a_crossing_is_linear_between_scored_rounds_and_the_first_one_counts():
    assert crossing([0, 10, 20], [0.0, 0.4, 0.8], 0.6) == pytest.approx(15.0)
    assert crossing([0, 10, 20], [0.0, math.nan, 0.8], 0.4) == pytest.approx(10.0)
    assert crossing([0, 10], [0.0, 0.4], 0.4) == pytest.approx(10.0)
    assert crossing([3, 10], [0.5, 0.6], 0.4) == 3.0
    assert crossing([0, 1, 2, 3], [0.0, 1.0, 0.0, 1.0], 1.0) == 1.0


def test_by_loss_the_score_is_how_far_the_loss_has_fallen():
    rounds = pd.DataFrame(
        {"run_id": ["a"] * 3 + ["b"] * 2, "round": [0, 1, 2, 0, 1], "loss": [3.0, math.nan, 1.0, 2.0, 2.5]}
    )
    found = by_loss(rounds.assign(metric=0.5))
    assert found["metric"].fillna(-9).tolist() == [0.0, -9, 2.0, 0.0, -0.5]


def test_a_target_that_is_never_reached_has_no_time():
    assert math.isnan(crossing([0, 10, 20], [0.0, 0.4, 0.3], 0.5))
    assert math.isnan(crossing([], [], 0.5))


def test_wrong_series_are_refused():
    with pytest.raises(ValueError, match="longer"):
        crossing([0], [0.0, 1.0], 0.5)
    with pytest.raises(ValueError, match="backwards"):
        crossing([1, 0], [0.0, 1.0], 0.5)


def test_the_target_is_a_share_of_the_references_final_score_with_the_same_seed(rounds):
    times = times_to_target(rounds, 0.5, final_rounds=1).set_index(["method", "seed"])
    # The reference ends at 0.8 and 1.0, so targets are 0.4 and 0.5.
    assert times["target"].groupby("seed").unique().tolist() == [[0.4], [0.5]]
    assert times.loc[("fmd", 0), "device_s_to_target"] == pytest.approx(10.0)
    assert times.loc[("fmd", 1), "device_s_to_target"] == pytest.approx(10 * 0.5 / 0.6)
    assert times.loc[("flux", 0), "device_s_to_target"] == pytest.approx(2 * 0.4 / 0.45)
    assert times.loc[("flux", 0), "speedup_device_s"] == pytest.approx(10.0 / (2 * 0.4 / 0.45))
    assert times.loc[("flux", 1), "speedup_device_s"] == pytest.approx((10 * 0.5 / 0.6) / (4 * (1 + 0.05 / 0.45)))
    assert times.loc[("flux", 1), "final_frac"] == pytest.approx(0.9)
    assert times.loc[("flux", 1), ["rounds", "end_s", "round_s", "best_metric"]].tolist() == [2, 8.0, 4.0, 0.9]


def test_what_missed_the_target_took_its_whole_run_at_least(rounds):
    times = times_to_target(rounds, 1.0, final_rounds=1).set_index(["method", "seed"])
    missed = times.loc[("flux", 1)]
    assert math.isnan(missed["device_s_to_target"]) and math.isnan(missed["speedup_device_s"])
    assert (missed["device_s_at_least"], missed["round_at_least"]) == (8.0, 2)
    assert times.loc[("flux", 0), "speedup_device_s"] == pytest.approx(20.0 / (2 * (1 + 0.35 / 0.45)))


def test_a_seed_without_the_reference_has_no_target_and_is_named(rounds):
    more = pd.concat([rounds, run("flux", 2, [0.0, 0.9], 1.0)])
    assert sorted(times_to_target(more, 0.5)["seed"]) == [0, 0, 1, 1]
    assert without_reference(more) == ["flux--2"] and without_reference(rounds) == []


def test_other_runs_than_methods_are_compared_by_any_column(rounds):
    settings = rounds.assign(setting=rounds["method"].map({"fmd": "a", "flux": "b"}), method="flux")
    times = times_to_target(settings, 0.5, "a", "setting", ("model", "task"), final_rounds=1)
    assert times["target"].unique().tolist() == [0.45] and times["setting"].tolist() == ["a", "a", "b", "b"]
    given = reach(rounds, 0.45, 1)
    pd.testing.assert_series_equal(given["device_s_to_target"], times["device_s_to_target"])


def test_the_reference_must_be_there(rounds):
    with pytest.raises(ValueError, match="reference 'fmq' has no run .* there are fmd, flux"):
        times_to_target(rounds, reference="fmq")
    with pytest.raises(ValueError, match="fraction is 2"):
        times_to_target(rounds, 2)


def test_intervals_over_seeds_say_what_they_are():
    assert interval([1.0]) == (1.0, 1.0, 1.0)
    assert interval([1.0, 3.0]) == (2.0, 1.0, 3.0)
    mean, low, high = interval([1.0, 2.0, 3.0])
    # t quantile 4.3027 with two degrees of freedom, standard error 1 / sqrt(3).
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - 2.4841, 2.0 + 2.4841), abs=1e-3)
    assert geometric([2.0, 8.0])[0] == pytest.approx(4.0)
