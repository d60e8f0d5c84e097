from __future__ import annotations

import io
import logging

import progress
import pytest
from progress import Progress, Step

from fluxlib import records


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def steps(tmp_path) -> dict[int, Step]:
    log = tmp_path / "flux.log"
    log.write_text("loading\nflux-m-t-seed0  round   1  accuracy 0.2\nflux-m-t-seed0  round   2  accuracy 0.5\nbye\n")
    (tmp_path / "drift-m.png").write_text("")
    pictures = (tmp_path / "drift-m.png", tmp_path / "later-m.png")
    return {
        1: Step("01_profiling m", tmp_path / "none.log", pictures),
        2: Step("flux-m-t-seed0", log),
        3: Step("flux-m-t-seed1", tmp_path / "none.log"),
    }


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def tell(shown: Progress, event: str, number: int) -> None:
    name = "job_id" if event == "job_finished" else "jobid"
    shown.handle(logging.makeLogRecord({"event": event, name: number}))


def test_a_line_says_what_is_done_what_it_drew_and_what_is_left(steps):
    clock, stream = Clock(), io.StringIO()
    shown = Progress(steps, {}, 2, "Figures: here", stream, clock)
    tell(shown, "job_info", 1)
    tell(shown, "job_info", 2)
    assert shown.left() == "", "nothing has ended yet"
    clock.seconds = 40.0
    tell(shown, "job_finished", 2)
    clock.seconds = 100.0
    tell(shown, "job_finished", 1)
    tell(shown, "job_info", 3)
    tell(shown, "job_error", 3)
    tell(shown, "job_finished", 99)
    shown.close()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("1 of 3  flux-m-t-seed0  round   2  accuracy 0.5 in 40 s (about 40 s left, done at ")
    assert lines[1].startswith("2 of 3  01_profiling m in 1 min 40 s; drew drift-m (about 40 s left, done at ")
    assert lines[2] == f"3 of 3  FAILED after 0 s: flux-m-t-seed1, see {steps[3].log}"
    assert lines[3:] == ["3 of 3 steps in 1 min 40 s, 1 failed", "Figures: here"]


def test_on_a_terminal_the_last_line_says_what_runs_and_gives_way_to_warnings(steps, monkeypatch):
    monkeypatch.setattr(progress, "TICK_S", 3600.0)
    clock, stream = Clock(), Terminal()
    shown = Progress(steps, {"flux-m-t-seed9": 30.0, "01_profiling m": 60.0}, 1, stream=stream, now=clock)
    tell(shown, "job_info", 1)
    clock.seconds = 10.0
    assert shown.left().startswith("about 1 min 50 s left, done at "), "50 s of this one, twice 30 s of its like"
    assert shown.status() == f"0 of 3 · {shown.left()} · drew drift-m.png · 01_profiling m 10 s"
    kept = [shown.make_room(logging.makeLogRecord({"levelno": level})) for level in (logging.INFO, logging.ERROR)]
    assert kept == [False, True] and stream.getvalue() == "\r\x1b[K"


def test_times_of_earlier_calls_are_found_by_the_steps_names(tmp_path):
    for name, text in (("04_federated_run/fmd-m-t-seed0", "52.5"), ("02_merging/m", "7"), ("08_report", "3")):
        file = tmp_path / "benchmarks" / f"{name}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"s\th:m:s\n{text}\t0:00:52\n")
    assert progress.earlier(tmp_path / "benchmarks") == {"fmd-m-t-seed0": 52.5, "02_merging m": 7.0, "08_report": 3.0}


def test_spans_are_in_the_units_that_they_need():
    assert [records.span(seconds) for seconds in (0.4, 59.6, 200, 7500)] == [
        "0 s",
        "1 min 0 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
