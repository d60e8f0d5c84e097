"""Participants, heterogeneity and budgets, from curves made by hand."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from fluxlib.analysis.studies import scale as study
from fluxlib.figures import scale

QUESTIONS = {"participants": ["", "many"], "alpha": [""], "budget": ["", "big"]}


def run(method: str, variant: str, scores: list[float], round_s: float, **settings: float) -> pd.DataFrame:
    """A run with one score per round from round 0, every round ``round_s`` long, 3 MB sent in each."""
    fixed = {
        "federation.participants": 10,
        "federation.participants_per_round": 10,
        "data.alpha": 0.5,
        "budget.tune_frac": 0.25,
    } | settings
    fixed |= {
        "run_id": f"{method}-{variant}",
        "model": "m",
        "task": "t",
        "seed": 0,
        "clock_model": "m",
        "link": "1gbps",
    }
    fixed |= {"method": method, "variant": variant, "metric_name": "accuracy", "merge_fraction": 0.25}
    rows = [
        {"round": n, "metric": score, "device_s": n * round_s, "uplink_bytes": (n > 0) * 10**6,
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
    assert found.loc[("budget", "flux-big"), "target"] == pytest.approx(0.4)  # FMD's, which has no budget
    assert found.loc[("budget", "flux-big"), "device_s"] == pytest.approx(1.5)
    assert found.loc[("alpha", "flux-"), "device_s"] == pytest.approx(2.0)
    assert found.loc[("alpha", "fmd-"), "device_s"] == pytest.approx(8.0)
    many = found.loc[("participants", "flux-many")]
    assert math.isnan(many["target"]) and math.isnan(many["at_least_s"]) and many["final_metric"] == pytest.approx(0.1)
    assert (found["round_mb"] == 3.0).all() and len(found) == 3 + 2 + 3


def test_a_target_that_was_missed_took_at_least_the_whole_run():
    worse = pd.concat([ROUNDS[ROUNDS["method"] == "fmd"], run("flux", "", [0.0, 0.1, 0.2], 2.0)])
    found = scale.outcomes(worse, {"data.alpha": [""]}).set_index("method").loc["flux"]
    assert math.isnan(found["device_s"]) and found["at_least_s"] == found["end_s"] == 4.0


def test_pictures_have_a_row_per_question_and_say_when_there_is_nothing():
    table = scale.outcomes(ROUNDS, QUESTIONS)
    assert len(scale.draw_settings(table).axes) == 3 * len(scale.MEASURES)
    assert [t.get_text() for t in scale.draw_settings(table).axes[0].get_xticklabels()] == ["10", "20 of 60"]
    assert len(scale.draw_participants(ROUNDS[ROUNDS["variant"] != "big"]).axes) == 4
    nothing = scale.outcomes(ROUNDS[:0], QUESTIONS)
    assert nothing.empty and "question" in nothing
    for picture in (scale.draw_settings(nothing), scale.draw_participants(ROUNDS[:0])):
        assert "No runs of this model" in picture.texts[0].get_text()


def test_settings_come_from_what_is_stored_beside_the_run(tmp_path):
    (tmp_path / "rounds").mkdir()
    told = dict.fromkeys(study.SETTINGS, 0.5) | {
        "federation.participants": 7,
        "federation.participants_per_round": None,
    }
    (tmp_path / "rounds" / "a.json").write_text(json.dumps({"parameters": told}))
    found = study.with_settings(pd.DataFrame({"run_id": ["a", "a"], "round": [0, 1]}), tmp_path)
    assert found["participants_per_round"].tolist() == found["participants"].tolist() == [7, 7]
    assert found["alpha"].tolist() == [0.5, 0.5]
    assert study.with_settings(pd.DataFrame({"run_id": []}), tmp_path).empty


def test_the_runs_of_a_notebook_are_each_method_and_two_with_one_more():
    runs = study.small_runs({"federation.participants": 3, "federation.rounds": 1}, ["flux", "fmd", "fmes"])
    assert [(r.method, r.variant, r.participants) for r in runs] == [
        ("flux", "", 3), ("fmd", "", 3), ("fmes", "", 3), ("flux", "participants-4", 4), ("fmd", "participants-4", 4),
    ]  # fmt: skip
