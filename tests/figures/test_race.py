from __future__ import annotations

import time

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from _race_clock import rows as rows_of

from fluxlib import figures, records
from fluxlib.analysis.studies import measurements
from fluxlib.analysis.time_to_target import times_to_target
from fluxlib.figures import race, style

DEFAULTS = {"string": "x", "int64": 0, "float64": 0.0}


def run(method: str, seed: int, metrics: list[float], round_s: float, task: str = "mini-gsm8k") -> pd.DataFrame:
    """One run of the ``rounds`` table, round 0 included, every round taking ``round_s`` on the device clock."""
    rows = pd.DataFrame({c.name: [DEFAULTS[c.dtype]] * len(metrics) for c in records.TABLES["rounds"]})
    index = np.arange(len(metrics))
    return rows.assign(
        run_id=f"{method}-{task}-{seed}",
        method=method,
        model="mini-llama-moe",
        task=task,
        seed=seed,
        round=index,
        round_device_s=round_s,
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


def test_convergence_has_a_panel_per_task_and_clock_and_says_what_it_shows(rounds):
    other = run("flux", 0, [0.0, 0.5], 1.0, task="mini-mmlu")
    figure = race.convergence(pd.concat([rounds, other]))
    assert len(figure.axes) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FLUX", "FMD"]
    assert [line.get_color() for line in figure.axes[0].lines] == [style.METHODS[m].color for m in ("flux", "fmd")]
    small_print = " ".join(figure.get_supxlabel().split())
    assert "llama-moe-3.5b over 1gbps" in small_print and "1 to 2 seeds: one, no band; two" in small_print
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [0.0, 3.0, 6.0])
    with pytest.raises(ValueError, match="allowed are device_s, wall_s, round"):
        race.convergence(rounds, clocks=("hours",))


def test_a_clock_of_the_model_itself_is_named_after_it(rounds):
    own = rounds.assign(clock_model="self", model="some/mini-llama-moe")
    assert "shapes of mini-llama-moe over 1gbps" in " ".join(race.convergence(own).get_supxlabel().split())


def test_a_missed_target_is_written_not_drawn(rounds):
    rounds["metric"] = rounds["metric"].where(rounds["method"] == "fmd", 0.1)
    figure = race.time_to_accuracy(times_to_target(rounds, 0.5))
    assert any("FLUX: not reached (2/2)" in text.get_text() for text in figure.axes[0].texts)


def test_saving_twice_gives_the_same_bytes_and_the_numbers_beside_them(rounds, tmp_path):
    first = figures.save(race.convergence(rounds), "convergence-a", tmp_path / "1")
    time.sleep(1.1)
    second = figures.save(race.convergence(rounds), "convergence-a", tmp_path / "2")
    assert set(first) == {"pdf", "png", "csv"}
    for kind, path in first.items():
        assert path.read_bytes() == second[kind].read_bytes(), kind
    assert b"CreationDate" not in first["pdf"].read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(first["csv"]).fillna({"variant": ""}), rounds, check_dtype=False)
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == [
        f"convergence-a.{k}" for k in ("csv", "pdf", "png")
    ]
    with pytest.raises(ValueError, match="slug is '../a'"):
        figures.save(race.convergence(rounds), "../a", tmp_path)


def test_drawing_changes_no_global_setting(rounds):
    before = dict(mpl.rcParams)
    picture = race.convergence(rounds)
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before


def test_a_measured_race_has_a_panel_per_link_and_one_for_the_clock() -> None:
    rows = []
    for link in ("fast", "slow"):
        for method, seconds in (("fmd", 10.0), ("flux", 4.0)):
            runs = run(method, 0, [0.1, 0.3, 0.4], 1.0).assign(round_wall_s=seconds, wall_s=seconds * np.arange(3))
            rows += rows_of(runs, {1: seconds, 2: 1.2 * seconds}, f"{method}, {link}")
    picture = race.measured(measurements(rows, "race"))
    assert [ax.get_title() for ax in picture.axes] == ["fast", "slow", "every round"]
    assert "clock off by 10 % (median)" in picture.get_supxlabel()
