from __future__ import annotations

import pytest

from fluxlib import records
from fluxlib.app import widgets
from fluxlib.config import make_config

DEFAULTS = {"string": "x", "int64": 0, "float64": 0.5}


def row(number: int) -> dict:
    return {c.name: DEFAULTS[c.dtype] for c in records.TABLES["rounds"]} | {"round": number, "metric_name": "accuracy"}


class Handle:
    """Stands for a cell's output: remembers what was shown in it."""

    def __init__(self) -> None:
        self.shown: list[object] = []

    def update(self, picture: object) -> None:
        self.shown.append(picture)


@pytest.fixture
def handle(monkeypatch):
    found = Handle()

    def display(picture, display_id):
        found.update(picture)
        return found

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(widgets.background, "in_notebook", lambda: True)
    monkeypatch.delenv(widgets.HEADLESS, raising=False)
    return found


def watch(rounds: int) -> widgets.RunMonitor:
    monitor = widgets.RunMonitor(make_config({"federation.rounds": rounds}))
    for number in range(rounds + 1):
        assert monitor(row(number)) is None, "a monitor never stops a run"
    return monitor


def test_outside_a_notebook_there_is_a_line_per_round(capsys):
    monitor = watch(2)
    assert [line.split("round")[1].split()[0] for line in capsys.readouterr().out.splitlines()] == ["0", "1", "2"]
    assert len(monitor.rows) == 3
    assert not widgets.in_notebook()


def test_headlessly_only_the_finished_run_is_drawn(handle, monkeypatch):
    monkeypatch.setenv(widgets.HEADLESS, "1")
    watch(3)
    assert len(handle.shown) == 1


def test_live_the_picture_is_replaced_as_rounds_come_but_not_too_often(handle, monkeypatch):
    monkeypatch.setattr(widgets.background, "REDRAW_S", 3600.0)
    watch(3)
    assert len(handle.shown) == 2, "the first row and the last"
    assert handle.shown[-1]._repr_png_().startswith(b"\x89PNG")
