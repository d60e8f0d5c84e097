"""Stored runs counted anew: exactly what was stored where nothing changes, and what is known where something does."""

from __future__ import annotations

import pandas as pd
import pytest

from fluxlib import federation, records
from fluxlib.analysis import store
from fluxlib.analysis.studies import scale
from fluxlib.config import make_config

TINY = {
    "federation.rounds": 3,
    "federation.participants": 3,
    "data.task_size": 200,
    "training.local_steps": 1,
    "training.batch_size": 4,
    "evaluation.samples": 4,
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two tiny runs: FLUX on a mixed fleet at real shapes, FMD with its own shapes and counted tokens."""
    folder = tmp_path_factory.mktemp("runs")
    flux = {"method": "flux", "clock.fleet": "mixed", "clock.model": "llama-moe-3.5b", "clock.tokens_per_sample": 256}
    for more in (flux, {"method": "fmd", "clock.model": "self", "clock.link": "lte"}):
        federation.run(make_config(TINY | more), out=folder)
    return folder, records.read_all("rounds", folder), records.read_all("participants", folder)


def one(stored, method):
    """Participants, rounds and configuration of the run of one method."""
    folder, rounds, participants = stored
    rows = rounds[rounds["method"] == method]
    run_id = rows["run_id"].iloc[0]
    return participants[participants["run_id"] == run_id], rows, store.configs(folder, [run_id])


@pytest.mark.parametrize("method", ["flux", "fmd"])
def test_with_nothing_changed_every_digit_is_the_stored_one(stored, method):
    participants, rounds, runs = one(stored, method)
    named = next(iter(runs.values())).clock
    for fleet, link in ((None, None), (named.fleet, named.link)):
        found = scale.recounts(participants, rounds, runs, [fleet], [link])
        for column in ("round_device_s", "server_device_s", "device_s", "link", "clock_model"):
            assert found[column].tolist() == rounds[column].tolist()


def test_what_was_named_is_what_a_run_there_would_have_said(stored, tmp_path):
    changes = {"method": "flux", "clock.fleet": "edge", "clock.link": "lte", "clock.model": "llama-moe-3.5b"}
    federation.run(make_config(TINY | changes | {"clock.tokens_per_sample": 256}), out=tmp_path)
    there = records.read_all("rounds", tmp_path)
    found = scale.recounts(*one(stored, "flux"), ["edge"], ["lte"])
    assert found["device_s"].tolist() == there["device_s"].tolist()
    assert found["metric"].tolist() == there["metric"].tolist()
    assert found["fleet"].unique().tolist() == ["edge"]


def test_a_reply_that_was_refused_does_not_count(stored):
    participants, rounds, runs = one(stored, "fmd")
    kept = participants["participant"] != 2
    refused = participants.assign(rejected=participants["rejected"].where(kept, "late"))
    both = [scale.recounts(rows, rounds, runs, [None], [None]) for rows in (refused, participants[kept])]
    assert both[0]["device_s"].tolist() == both[1]["device_s"].tolist()


def test_runs_without_works_are_named_and_every_place_is_counted(stored):
    folder, rounds, participants = stored
    old = participants.assign(work=participants["work"].where(participants["run_id"].str.startswith("flux")))
    (kept,) = scale.with_works(old)
    assert kept == "flux-mini-llama-moe-mini-gsm8k-seed0"
    runs, before = store.configs(folder, [kept]), rounds.copy()
    found = scale.recounts(old, rounds[rounds["run_id"] == kept], runs, ["paper", "edge"], ["lte"])
    assert set(found["method"]) == {"flux"} and len(found) == 2 * 4
    pd.testing.assert_frame_equal(rounds, before)
    assert scale.recounts(old, rounds[:0], {}, ["paper"]).empty


def test_an_unknown_place_is_refused_by_name(stored):
    for place, message in ((["moon", None], "clock.fleet is 'moon'"), ([None, "string"], "clock.link is")):
        with pytest.raises(ValueError, match=message):
            scale.recounts(*one(stored, "fmd"), *([name] for name in place))


def test_participants_of_a_round_are_all_where_no_number_was_set(stored, tmp_path):
    sampled = TINY | {"method": "fmd", "federation.participants_per_round": 2, "federation.rounds": 1}
    federation.run(make_config(sampled), out=tmp_path)
    for folder, asked in ((stored[0], 3), (tmp_path, 2)):
        found = scale.with_crowds(records.read_all("rounds", folder), folder)
        assert set(found["participants"]) == {3} and set(found["participants_per_round"]) == {asked}
