from __future__ import annotations

import itertools
import math
import time

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from fluxlib import figures, records
from fluxlib.figures import style
from fluxlib.figures.canvas import interval, interval_name

DEFAULTS = {"string": "x", "int64": 0, "float64": 0.0}


def run(method: str, seed: int, metrics: list[float], round_s: float, task: str = "mini-gsm8k") -> pd.DataFrame:
    """One run of the ``rounds`` table, round 0 included, every round taking ``round_s`` on the device clock."""
    rows = pd.DataFrame({c.name: [DEFAULTS[c.dtype]] * len(metrics) for c in records.ROUNDS})
    index = np.arange(len(metrics))
    return rows.assign(
        run_id=f"{method}-{task}-{seed}",
        method=method,
        model="mini-llama-moe",
        task=task,
        seed=seed,
        round=index,
        metric=metrics,
        metric_name="exact_match",
        device_s=round_s * index,
        wall_s=2.0 * index,
        clock_model="llama-moe-3.5b",
        link="1gbps",
        variant="",
    )


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


def test_time_to_target_is_linear_between_scored_rounds():
    assert figures.time_to_target([0, 10, 20], [0.0, 0.4, 0.8], 0.6) == pytest.approx(15.0)
    assert figures.time_to_target([0, 10, 20], [0.0, math.nan, 0.8], 0.4) == pytest.approx(10.0)
    assert figures.time_to_target([0, 10], [0.0, 0.4], 0.4) == pytest.approx(10.0)
    assert figures.time_to_target([3, 10], [0.5, 0.6], 0.4) == 3.0


def test_a_target_that_is_never_reached_has_no_time():
    assert math.isnan(figures.time_to_target([0, 10, 20], [0.0, 0.4, 0.3], 0.5))
    assert math.isnan(figures.time_to_target([], [], 0.5))


def test_the_first_crossing_counts():
    assert figures.time_to_target([0, 1, 2, 3], [0.0, 1.0, 0.0, 1.0], 1.0) == 1.0


def test_wrong_series_are_refused():
    with pytest.raises(ValueError, match="times has 1 values and metrics 2"):
        figures.time_to_target([0], [0.0, 1.0], 0.5)
    with pytest.raises(ValueError, match="backwards"):
        figures.time_to_target([1, 0], [0.0, 1.0], 0.5)


def test_the_target_is_a_share_of_the_references_final_score_with_the_same_seed(rounds):
    times = figures.times_to_target(rounds, target_fraction=0.5).set_index(["method", "seed"])
    # The reference ends at 0.8 and 1.0, so targets are 0.4 and 0.5.
    assert times["target"].groupby("seed").unique().tolist() == [[0.4], [0.5]]
    assert times.loc[("fmd", 0), "device_s"] == pytest.approx(10.0)
    assert times.loc[("fmd", 1), "device_s"] == pytest.approx(10 * 0.5 / 0.6)
    assert times.loc[("flux", 0), "device_s"] == pytest.approx(2 * 0.4 / 0.45)
    assert times.loc[("flux", 0), "speedup_device_s"] == pytest.approx(10.0 / (2 * 0.4 / 0.45))
    assert times.loc[("flux", 1), "speedup_device_s"] == pytest.approx((10 * 0.5 / 0.6) / (4 * (1 + 0.05 / 0.45)))
    assert times.loc[("flux", 1), "final_frac"] == pytest.approx(0.9)


def test_a_seed_without_the_reference_has_no_target_and_is_named(rounds):
    more = pd.concat([rounds, run("flux", 2, [0.0, 0.9], 1.0)])
    assert sorted(figures.times_to_target(more, 0.5)["seed"]) == [0, 0, 1, 1]
    assert figures.without_reference(more) == ["flux-mini-gsm8k-2"] and figures.without_reference(rounds) == []


