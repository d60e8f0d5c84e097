"""Participants, heterogeneity and budgets, from curves made by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from fluxlib.figures import scale

QUESTIONS = {"participants": ["", "many"], "alpha": [""], "tune_fraction": ["", "big"]}


def run(method: str, variant: str, scores: list[float], round_s: float, **settings: float) -> pd.DataFrame:
    """A run with one score per round from round 0, every round ``round_s`` long, 3 MB sent in each."""
    fixed = {
        "participants": 10,
        "participants_per_round": 10,
        "alpha": 0.5,
        "tune_fraction": 0.25,
        "merge_fraction": 0.25,
    } | settings
    fixed |= {
        "run_id": f"{method}-{variant}",
        "model": "m",
        "task": "t",
        "seed": 0,
        "clock_model": "m",
        "link": "1gbps",
    }
    fixed |= {"method": method, "variant": variant, "metric_name": "accuracy"}
    rows = [
        {"round": n, "metric": score, "device_s": n * round_s, "wall_s": n, "round_device_s": round_s,
         "uplink_bytes": (n > 0) * 10**6,
         "downlink_bytes": (n > 0) * 2 * 10**6}
        for n, score in enumerate(scores)
    ]  # fmt: skip
    return pd.DataFrame([fixed | row for row in rows])


ROUNDS = pd.concat(
    [
        run("flux", "", [0.0, 0.4, 0.8], 2.0),
        run("fmd", "", [0.0, 0.5, 0.8], 10.0),
        run("flux", "big", [0.0, 0.8, 0.9], 3.0, tune_fraction=0.5),
        run("flux", "many", [0.0, 0.1, 0.2], 1.0, participants=60, participants_per_round=20),
    ],
    ignore_index=True,
)


def test_each_setting_has_the_target_of_its_own_federation():
    found = scale.outcomes(ROUNDS, QUESTIONS, 12 / 13).set_index(["question", "run_id"])
    assert found.loc[("tune_fraction", "flux-big"), "target"] == pytest.approx(0.4)  # FMD's, which has no budget
    assert found.loc[("tune_fraction", "flux-big"), "device_s_to_target"] == pytest.approx(1.5)
    assert found.loc[("alpha", "flux-"), "device_s_to_target"] == pytest.approx(2.0)
    assert found.loc[("alpha", "fmd-"), "device_s_to_target"] == pytest.approx(8.0)
    many = found.loc[("participants", "flux-many")]
    assert (
        math.isnan(many["target"])
        and math.isnan(many["device_s_at_least"])
        and many["final_metric"] == pytest.approx(0.1)
    )
    assert (found["round_mb"] == 3.0).all() and len(found) == 3 + 2 + 3


def test_a_target_that_was_missed_took_at_least_the_whole_run():
    worse = pd.concat([ROUNDS[ROUNDS["method"] == "fmd"], run("flux", "", [0.0, 0.1, 0.2], 2.0)])
    found = scale.outcomes(worse, {"alpha": [""]}).set_index("method").loc["flux"]
    assert math.isnan(found["device_s_to_target"]) and found["device_s_at_least"] == found["end_s"] == 4.0


def test_pictures_have_a_row_per_question_and_say_when_there_is_nothing():
    table = scale.outcomes(ROUNDS, QUESTIONS)
    assert len(scale.scale_settings(table).axes) == 3 * len(scale.MEASURES)
    assert [t.get_text() for t in scale.scale_settings(table).axes[0].get_xticklabels()] == ["10", "20 of 60"]
    assert len(scale.scale_participants(ROUNDS[ROUNDS["variant"] != "big"]).axes) == 4
    nothing = scale.outcomes(ROUNDS[:0], QUESTIONS)
    assert nothing.empty and "question" in nothing
    for picture in (scale.scale_settings(nothing), scale.scale_participants(ROUNDS[:0])):
        assert "No runs of this model" in picture.texts[0].get_text()
