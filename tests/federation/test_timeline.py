"""When phases began and ended: by hand on the device clock, and of whole runs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fluxlib import federation
from fluxlib.config import RunConfig
from fluxlib.federation.store.timeline import SERVER, aligned, device_spans
from fluxlib.records import PHASES

MAIN = dict(zip(PHASES, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 8.0), strict=True))


def test_a_stale_profile_lies_beside_the_upload() -> None:
    spans = {name: (start, end) for name, start, end in device_spans(MAIN, None, first=False, start_s=10.0)}
    assert spans == {
        "download": (10, 11), "merge": (11, 13), "probe": (13, 19), "train": (19, 24), "upload": (24, 32),
        "quantize": (24, 27), "profile": (27, 31),
    }  # fmt: skip


def test_a_first_profile_stands_before_merging() -> None:
    spans = {name: (start, end) for name, start, end in device_spans(MAIN, None, first=True, start_s=0.0)}
    assert (spans["quantize"], spans["profile"], spans["merge"]) == ((1, 4), (4, 8), (8, 10))
    before = device_spans(MAIN, {"quantize": 0.5, "profile": 1.5}, first=False, start_s=0.0)
    assert before[:3] == [("quantize", 0.0, 0.5), ("profile", 0.5, 2.0), ("download", 2.0, 3.0)]


@pytest.mark.parametrize(("offset", "shift"), [(0.0, 0.0), (5.0, -5.0), (-3600.0, 3600.0)])
def test_a_wrong_clock_is_moved_between_request_and_reply(offset: float, shift: float) -> None:
    spans = (("profile", 1.0 + offset, 2.0 + offset, 1), ("train", 6.0 + offset, 9.0 + offset, 2))
    outcome: Any = SimpleNamespace(spans=spans, sent_s=5.0, received_s=10.0)
    found = aligned(outcome)
    assert [(name, number) for name, _, _, number in found] == [("profile", 1), ("train", 2)]
    assert found[1][1:3] == (6.0 + offset + shift, 9.0 + offset + shift)
    assert aligned(SimpleNamespace(spans=(), sent_s=0.0, received_s=0.0)) == []  # type: ignore[arg-type]


def test_a_runs_timeline_agrees_with_its_other_tables(make_config: Callable[..., RunConfig]) -> None:
    result = federation.run(make_config({"method": "flux", "federation.rounds": 2}))
    found, rounds = result.timeline, result.rounds
    device = found.query("clock == 'device'")
    ends = device.groupby("round")["end_s"].max()
    assert ends.tolist() == pytest.approx(rounds["device_s"].tolist()[1:])
    table = result.participants.set_index(["round", "participant"])
    spent = (device.end_s - device.start_s).groupby([device["round"], device.participant, device.phase]).sum()
    for (number, participant, phase), seconds in spent.items():
        if participant != SERVER:
            assert seconds == pytest.approx(table.loc[(number, participant), f"{phase}_device_s"])
    wall = found.query("clock == 'wall'")
    assert (wall.end_s >= wall.start_s).all() and (wall.start_s >= 0).all()
    assert set(wall.query("participant == -1").phase) == {"aggregate", "evaluate"}
    people = wall.query("participant >= 0 and round == 1").groupby("participant")
    begins, finishes = people.start_s.min(), people.end_s.max()
    assert all(finishes[i] <= begins[i + 1] + 0.01 for i in (0, 1)), "one after another in process"
