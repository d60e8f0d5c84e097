"""Final quality beside FMD's after equal rounds and after equal device seconds, on curves made by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from fluxlib.analysis import runs


def run(method: str, scores: list[float], round_s: float, seed: int = 0, task: str = "t") -> pd.DataFrame:
    """One score per round from round 0, every round ``round_s`` long."""
    fixed = {"run_id": f"{method}{seed}", "model": "m", "task": task, "method": method, "seed": seed}
    fixed |= {"clock_model": "m", "link": "1gbps"}
    rows = [{"round": n, "metric": score, "device_s": n * round_s} for n, score in enumerate(scores)]
    return pd.DataFrame([fixed | row for row in rows])


FMD = run("fmd", [0.0, 0.6, 0.8, 0.8, 0.8], 10.0)
FLUX = run("flux", [0.0, 0.4, 0.6, 0.6, 0.6], 2.0)
LONG = run("flux", [0.0, 0.4, 0.6, 0.6, 0.6, *[0.8] * 20], 2.0)


def test_equal_rounds_compare_final_scores_and_equal_seconds_the_end_of_the_shorter_run():
    table = runs.final_quality(pd.concat([FMD, FLUX])).set_index("compared")
    assert table.loc["equal rounds", "ratio"] == pytest.approx(0.6 / 0.8)
    # FLUX is over after 8 s, when FMD is at 0.48 in the middle of its first round: a fifth of its run.
    early = table.loc["equal seconds"]
    assert (early["at_s"], early["score"], early["reference_score"]) == pytest.approx((8.0, 0.6, 0.48))
    assert early["of_reference"] == pytest.approx(0.2)


def test_a_run_that_went_on_is_read_where_the_references_ends():
    table = runs.final_quality(pd.concat([FMD, LONG])).set_index("compared")
    late = table.loc["equal seconds"]
    assert (late["at_s"], late["of_reference"], late["ratio"]) == pytest.approx((40.0, 1.0, 1.0))
    assert table.loc["equal rounds", "ratio"] == pytest.approx(0.6 / 0.8)  # after the four rounds that both have


def test_seeds_are_pairs_and_those_without_a_partner_are_left_out():
    better = run("fmd", [0.0, 1.0, 1.0, 1.0, 1.0], 10.0, seed=1)
    plain = pd.concat([FMD, FLUX, better, FLUX.assign(seed=1), FLUX.assign(seed=2)])
    table = runs.final_quality(plain)
    table = table[table["compared"] == "equal rounds"]
    assert table.set_index("seed")["ratio"].to_dict() == pytest.approx({0: 0.75, 1: 0.6})
    (row,) = runs.quality_over_seeds(table).to_dict("records")
    assert (row["seeds"], row["ratio"], row["low"], row["high"]) == pytest.approx((2, 0.675, 0.6, 0.75))