def test_no_speedup_where_either_side_missed_the_target(rounds):
    times = figures.times_to_target(rounds, target_fraction=1.0).set_index(["method", "seed"])
    assert math.isnan(times.loc[("flux", 1), "device_s"]) and math.isnan(times.loc[("flux", 1), "speedup_device_s"])
    assert times.loc[("flux", 0), "speedup_device_s"] == pytest.approx(20.0 / (2 * (1 + 0.35 / 0.45)))


def test_the_reference_must_be_there(rounds):
    with pytest.raises(ValueError, match="reference 'fmq' has no run .* there are flux, fmd"):
        figures.times_to_target(rounds, reference="fmq")
    with pytest.raises(ValueError, match="target_fraction is 2"):
        figures.times_to_target(rounds, target_fraction=2)


def test_a_variant_can_stand_beside_the_plain_runs_as_a_method(rounds):
    changed = rounds[rounds["method"] == "flux"].assign(variant="improved")
    other = changed.assign(variant="random")
    found = figures.with_variants(pd.concat([rounds, changed, other]), {"improved": "+"})
    assert set(found["method"]) == {*rounds["method"], "flux+"} and len(found) == len(rounds) + len(changed)


def test_an_option_is_compared_on_the_seeds_that_have_it():
    fmd, flux = (run(method, 0, [0.0, 0.5, 1.0], seconds) for method, seconds in (("fmd", 10.0), ("flux", 4.0)))
    small = run("flux", 0, [0.0, 0.5, 0.9], 2.0).assign(variant="int8")
    others = pd.concat([run(method, 1, [0.0, 0.1, 0.2], 1.0) for method in ("fmd", "flux")])
    every = pd.concat([fmd, flux, small, others])
    table = figures.option_table(every, ["int8"]).set_index("method")
    assert table["seeds"].tolist() == [1, 1, 1] and table["missed"].to_dict() == {"fmd": 0, "flux": 0, "flux, int8": 1}
    assert table["final"].to_dict() == {"fmd": 1.0, "flux": 1.0, "flux, int8": 0.9}
    assert table.loc["flux", "device_s"] == pytest.approx(7.6) and table.loc["fmd", "device_s"] == pytest.approx(19.0)
    assert figures.option_table(every, ["4bit"]).empty


def test_the_words_say_who_was_sooner_and_who_missed(rounds):
    said = figures.describe_times(figures.times_to_target(rounds, 0.5))
    assert "FLUX is 3.25x as fast to the target (min to max: 1.88 to 5.62)" in said
    assert "on the device clock (llama-moe-3.5b over 1gbps)" in said and "2 seeds" in said
    slow = rounds.assign(metric=rounds["metric"].where(rounds["method"] == "fmd", 0.1))
    said = figures.describe_times(figures.times_to_target(slow, 0.5))
    assert "FLUX did not reach the target in 2 of 2 runs; it ends at 11 %" in said


def test_intervals_over_seeds_say_what_they_are():
    assert interval([1.0]) == (1.0, 1.0, 1.0)
    assert interval([1.0, 3.0]) == (2.0, 1.0, 3.0)
    mean, low, high = interval([1.0, 2.0, 3.0])
    # t quantile 4.3027 with two degrees of freedom, standard error 1 / sqrt(3).
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - 2.4841, 2.0 + 2.4841), abs=1e-3)
    assert interval_name(1) == "1 seed: no band"
    assert interval_name(2) == "2 seeds: mean and min to max"
    assert "95 % t interval" in interval_name(3)


def test_methods_are_told_apart_without_colour():
    looks = list(style.METHODS.values())
    for attribute in ("color", "marker", "hatch"):
        assert len({getattr(look, attribute) for look in looks}) == len(looks)
    # A method that goes beyond the paper has the line of the plain one.
    assert {look.line for name, look in style.METHODS.items() if "+" not in name} == {"-", "--", "-.", ":"}
    assert style.method("mine") == style.method("mine")
    assert style.method("mine").title == "mine"
    assert style.order(["mine", "fmd", "flux", "fmd"]) == ["flux", "fmd", "mine"]


