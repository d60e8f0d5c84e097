"""Speed-ups at other places, from times made by hand: who missed the target decides what a factor is worth."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from fluxlib.figures import overhead


def run(method: str, last: float, round_s: float, seed: int = 0, task: str = "t", **more: float) -> pd.DataFrame:
    """Two rounds up to the score ``last`` at one place, the paper's fleet over 1 Gb/s; its mean score is half of it."""
    fixed = {"run_id": f"{method}{seed}", "model": "m", "task": task, "method": method, "seed": seed}
    fixed |= {"clock_model": "m", "link": "1gbps", "fleet": "paper", "memory_share": 0.5, "metric_name": "accuracy"}
    scores = [0.0, last / 2, last]
    times = [
        {"round": n, "metric": score, "device_s": n * round_s, "wall_s": n, "round_device_s": round_s}
        for n, score in enumerate(scores)
    ]
    return pd.DataFrame([fixed | more | row for row in times])


def speedups(*runs: pd.DataFrame, fraction: float = 1.0) -> pd.DataFrame:
    return overhead.elsewhere(overhead.times_elsewhere(pd.concat(runs, ignore_index=True), fraction))


def test_a_factor_is_the_baselines_time_over_this_ones_with_the_same_seed():
    found = speedups(
        run("fmd", 1.0, 8.0), run("fmd", 1.0, 9.0, seed=1), run("flux", 1.0, 1.0), run("flux", 1.0, 4.5, 1),
        run("flux", 1.0, 1.0, seed=2),
    )  # fmt: skip
    assert found.set_index("seed")["speedup"].to_dict() == {0: 8.0, 1: 2.0}
    assert (found["bound"] == "").all() and found["fits"].all() and found["fits_of_baseline"].all()
    (cell,) = overhead.over_seeds(found).to_dict("records")
    assert cell["speedup"] == pytest.approx(4.0) and cell["num_seeds"] == 2


@pytest.mark.parametrize(
    ("flux", "other", "bound", "speedup"),
    [(1.0, 0.2, "at least", 12.0), (0.2, 1.0, "at most", 1.5), (0.2, 0.2, "neither", math.nan)],
)
def test_who_missed_the_target_decides_the_bound(flux, other, bound, speedup):
    # Target 0.5: reached after one round of 2 s or of 6 s, or not within two.
    found = speedups(
        run("fmd", 1.0, 8.0), run("flux", flux, 1.0 if bound == "at least" else 2.0), run("fmq", other, 6.0)
    )
    (row,) = found[found["baseline"] == "fmq"].to_dict("records")
    assert row["bound"] == bound and row["speedup"] == pytest.approx(speedup, nan_ok=True)


def test_bounds_of_different_kinds_make_no_mean():
    found = speedups(run("fmd", 1.0, 8.0), run("flux", 1.0, 2.0), run("fmq", 0.1, 8.0))
    fmq = found[found["baseline"] == "fmq"]
    mixed = pd.concat([fmq, fmq.assign(seed=1, bound="at most")])
    cells = overhead.over_seeds(mixed)
    assert cells["bound"].tolist() == ["neither"] and cells["speedup"].isna().all()
    exact = overhead.over_seeds(pd.concat([fmq, fmq.assign(seed=1, bound="")]))
    assert exact["bound"].tolist() == ["at least"]


def test_a_task_without_both_methods_is_left_out_and_nothing_at_all_says_so():
    found = speedups(run("fmd", 1.0, 8.0), run("flux", 1.0, 2.0), run("flux", 1.0, 2.0, task="alone"))
    assert set(found["task"]) == {"t"}
    nothing = speedups(run("flux", 1.0, 2.0))
    assert nothing.empty and "older ones kept no works" in overhead.sensitivity(nothing).texts[0].get_text()


def test_the_picture_writes_bounds_and_brackets():
    runs = [run("fmd", 1.0, 8.0), run("flux", 1.0, 16.0, memory_share=1.2), run("fmq", 0.1, 80.0)]
    picture = overhead.sensitivity(speedups(*runs))
    texts = [text.get_text() for ax in picture.axes[:2] for text in ax.texts]
    assert texts == ["(0.50)", "(\u226510)"]
