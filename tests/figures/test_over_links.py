"""Times to target over other links, from runs made by hand."""

from __future__ import annotations

import pandas as pd

from fluxlib.analysis.speedups import against_all
from fluxlib.figures import overhead


def run(method: str, round_s: float, link: str, task: str = "t") -> pd.DataFrame:
    """Three rounds, the last with the score 1."""
    fixed = {"run_id": method + task, "model": "m", "task": task, "method": method, "seed": 0, "clock_model": "m"}
    fixed |= {"link": link, "metric_name": "accuracy", "variant": ""}
    return pd.DataFrame([
        fixed | {"round": n, "metric": n / 2, "device_s": n * round_s, "wall_s": n, "round_device_s": round_s}
        for n in range(3)
    ])  # fmt: skip


def test_each_link_has_its_own_speed_up_and_a_task_without_fmd_is_left_out() -> None:
    runs = [run("fmd", 8.0, "1gbps"), run("flux", 2.0, "1gbps"), run("fmd", 80.0, "lte"), run("flux", 8.0, "lte")]
    table = against_all(
        pd.concat([*runs, run("flux", 1.0, "lte", "alone")]), 1.0, pairs=("link", "model", "task", "seed")
    )
    flux = table[table["method"] == "flux"]
    assert flux[["task", "link", "speedup_device_s"]].values.tolist() == [["t", "1gbps", 4.0], ["t", "lte", 10.0]]
    assert against_all(runs[1]).empty


def test_a_map_of_no_runs_says_so() -> None:
    assert overhead.pays(pd.DataFrame()).numbers["notice"].tolist() == ["No runs of this model to make this map of."]