def test_phases_are_told_apart_without_colour():
    assert list(style.PHASE_COLORS) == list(style.PHASE_HATCHES) == list(records.PHASES)
    by_hatch: dict[str, list[float]] = {}
    for phase in records.PHASES:
        red, green, blue = to_rgb(style.PHASE_COLORS[phase])
        by_hatch.setdefault(style.PHASE_HATCHES[phase], []).append(0.3 * red + 0.59 * green + 0.11 * blue)
    for shades in by_hatch.values():
        assert all(abs(a - b) > 0.2 for a, b in itertools.combinations(shades, 2))


def test_convergence_has_a_panel_per_task_and_clock_and_says_what_it_shows(rounds):
    other = run("flux", 0, [0.0, 0.5], 1.0, task="mini-mmlu")
    figure = figures.convergence(pd.concat([rounds, other]))
    assert len(figure.axes) == 4
    assert {line.get_label() for line in figure.axes[0].lines} == {"FLUX", "FMD"}
    small_print = figure.get_supxlabel()
    assert (
        "llama-moe-3.5b" in small_print and "1gbps" in small_print and "1 to 2 seeds: one, no band; two" in small_print
    )
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [0.0, 3.0, 6.0])
    with pytest.raises(ValueError, match="allowed are device_s, wall_s, round"):
        figures.convergence(rounds, clocks=("hours",))


def test_a_clock_of_the_model_itself_is_named_after_it(rounds):
    own = rounds.assign(clock_model="self", model="some/mini-llama-moe")
    assert "shapes of mini-llama-moe over 1gbps" in figures.convergence(own).get_supxlabel()


def test_a_missed_target_is_written_not_drawn(rounds):
    rounds["metric"] = rounds["metric"].where(rounds["method"] == "fmd", 0.1)
    figure = figures.time_to_accuracy(figures.times_to_target(rounds, 0.5))
    assert any("FLUX: not reached (2/2)" in text.get_text() for text in figure.axes[0].texts)


def test_saving_twice_gives_the_same_bytes_and_the_numbers_beside_them(rounds, tmp_path):
    first = figures.save(figures.convergence(rounds), "convergence-a", tmp_path / "1", rounds)
    time.sleep(1.1)
    second = figures.save(figures.convergence(rounds), "convergence-a", tmp_path / "2", rounds)
    assert set(first) == {"pdf", "png", "csv"}
    for kind, path in first.items():
        assert path.read_bytes() == second[kind].read_bytes(), kind
    assert b"CreationDate" not in first["pdf"].read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(first["csv"]).fillna({"variant": ""}), rounds, check_dtype=False)
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == [
        f"convergence-a.{k}" for k in ("csv", "pdf", "png")
    ]
    with pytest.raises(ValueError, match="slug is '../a'"):
        figures.save(figures.convergence(rounds), "../a", tmp_path, rounds)


def test_drawing_changes_no_global_setting(rounds):
    before = dict(mpl.rcParams)
    picture = figures.convergence(rounds)
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before


def test_portraits_of_a_model_a_partition_and_a_run():
    frequency = torch.full((3, 4), 0.25)
    assert "0.250" in figures.activation(frequency).get_supxlabel()
    bars = figures.activation_by_label({"a": frequency, "b": frequency}, layer=1)
    assert len(bars.axes[0].patches) == 8
    stacks = figures.partition([{"a": 2, "b": 1}, {"b": 3}])
    assert [patch.get_height() for patch in stacks.axes[0].patches] == [2, 0, 1, 3]


def test_the_phases_of_a_round_are_those_of_its_slowest_participant():
    rows = pd.DataFrame({c.name: [DEFAULTS[c.dtype]] * 3 for c in records.PARTICIPANTS})
    rows = rows.assign(
        round=1, participant=[0, 1, 2], rejected=["", "", "late"], train_device_s=[1.0, 2.0, 9.0], upload_device_s=0.5
    )
    figure = figures.phases(rows)
    assert [patch.get_height() for patch in figure.axes[0].patches] == [2.0, 0.5]
