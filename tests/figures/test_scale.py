"""Participants, from curves made by hand."""

from __future__ import annotations

import pandas as pd

from fluxlib.figures import overhead


def run(method: str, variant: str, scores: list[float], round_s: float, **settings: float) -> pd.DataFrame:
    """A run with one score per round from round 0, every round ``round_s`` long."""
    fixed = {"participants": 10, "participants_per_round": 10} | settings
    fixed |= {
        "run_id": f"{method}-{variant}",
        "model": "m",
        "task": "t",
        "seed": 0,
        "clock_model": "m",
        "link": "1gbps",
    }
    fixed |= {"method": method, "variant": variant, "metric_name": "accuracy"}
    rows = [{"round": n, "metric": score, "device_s": n * round_s} for n, score in enumerate(scores)]
    return pd.DataFrame([fixed | row for row in rows])


ROUNDS = pd.concat(
    [
        run("flux", "", [0.0, 0.4, 0.8], 2.0),
        run("fmd", "", [0.0, 0.5, 0.8], 10.0),
        run("flux", "many", [0.0, 0.1, 0.2], 1.0, participants=60, participants_per_round=20),
    ],
    ignore_index=True,
)


def test_the_picture_has_a_row_per_method_and_says_when_there_is_nothing():
    picture = overhead.scale_participants(ROUNDS)
    assert len(picture.axes) == 4
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["10", "20 of 60"]
    assert "No runs of this model" in overhead.scale_participants(ROUNDS[:0]).texts[0].get_text()
