"""The dashboard without a browser: what its controls mean, what it refuses, and a run in a thread."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from fluxlib import federation, records, widgets
from fluxlib.config import ConfigError, make_config
from fluxlib.widgets.controls import Controls, with_labels

DEFAULTS = {"string": "x", "int64": 1, "float64": 0.5}
SMALL = {"task": "mini-mmlu", "task_size": 200, "participants": 2, "rounds": 2, "local_steps": 1, "batch_size": 4}


def row(number: int) -> dict:
    return {c.name: DEFAULTS[c.dtype] for c in records.ROUNDS} | {"round": number, "metric_name": "accuracy"}


@pytest.fixture
def engine(monkeypatch):
    """Stands for the engine: rounds come when the test lets them."""
    allowed = threading.Semaphore(0)

    def run(config, on_round, out, on_outcome):
        rows = []
        for number in range(config.rounds + 1):
            assert allowed.acquire(timeout=20)
            if number:
                roles = SimpleNamespace(exploit=torch.eye(2, dtype=torch.bool))
                on_outcome(SimpleNamespace(accepted=[SimpleNamespace(roles=roles)] * 2))
            rows.append(row(number))
            if on_round(rows[-1]):
                break
        return SimpleNamespace(rounds=pd.DataFrame(rows))

    monkeypatch.setattr(federation, "run", run)
    return allowed


def test_a_run_can_be_watched_and_completes(engine, tmp_path):
    seen = []
    run = widgets.BackgroundRun(make_config(SMALL), tmp_path, lambda run: seen.append((run.state, len(run.rows))))
    run.start()
    assert run.busy
    engine.release(3)
    run.wait(20)
    assert (run.state, run.error, len(run.rows)) == ("complete", "", 3)
    assert [number for _, number in seen] == [1, 2, 3, 3]
    assert [counts.tolist() for counts in run.tuned] == [[[2, 0], [0, 2]]] * 2
    assert run.first_round == 1


def test_a_run_stops_after_the_round_in_progress(engine, tmp_path):
    run = widgets.BackgroundRun(make_config(SMALL), tmp_path)
    run.start()
    run.stop()
    assert run.state == "stopping"
    engine.release(3)
    run.wait(20)
    assert (run.state, len(run.rows)) == ("stopped", 1)


def test_a_run_that_fails_says_why(monkeypatch, tmp_path):
    def run(*_, **__):
        raise ConfigError("rounds is wrong")

    monkeypatch.setattr(federation, "run", run)
    failed = widgets.BackgroundRun(make_config(SMALL), tmp_path)
    failed.start()
    failed.wait(20)
    assert (failed.state, failed.error) == ("failed", "rounds is wrong")


def test_two_settings_never_share_a_place_in_the_store_and_equal_ones_do():
    controls = Controls(make_config(SMALL))
    first = controls.config()
    assert first == controls.config() and first.task_size == 200
    assert first.run_id.startswith("flux-t25-m25-")
    for name, value in (("tune_fraction", 0.5), ("rounds", 3), ("fleet", "rtx-3060"), ("layer_budget", "uniform")):
        before, controls.widgets[name].value = controls.widgets[name].value, value
        assert controls.config().run_id != first.run_id, name
        controls.widgets[name].value = before
    assert controls.config() == first


def test_a_message_names_the_control_too():
    assert with_labels("tune_fraction is 0, merge_fraction is 2") == (
        "tune_fraction (tuned) is 0, merge_fraction (merged) is 2"
    )


def test_a_preview_holds_every_expert_once_and_compares_with_the_full_model():
    found = widgets.preview(make_config(SMALL), participant=1)
    assert all(sorted(plan.experts) == list(range(16)) for plan in found.plans)
    assert sum(len(plan.tuned) for plan in found.plans) + int(found.explored.sum()) == found.budget.num_tuned == 16
    assert set(found.memory) == set(found.seconds) == {"flux", "fmd"}
    assert found.memory["flux"].peak_bytes < found.memory["fmd"].peak_bytes
    assert sum(found.seconds["flux"].values()) < sum(found.seconds["fmd"].values())
    assert found.warning == ""
    with pytest.raises(ConfigError, match="participant is 2, allowed is 0 to 1"):
        widgets.preview(make_config(SMALL), participant=2)


def test_the_dashboard_refuses_in_place_and_is_a_picture_where_nobody_looks(engine, monkeypatch, tmp_path):
    dashboard = widgets.Dashboard(make_config(SMALL), tmp_path, store=[])
    assert dashboard.message.value == "" and not dashboard.start.disabled
    dashboard.controls.widgets["tune_fraction"].value = 0.05
    assert "tune_fraction (tuned) is 0.05, allowed is at least" in dashboard.message.value
    assert dashboard.start.disabled and dashboard.plan.layout.visibility == "hidden"
    with pytest.raises(ConfigError, match="allowed is at least"):
        dashboard.press_run()
    dashboard.controls.widgets["tune_fraction"].value = 0.25
    assert dashboard.message.value == "" and dashboard.plan.layout.visibility == "visible"
    engine.release(3)
    run = dashboard.press_run(timeout_s=20)
    assert run.state == "complete" and "Complete." in dashboard.status.value
    monkeypatch.setenv(widgets.HEADLESS, "1")
    shown = dashboard._repr_mimebundle_()
    assert set(shown) == {"text/plain", "image/png"} and shown["image/png"] == dashboard.curve.value
    monkeypatch.delenv(widgets.HEADLESS)
    assert "application/vnd.jupyter.widget-view+json" in dashboard._repr_mimebundle_()
