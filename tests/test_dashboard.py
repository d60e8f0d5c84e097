"""The dashboard without a browser: what its controls mean, what it refuses, and a run in a thread."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pandas as pd
import pytest
from safetensors.torch import save_file

from fluxlib import federation, records
from fluxlib.analysis import store, where
from fluxlib.app import widgets
from fluxlib.app.widgets.controls import Controls
from fluxlib.config import figures_dir, flatten, make_config
from fluxlib.federation.store.tables import read_work
from fluxlib.io import ConfigError

DEFAULTS = {"string": "x", "int64": 1, "float64": 0.5}
SMALL = {
    "task": "mini-mmlu",
    "data.task_size": 200,
    "federation.participants": 2,
    "federation.rounds": 2,
    "training.local_steps": 1,
    "training.batch_size": 4,
}


def row(number: int) -> dict:
    return {c.name: DEFAULTS[c.dtype] for c in records.TABLES["rounds"]} | {"round": number, "metric_name": "accuracy"}


@pytest.fixture
def engine(monkeypatch):
    """Stands for the engine: rounds come when the test lets them."""
    allowed = threading.Semaphore(0)

    def run(config, on_round, out):
        rows = []
        for number in range(config.federation.rounds + 1):
            assert allowed.acquire(timeout=300)
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
    run.join(300)
    assert (run.state, run.error, len(run.rows)) == ("complete", "", 3)
    assert [number for _, number in seen] == [1, 2, 3, 3]


def test_a_run_stops_after_the_round_in_progress(engine, tmp_path):
    run = widgets.BackgroundRun(make_config(SMALL), tmp_path)
    run.start()
    run.stop()
    assert run.state == "stopping"
    engine.release(3)
    run.join(300)
    assert (run.state, len(run.rows)) == ("stopped", 1)


def test_a_run_that_fails_says_why(monkeypatch, tmp_path):
    def run(*_, **__):
        raise ConfigError("rounds is wrong")

    monkeypatch.setattr(federation, "run", run)
    failed = widgets.BackgroundRun(make_config(SMALL), tmp_path)
    failed.start()
    failed.join(300)
    assert (failed.state, failed.error) == ("failed", "rounds is wrong")


def test_two_settings_never_share_a_place_in_the_store_and_equal_ones_do():
    controls = Controls(make_config(SMALL))
    first = controls.config()
    assert first == controls.config() and first.data.task_size == 200
    assert first.run_id.startswith("flux-t25-m25-")
    for name, value in (
        ("budget.tune_frac", 0.5),
        ("federation.rounds", 3),
        ("clock.fleet", "rtx-3060"),
        ("merging.budgets", "uniform"),
    ):
        before, controls.widgets[name].value = controls.widgets[name].value, value
        assert controls.config().run_id != first.run_id, name
        controls.widgets[name].value = before
    assert controls.config() == first


def test_a_preview_holds_every_expert_once_and_compares_with_the_full_model():
    found = widgets.preview(make_config(SMALL), participant=1)
    assert all(sorted(plan.experts) == list(range(16)) for plan in found.plans)
    assert sum(len(plan.tuned) for plan in found.plans) + int(found.explored.sum()) == 24
    assert set(found.memory) == set(found.seconds) == {"flux", "fmd"}
    assert found.memory["flux"].peak_bytes < found.memory["fmd"].peak_bytes
    assert sum(found.seconds["flux"].values()) < sum(found.seconds["fmd"].values())
    assert found.warning == ""
    first, _, last = found.summary()
    assert first.startswith("Participant 1 in round 1: 7 of 96 experts tuned, 17 explored, ")
    assert "FMD takes" in last
    with pytest.raises(ConfigError, match="participant is 2, allowed is 0 to 1"):
        widgets.preview(make_config(SMALL), participant=2)


@pytest.mark.parametrize("method", ["flux", "fmd", "fmq", "fmes"])
def test_the_work_of_a_preview_is_that_of_a_run(method):
    config = make_config(SMALL | {"method": method, "training.local_steps": 2})
    rows = federation.run(config).participants
    row = rows[(rows["round"] == 2) & (rows["participant"] == 0)].iloc[0]
    was, _ = read_work(row["work"])
    expected = widgets.preview(config).works[method]
    counted = {
        "num_tuned", "num_quantized", "weight_bits", "offloaded", "hidden_profile", "download_bits", "upload_bits",
        "train_steps", "train_samples", "profile_samples", "profile_bits", "num_experts",
    }  # fmt: skip
    assert {name: getattr(expected, name) for name in counted} == {name: getattr(was, name) for name in counted}
    for name in ("train_tokens", "profile_tokens", "probe_samples", "num_frozen", "num_merge_sources", "num_uploaded"):
        assert getattr(expected, name) == pytest.approx(getattr(was, name), rel=0.3, abs=2), name


def test_too_few_experts_of_the_real_model_are_said_in_the_words_of_the_controls():
    config = make_config(SMALL | {"method": "fmes", "clock.model": "llama-moe-3.5b", "budget.tune_frac": 0.0625})
    with pytest.raises(ConfigError, match=r"budget.tune_frac is 0\.0625, 32 of 512 experts of llama-moe-3\.5b: .*128"):
        widgets.preview(config)


def test_what_does_not_fit_is_said():
    config = make_config(SMALL | {"clock.fleet": "rtx-3060", "clock.model": "llama-moe-3.5b", "budget.tune_frac": 0.5})
    warning = widgets.preview(config).warning
    assert warning.startswith("Does not fit: 256 tuned and 128 merged experts of llama-moe-3.5b need ")
    assert warning.endswith("`fluxlib plan` says what would.")


def test_a_run_that_goes_on_has_its_earlier_rounds(tmp_path):
    config = make_config(SMALL | {"federation.rounds": 3, "evaluation.samples": 4})
    first = widgets.BackgroundRun(config, tmp_path, lambda run: run.stop() if len(run.rows) == 2 else None)
    first.start()
    first.join(300)
    assert first.state == "stopped"
    (label, file), *_ = store.runs([tmp_path]).items()
    assert (
        label == f"{config.run_id}  ({tmp_path.name}, unfinished)"
        and flatten(store.parameters(file))["federation.rounds"] == 3
    )
    second = widgets.BackgroundRun(config, tmp_path)
    second.start()
    second.join(300)
    assert second.state == "complete" and [row["round"] for row in second.rows] == [0, 1, 2, 3]
    assert list(store.runs([tmp_path])) == [f"{config.run_id}  ({tmp_path.name})"]


def test_a_run_that_is_killed_keeps_its_rounds_in_the_store(tmp_path):
    """A kernel that dies leaves a checkpoint and no tables: the newest of both is what the store has."""
    config = make_config(SMALL | {"federation.rounds": 3})
    checkpoint = tmp_path / "checkpoints" / f"{config.run_id}.safetensors"
    checkpoint.parent.mkdir()
    about = {"round": 1, "rows": {"rounds": [row(0), row(1)]}, "config": config.model_dump(mode="json")}
    save_file({}, checkpoint, {"about": json.dumps(about)})
    assert len(store.load([config.run_id], [tmp_path])[config.run_id]) == 2
    history = widgets.history.History([tmp_path], lambda: None, lambda config: taken.append(config))
    taken: list[object] = []
    history.show(config.model, config.task)
    ((label, file),) = history.choice.options
    assert label.startswith("FLUX seed 0 · 1 of 3 rounds, unfinished") and history.unfinished(tmp_path) == [
        config.run_id
    ]
    history.choice.value = (file,)
    history.take_over.click()
    assert taken == [config]
    checkpoint.write_text("cut off")
    with pytest.raises(records.TableError, match="no 'rounds' table"):
        store.read(file)


def test_a_dashboard_that_is_opened_again_watches_the_run_that_goes_on(engine, tmp_path):
    closed = widgets.Dashboard(make_config(SMALL), tmp_path, store=[])
    closed.controls.widgets["federation.rounds"].value = 1
    closed.start.click()
    closed.wait()
    opened = widgets.Dashboard(make_config(SMALL), tmp_path, store=[])
    assert opened.run is closed.run and opened.start.disabled and not opened.halt.disabled
    assert opened.controls.config() == opened.run.config and opened.tabs.selected_index == 1
    engine.release(2)
    opened.run.join(300)
    opened.wait()
    assert "Complete." in opened.status.value and "Complete." not in closed.status.value
    assert widgets.Dashboard(make_config(SMALL), tmp_path, store=[]).run is None


def test_buttons_that_are_pressed_twice_do_it_once(engine, tmp_path):
    dashboard = widgets.Dashboard(make_config(SMALL), tmp_path, store=[])
    dashboard.halt.click()
    dashboard.history.take_over.click()
    dashboard.wait()
    assert dashboard.run is None and dashboard.history.note.value == "Choose one run, 0 are chosen."
    dashboard.start.click()
    dashboard.wait()
    run = dashboard.run
    dashboard.controls.widgets["federation.rounds"].value = 1
    dashboard.start.click()
    dashboard.wait()
    assert dashboard.run is run
    with pytest.raises(ConfigError, match=f"{run.config.run_id} still runs: wait for it, or stop it"):
        dashboard.press_run()
    dashboard.halt.click()
    dashboard.halt.click()
    engine.release(3)
    run.join(300)
    assert (run.state, len(run.rows)) == ("stopped", 1)


def test_a_press_waits_for_the_settings_that_are_being_taken_over(engine, monkeypatch, tmp_path):
    """JupyterLab hands the two presses to two threads, and the first of them still computes."""
    config = make_config(SMALL | {"federation.rounds": 1, "variant": "earlier"})
    table = tmp_path / "rounds" / f"{config.run_id}.parquet"
    records.write("rounds", pd.DataFrame([row(0)]), table, {"parameters": config.model_dump(mode="json")})
    dashboard = widgets.Dashboard(make_config(SMALL), tmp_path, store=[])
    allowed, look = threading.Event(), widgets.preview

    def slow(*arguments):
        assert allowed.wait(300)
        return look(*arguments)

    monkeypatch.setattr(widgets.dashboard, "preview", slow)
    dashboard.history.choice.value = (table,)
    for button in (dashboard.history.take_over, dashboard.start):
        thread = threading.Thread(target=button.click)
        thread.start()
        thread.join(300)
    assert dashboard.run is None
    allowed.set()
    dashboard.wait()
    assert dashboard.run.config.federation.rounds == 1
    engine.release(2)
    dashboard.run.join(300)


def test_what_fails_when_it_is_its_turn_is_said_and_stops_nothing(monkeypatch, tmp_path):
    dashboard = widgets.Dashboard(make_config(SMALL), tmp_path, store=[])
    with monkeypatch.context() as patch:
        patch.setattr(widgets.dashboard, "preview", lambda *_: 1 / 0)
        dashboard.controls.widgets["federation.rounds"].value = 3
        dashboard.wait()
    assert "ZeroDivisionError: division by zero" in dashboard.message.value
    dashboard.controls.widgets["federation.rounds"].value = 2
    dashboard.wait()
    assert dashboard.message.value == "" and dashboard.preview.config.federation.rounds == 2


@pytest.mark.parametrize("name", ["task", "method", "clock.fleet", "clock.link"])
def test_a_name_that_no_menu_has_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 'nope', allowed are "):
        Controls(make_config(SMALL | {name: "nope"}))


def test_a_slider_goes_as_far_as_it_has_to():
    assert (
        Controls(make_config(SMALL | {"federation.rounds": 90, "federation.participants": 30}))
        .config()
        .federation.rounds
        == 90
    )


def test_every_stored_copy_is_an_entry(tmp_path):
    config = make_config(SMALL)
    places = [tmp_path / "a" / "full", tmp_path / "b" / "full"]
    for place in places:
        table = place / "rounds" / f"{config.run_id}.parquet"
        records.write("rounds", pd.DataFrame([row(0)]), table, {"parameters": config.model_dump(mode="json")})
    history = widgets.history.History(places, lambda: None, lambda _: None)
    history.show(config.model, config.task)
    labels, files = zip(*history.choice.options, strict=True)
    assert len(set(labels)) == len(set(files)) == 2
    history.choice.value = files
    assert sorted(history.chosen()) == [f"FLUX seed 0 ({place})" for place in places]
    assert store.SEARCH in [place.name for place in store.folders()]
    assert store.SEARCH not in [place.name for place in store.folders(trials=False)]


def test_a_watcher_that_fails_ends_no_run(engine, tmp_path):
    run = widgets.BackgroundRun(make_config(SMALL), tmp_path, lambda run: 1 / 0)
    run.start()
    engine.release(3)
    run.join(300)
    assert (run.state, len(run.rows)) == ("complete", 3)


def test_settings_that_the_dashboard_cannot_show_change_nothing():
    controls = Controls(make_config(SMALL))
    before = controls.config()
    with pytest.raises(ConfigError, match="model is 'elsewhere', which the dashboard cannot show"):
        controls.load(make_config(SMALL | {"model": "elsewhere"}))
    assert controls.config() == before
    controls.load(make_config(SMALL | {"federation.rounds": 90, "data.alpha": 0.1}))
    assert controls.config().federation.rounds == 90 and controls.config().data.alpha == 0.1


def test_the_dashboard_refuses_in_place_and_is_a_picture_where_nobody_looks(engine, monkeypatch, tmp_path):
    dashboard = widgets.Dashboard(make_config(SMALL), tmp_path, store=[])
    assert dashboard.message.value == "" and not dashboard.start.disabled
    dashboard.controls.widgets["budget.tune_frac"].value = 0.05
    dashboard.wait()
    assert "budget.tune_frac is 0.05, allowed is at least" in dashboard.message.value
    assert [
        name for name, widget in dashboard.controls.widgets.items() if "solid" in (widget.layout.border_top or "")
    ] == ["budget.tune_frac"]
    assert dashboard.start.disabled and dashboard.plan.layout.visibility == "hidden"
    with pytest.raises(ConfigError, match="allowed is at least"):
        dashboard.press_run()
    dashboard.controls.widgets["budget.tune_frac"].value = 0.25
    dashboard.wait()
    assert dashboard.message.value == "" and dashboard.plan.layout.visibility == "visible"
    engine.release(3)
    run = dashboard.press_run()
    assert run.state == "complete" and "Complete." in dashboard.status.value
    monkeypatch.setenv(widgets.HEADLESS, "1")
    shown = dashboard._repr_mimebundle_()
    assert set(shown) == {"text/plain", "image/png"} and shown["image/png"] == dashboard.curve.value
    monkeypatch.delenv(widgets.HEADLESS)
    assert "application/vnd.jupyter.widget-view+json" in dashboard._repr_mimebundle_()


def test_a_press_on_the_map_sets_device_and_link_and_what_a_model_would_need_agrees_with_it(tmp_path):
    file = figures_dir("full") / "where_flux_pays-mini-llama-moe.csv"
    table = pd.read_csv(file, keep_default_na=False, na_values={"factor": [""]})
    cells, place = where.over_tasks(table).set_index(["device", "link"]), ("rtx-4090", "100mbps")
    dashboard = widgets.Dashboard(make_config(SMALL | {"training.batch_size": 16}), tmp_path, store=[])
    assert list(dashboard.map.buttons) == list(cells.index)
    cell, button = cells.loc[place], dashboard.map.buttons[place]
    baseline = cell["baseline"].upper()
    assert button.description == f"{cell['sign']}{cell['factor']:.2g} {baseline}"
    button.click()
    dashboard.wait()
    clock = dashboard.preview.config.clock
    assert (clock.fleet, clock.link, clock.model) == (*place, "llama-moe-3.5b")
    framed = [one for one, other in dashboard.map.buttons.items() if "solid" in other.layout.border_top]
    assert framed == [place]

    own = dashboard.own_model
    verb = "pays" if cell["factor"] > 1 else "does not pay"
    told = f"FLUX {verb}: at the target {cell['factor']:.2g} times as soon as the best baseline that fits, {baseline}."
    for name, said in (("llama-moe-3.5b", told), ("nothing", "&#x27;nothing&#x27; is no folder, no known name")):
        own.name.value = name
        own.ask.click()
        dashboard.wait()
        assert said in own.answer.value, own.answer.value
    dashboard.controls.widgets["method"].value = "flux_plus"
    dashboard.wait()
    assert "FLUX+ at the target" in dashboard.map.legend.value


def test_low_rank_products_and_flux_plus_have_a_plan():
    whole, low = (widgets.preview(make_config(SMALL | {"adapter.kind": kind})) for kind in ("none", "lora"))
    assert low.memory["flux"].peak_bytes < whole.memory["flux"].peak_bytes
    assert low.seconds["flux"]["upload"] < whole.seconds["flux"]["upload"]
    plus = widgets.preview(make_config(SMALL | {"method": "flux_plus"}))
    assert plus.seconds["flux_plus"]["download"] < whole.seconds["flux"]["download"]
    assert {"profile", "probe"}.isdisjoint(plus.seconds["flux_plus"])
