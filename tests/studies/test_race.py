"""The measured race: what is calibrated on one run is predicted on another, by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import _race_clock as race_clock
import pandas as pd
import pytest

from fluxlib.analysis.studies import measurements
from fluxlib.analysis.studies.scale import race_summary
from fluxlib.devices import catalogue, clock
from fluxlib.devices.shapes import shapes

SHAPES = shapes("mini-llama-moe")
WORK = {
    "num_experts": 96, "num_tuned": 96, "num_updated": 96, "train_steps": 2, "train_samples": 32, "train_tokens": 600,
    "routed_tokens": 14400, "slot_tokens": 14400, "tuned_tokens": 14400, "download_bits": 4.25, "upload_bits": 4.25,
    "num_uploaded": 96, "num_downloaded": 96, "offloaded": True,
}  # fmt: skip


def place(link: str) -> race_clock.Place:
    return race_clock.Place(SHAPES, catalogue.DEVICES["cpu-laptop"], catalogue.link(link), "bfloat16")


def replies(train_s: float, rounds: int = 2) -> pd.DataFrame:
    sent = 96 * SHAPES.expert_parameters * 2
    return pd.DataFrame([
        {"round": number, "participant": 0, "rejected": "", "work": json.dumps([WORK]), "train_wall_s": train_s,
         "uplink_bytes": sent, "downlink_bytes": sent,
         **{f"{phase}_wall_s": math.nan for phase in ("merge", "quantize", "profile", "probe")}}
        for number in range(1, rounds + 1)
    ])  # fmt: skip


def rounds(seconds: float) -> pd.DataFrame:
    about: dict[str, Any] = {"model": "m", "task": "t", "seed": 0}
    rows = [{"round": n, "metric": 0.2 * n, "wall_s": n * seconds, "round_wall_s": n and seconds} for n in range(3)]
    return pd.DataFrame([about | one for one in rows])


def test_a_slower_link_adds_what_its_bytes_take() -> None:
    speed = race_clock.calibrated(rounds(5.0), replies(2.0), place("none"))
    assert speed.besides_s == pytest.approx(3.0) and set(speed.factors) == {"train"}
    assert race_clock.predicted(replies(2.0), place("none"), speed) == pytest.approx({1: 5.0, 2: 5.0})
    per_s = catalogue.link("10mbps").up_bytes_per_s  # codes are not charged: what travelled is
    took = 2 * 96 * SHAPES.expert_parameters * 2 / per_s
    assert race_clock.predicted(replies(2.0), place("10mbps"), speed) == pytest.approx({1: 5 + took, 2: 5 + took})


def test_the_rate_makes_sending_as_long_against_training_as_on_the_real_device() -> None:
    real = race_clock.Place(shapes("mini-deepseek-moe"), catalogue.DEVICES["l20"], catalogue.link("1gbps"), "bfloat16")
    per_s = race_clock.rate(replies(2.0), real, 128)
    (_, work, _) = race_clock.replies(replies(2.0))[1][0]
    there = clock.phase_seconds(work, real.shapes, real.device, real.link, 128)
    ratio = (there["download"] + there["upload"]) / (there["train"] + there["pcie"])
    assert replies(2.0)[["uplink_bytes", "downlink_bytes"]].iloc[0].sum() / per_s / 2.0 == pytest.approx(ratio)


def test_the_summary_reads_time_to_fmds_score_and_how_far_the_clock_was_off() -> None:
    rows = [
        *race_clock.rows(rounds(10.0), {1: 9.0, 2: 12.0}, "fmd, slow"),
        *race_clock.rows(rounds(4.0), {1: 4.0, 2: 4.0}, "flux, slow"),
    ]
    found = race_summary(measurements(rows, "race"), fraction=0.5).set_index("method")
    assert found["rounds"].tolist() == [2, 2] and found["final"].tolist() == pytest.approx([0.3, 0.3])
    assert found["to_target_s"].tolist() == pytest.approx([7.5, 3.0])  # half of 0.3, between 0 and 0.2
    assert found["clock_error"].tolist() == pytest.approx([0.15, 0.0])
