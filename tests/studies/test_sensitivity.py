"""Stored runs counted anew: exactly what was stored where nothing changes, and what is known where something does."""

from __future__ import annotations

import pandas as pd
import pytest

from fluxlib import federation, records
from fluxlib.analysis.studies import sensitivity
from fluxlib.analysis.studies.sensitivity import Place
from fluxlib.config import make_config
from fluxlib.devices import catalogue, clock
from fluxlib.federation.store.tables import read_work

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
    folder, rounds, participants = stored
    rows = rounds[rounds["method"] == method]
    run_id = rows["run_id"].iloc[0]
    return participants[participants["run_id"] == run_id], rows, sensitivity.read_abouts(folder, [run_id])[run_id]


@pytest.mark.parametrize("method", ["flux", "fmd"])
def test_with_nothing_changed_every_digit_is_the_stored_one(stored, method):
    participants, rounds, about = one(stored, method)
    found = sensitivity.recount(participants, rounds, about, Place())
    for column in ("round_device_s", "server_device_s", "device_s", "link", "clock_model"):
        assert found[column].tolist() == rounds[column].tolist()
    named = about["parameters"]
    again = sensitivity.recount(participants, rounds, about, Place(named["fleet"], named["link"], named["clock_model"]))
    assert again["device_s"].tolist() == rounds["device_s"].tolist()


def test_what_was_named_is_what_a_run_there_would_have_said(stored, tmp_path):
    federation.run(
        make_config(
            TINY | {"method": "flux", "clock.fleet": "weak", "clock.link": "lte", "clock.model": "deepseek-moe-16b"}
        ),
        out=tmp_path,
    )
    there = records.read_all("rounds", tmp_path)
    found = sensitivity.recount(*one(stored, "flux"), Place("weak", "lte", "deepseek-moe-16b", tokens_per_sample=0))
    assert found["device_s"].tolist() == there["device_s"].tolist()
    assert found["metric"].tolist() == there["metric"].tolist()
    assert found["fleet"].unique().tolist() == ["weak"]


def test_a_reply_that_was_refused_does_not_count(stored):
    participants, rounds, about = one(stored, "fmd")
    kept = participants["participant"] != 2
    refused = participants.assign(rejected=participants["rejected"].where(kept, "late"))
    without = participants[kept]
    assert (
        sensitivity.recount(refused, rounds, about, Place())["device_s"].tolist()
        == sensitivity.recount(without, rounds, about, Place())["device_s"].tolist()
    )


def test_memory_is_the_most_loaded_participants_share(stored):
    participants, rounds, about = one(stored, "flux")
    found = sensitivity.recount(participants, rounds, about, Place("rtx-3060")).set_index("round")["memory_share"]
    device, shapes = catalogue.DEVICES["rtx-3060"], clock.shapes("llama-moe-3.5b")
    works = [read_work(text)[0] for text in participants.loc[participants["round"] == 2, "work"]]
    needed = max(clock.device_bytes(work, shapes, device, 256) for work in works)
    assert found[2] == needed / (0.9 * device.memory_bytes) > 1  # a quarter tuned needs more than 12 GB
    assert found[0] == 0.0


def test_runs_without_works_are_left_out_and_named(stored):
    folder, rounds, participants = stored
    abouts = sensitivity.read_abouts(folder, rounds["run_id"].unique())
    old = participants.assign(work=participants["work"].where(participants["run_id"].str.startswith("flux")))
    assert sensitivity.with_works(old) == {"flux-mini-llama-moe-mini-gsm8k-seed0"}
    found = sensitivity.recounts(old, rounds, abouts, fleets=["paper", "weak"], links=["lte"])
    assert set(found["method"]) == {"flux"} and len(found) == 2 * 4
    fmd = one(stored, "fmd")
    with pytest.raises(ValueError, match="fmd-mini-llama-moe-mini-gsm8k-seed0 has no works"):
        sensitivity.recount(fmd[0].assign(work=None), fmd[1], fmd[2], Place())
    with pytest.raises(ValueError, match="no run has works"):
        sensitivity.recounts(participants.assign(work=None), rounds, abouts)


def test_an_unknown_place_is_refused_by_name(stored):
    for changes, message in (({"fleet": "moon"}, "unknown fleet 'moon'"), ({"link": "string"}, "unknown link")):
        with pytest.raises(ValueError, match=message):
            sensitivity.recount(*one(stored, "fmd"), Place(**changes))


def test_every_device_of_the_catalogue_is_looked_at():
    assert {device.name for name in sensitivity.FLEETS for device in catalogue.fleet(name, 9)} == set(catalogue.DEVICES)


def test_pandas_tables_stay_as_they_were(stored):
    participants, rounds, about = one(stored, "flux")
    before = rounds.copy()
    sensitivity.recount(participants, rounds, about, Place("weak", "lte"))
    pd.testing.assert_frame_equal(rounds, before)
