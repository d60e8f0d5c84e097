"""Whole runs on the in-process engine, with a method that changes experts without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from flwr.app import Array, Context, Message
from flwr.clientapp import ClientApp

from fluxlib import federation, records, seeding
from fluxlib.config import REPO_ROOT, RunConfig
from fluxlib.federation import RunFailed
from fluxlib.federation.client import client_app
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.results import table_path
from fluxlib.federation.server import server_app
from fluxlib.federation.server.server_app import from_run_config
from fluxlib.io import ConfigError

CLIENT = client_app.app
Make = Callable[..., RunConfig]
NODE = 3
"""Node of participant 1."""


def timeless(frame: pd.DataFrame) -> pd.DataFrame:
    """Without what a clock on the wall or the operating system says."""
    measured = [name for name in frame.columns if name.endswith("wall_s") or name == "peak_memory_bytes"]
    return frame.drop(columns=measured)


def same_tables(first: federation.RunResult, second: federation.RunResult) -> None:
    for table in ("rounds", "participants"):
        pd.testing.assert_frame_equal(
            timeless(getattr(first, table)), timeless(getattr(second, table)), check_exact=True
        )


def same_models(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def wrapped(
    change: Callable[[Message, Message, Context], Message],
    join: Callable[[Message, Context], Message] = CLIENT,
) -> ClientApp:
    """The client app, its training replies passed through ``change(request, reply, context)``."""
    app = ClientApp()
    app.query("join")(join)
    app.query("profile")(CLIENT)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return change(message, CLIENT(message, context), context)

    return app


def test_a_run_gives_one_row_per_round_and_writes_both_tables(make_config: Make, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    result = federation.run(make_config(), on_round=rows.append, out=tmp_path)
    assert result.rounds["round"].tolist() == [0, 1, 2, 3]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert result.participants.groupby("round").size().tolist() == [3, 3, 3]
    for name in ("rounds", "participants"):
        path = table_path(tmp_path, name, result.run_id)
        pd.testing.assert_frame_equal(records.read(name, path), getattr(result, name), check_exact=True)
    about = json.loads(table_path(tmp_path, "rounds", result.run_id).with_suffix(".json").read_text())
    assert (about["status"], about["parameters"]["task"], len(about["labels_by_participant"])) == (
        "complete", "mini-piqa", 3
    )  # fmt: skip
    assert not (tmp_path / "checkpoints").exists()


def test_clocks_add_up_and_round_zero_costs_nothing(make_config: Make) -> None:
    rounds = federation.run(make_config()).rounds
    for clock in ("wall_s", "device_s"):
        assert rounds[clock].tolist() == pytest.approx(rounds[f"round_{clock}"].cumsum().tolist())
        assert rounds[clock].iloc[0] == 0 and (rounds[f"round_{clock}"].iloc[1:] > 0).all()
    assert (rounds["evaluate_wall_s"] > 0).all()


def test_bytes_are_exact(make_config: Make) -> None:
    result = federation.run(make_config())
    expert = 4 * (8 * 8 + 8 * 4)
    people = result.participants
    assert (people["uplink_bytes"] == people["num_tuned"] * expert).all()
    rounds = result.rounds.set_index("round")
    assert rounds.loc[1, "downlink_bytes"] == 0
    for number in (2, 3):  # what changed in the round before, to each of three
        assert rounds.loc[number, "downlink_bytes"] == 3 * rounds.loc[number - 1, "num_tuned"] * expert


def test_the_same_seed_gives_the_same_tables_and_another_does_not(make_config: Make) -> None:
    first, again = federation.run(make_config()), federation.run(make_config())
    same_tables(first, again)
    assert same_models(first.model, again.model)
    assert not same_models(first.model, federation.run(make_config({"seed": 1})).model)


def test_a_profiling_method_learns_first_utilities(make_config: Make) -> None:
    config = make_config({"method": "fake-profiling"})
    result = federation.run(config)
    first = result.participants.query("round == 1")
    later = result.participants.query("round == 2")
    assert (first["profile_device_s"] > 0).all() and (later["profile_device_s"] == 0).all()
    assert not same_models(result.model, federation.run(make_config()).model)


def test_some_participants_take_part_each_round(make_config: Make) -> None:
    config = make_config({
        "federation.participants": 6, "federation.participants_per_round": 2, "federation.rounds": 5,
        "method": "fake-profiling",
    })  # fmt: skip
    result = federation.run(config)
    seen = result.participants.groupby("round")["participant"].apply(list)
    for number, found in seen.items():
        chance = seeding.generator(0, "sample", number)
        assert found == sorted(torch.randperm(6, generator=chance)[:2].tolist())
    assert result.rounds["num_participants"].tolist() == [0, 2, 2, 2, 2, 2]
    assert (result.participants["rejected"] == "").all()
    same_tables(result, federation.run(config))


def test_evaluation_is_skipped_between_and_never_at_the_end(make_config: Make) -> None:
    rounds = federation.run(make_config({"federation.rounds": 5, "evaluation.every": 3})).rounds
    assert rounds["metric"].notna().tolist() == [True, False, False, True, False, True]


def test_a_run_ends_when_the_device_clock_has_counted_its_seconds(make_config: Make, tmp_path: Path) -> None:
    whole = federation.run(make_config({"federation.rounds": 4, "evaluation.every": 4})).rounds
    seconds = float(whole["device_s"].iloc[2])
    changes = {"federation.rounds": 4, "evaluation.every": 4, "federation.device_seconds": seconds}
    result = federation.run(make_config(changes), out=tmp_path)
    assert result.rounds["round"].tolist() == [0, 1, 2]
    assert result.rounds["metric"].notna().tolist() == [True, False, True]
    assert not records.unfinished(tmp_path)
    again = federation.run(make_config(changes), out=tmp_path)
    assert again.rounds["device_s"].tolist() == result.rounds["device_s"].tolist()


def test_returning_true_stops_and_the_run_goes_on_later(make_config: Make, tmp_path: Path) -> None:
    stopped = federation.run(make_config(), on_round=lambda row: row["round"] == 1, out=tmp_path)
    assert stopped.rounds["round"].tolist() == [0, 1]
    about = table_path(tmp_path, "rounds", stopped.run_id).with_suffix(".json")
    assert json.loads(about.read_text())["status"] == "stopped"
    finished = federation.run(make_config(), out=tmp_path)
    same_tables(finished, federation.run(make_config()))


def test_half_precision_on_the_wire_halves_the_bytes(make_config: Make) -> None:
    full = federation.run(make_config())
    half = federation.run(make_config({"wire.uplink": "bfloat16", "wire.downlink": "bfloat16"}))
    assert (half.rounds["uplink_bytes"] * 2 == full.rounds["uplink_bytes"]).all()
    assert (half.rounds["downlink_bytes"] * 2 == full.rounds["downlink_bytes"]).all()
    assert (half.participants["rejected"] == "").all()


# Wrong input: refused before any work.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method is 'magic', allowed are flux"),
        ({"task": "sudoku"}, "task is 'sudoku', allowed are mini-"),
        ({"model": "gpt-9"}, "gpt-9"),
        ({"clock.fleet": "toasters"}, "toasters"),
        ({"clock.link": "pigeon"}, "pigeon"),
        ({"clock.model": "gpt-9"}, "gpt-9"),
        ({"budget.tune_frac": 0.1}, "budget.tune_frac is 0.1, allowed is at least 0.25"),
        ({"budget.merge_frac": 0.0}, "budget.merge_frac is 0, allowed is at least 0.25"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(make_config: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        federation.run(make_config(changes))


def test_an_output_folder_that_cannot_be_written_is_refused(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot write to the output folder .*file/results"):
        federation.run(make_config(), out=tmp_path / "file" / "results")


def test_a_damaged_base_model_is_refused_by_name(make_config: Make, tmp_path: Path, tiny: Any) -> None:
    folder = tiny.write_model(tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged.*cannot be loaded"):
        federation.run(make_config({"model": str(folder)}))


def test_an_empty_text_in_flowers_run_configuration_is_a_setting_left_out() -> None:
    config, out = from_run_config({"method": "fmd", "evaluation.every": 2, "data.task_size": "", "out": "results"})
    assert (config.method, config.evaluation.every, config.data.task_size) == ("fmd", 2, None)
    assert out == REPO_ROOT / "results"
    with pytest.raises(ConfigError, match="unknown parameter 'colour'"):
        from_run_config({"colour": "blue"})


# Faults: they cost a reply, not the run.


def broken(request: Message, reply: Message, context: Context) -> Message:
    raise MemoryError("4 GB are not enough")


def not_a_number(request: Message, reply: Message, context: Context) -> Message:
    arrays = reply.content["arrays"]
    key = next(iter(arrays))
    arrays[key] = Array(arrays[key].numpy() * float("nan"))
    return reply


def misshapen(request: Message, reply: Message, context: Context) -> Message:
    arrays = reply.content["arrays"]
    key = next(iter(arrays))
    arrays[key] = Array(arrays[key].numpy().reshape(-1))
    return reply


def not_asked_for(request: Message, reply: Message, context: Context) -> Message:
    arrays = reply.content["arrays"]
    tuned = {name.rpartition(".")[0] for name in arrays}
    other = next(f"{layer}.{e}" for layer in range(2) for e in range(4) if f"{layer}.{e}" not in tuned)
    for name in [name for name in arrays if name.startswith(min(tuned) + ".")]:
        arrays[f"{other}.{name.rpartition('.')[2]}"] = arrays[name]
    return reply


def from_the_past(request: Message, reply: Message, context: Context) -> Message:
    reply.content["config"]["round"] = int(reply.content["config"]["round"]) - 1
    return reply


def saying(**lies: Any) -> Callable[[Message, Message, Context], Message]:
    def lie(request: Message, reply: Message, context: Context) -> Message:
        account = json.loads(str(reply.content["config"]["work"])) | lies
        reply.content["config"]["work"] = json.dumps(account)
        return reply

    return lie


def with_a_flipped_bit(request: Message, reply: Message, context: Context) -> Message:
    arrays = reply.content["arrays"]
    key = next(iter(arrays))
    data = arrays[key].data
    arrays[key] = Array("float32", arrays[key].shape, "numpy.ndarray", data[:20] + bytes([data[20] ^ 4]) + data[21:])
    return reply


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (with_a_flipped_bit, "malformed"),
        (saying(train_tokens=3.5), "malformed"),
        (saying(train_tokens=10**15), "not_finite"),
        (saying(num_tuned=10**15), "not_finite"),
        (saying(num_experts=1), "not_finite"),
        (saying(weight_bits=0, offloaded=True, num_updated=1), "not_finite"),
        (broken, "error"),
        (not_a_number, "not_finite"),
        (misshapen, "wrong_shape"),
        (not_asked_for, "unassigned_expert"),
        (from_the_past, "stale"),
    ],
)
def test_a_bad_reply_is_named_counted_and_left_out(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, fault: Any, reason: str
) -> None:
    def sometimes(request: Message, reply: Message, context: Context) -> Message:
        bad = context.node_id == NODE and reply.content["config"]["round"] == 2
        return fault(request, reply, context) if bad else reply

    monkeypatch.setattr(client_app, "app", wrapped(sometimes))
    result = federation.run(make_config({"federation.participants": 4, "federation.min_replies_frac": 0.75}))
    refused = result.participants.query("rejected != ''")
    assert refused[["round", "participant", "rejected"]].values.tolist() == [[2, 1, reason]]
    assert result.rounds["num_rejected"].tolist() == [0, 0, 1, 0]
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_a_phase_that_no_file_could_name_hurts_nobody(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def oddly(request: Message, reply: Message, context: Context) -> Message:
        reply.content["config"]["phases"] = '{"\\ud800": 1.0, "train": 2.0}'
        return reply

    monkeypatch.setattr(client_app, "app", wrapped(oddly))
    result = federation.run(make_config({"federation.rounds": 2}), out=tmp_path)
    assert (result.participants["rejected"] == "").all() and (result.participants["train_wall_s"] == 2.0).all()


def test_a_participant_that_breaks_half_way_leaves_no_trace_for_the_next(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxlib import methods

    fake = methods.METHODS["fake"]

    def breaking(model: Any, local: Any) -> Any:
        if local.number == 2 and breaking.calls == 4:  # type: ignore[attr-defined]
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            breaking.calls += 1  # type: ignore[attr-defined]
            raise RuntimeError("half way")
        breaking.calls += 1  # type: ignore[attr-defined]
        return fake.train(model, local)

    breaking.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setitem(methods.METHODS, "fake", replace(fake, train=breaking))
    result = federation.run(make_config())
    assert result.rounds["num_rejected"].tolist() == [0, 0, 1, 0]

    def failing(request: Message, reply: Message, context: Context) -> Message:
        if context.node_id == NODE and reply.content["config"]["round"] == 2:
            raise RuntimeError("at the end")
        return reply

    monkeypatch.setitem(methods.METHODS, "fake", fake)
    monkeypatch.setattr(client_app, "app", wrapped(failing))
    assert same_models(result.model, federation.run(make_config()).model)


def test_too_few_good_replies_fail_loudly_and_keep_what_was_complete(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def dying(request: Message, reply: Message, context: Context) -> Message:
        if reply.content["config"]["round"] == 2 and context.node_id >= NODE:
            raise MemoryError("no room")
        return reply

    monkeypatch.setattr(client_app, "app", wrapped(dying))
    with pytest.raises(RunFailed, match=r"round 2: 1 of 3 replies were good.*asks for 2; refused: 2 error.*no room"):
        federation.run(make_config(), out=tmp_path)
    path = tmp_path / "rounds" / f"{make_config().run_id}.parquet"
    assert records.read("rounds", path)["round"].tolist() == [0, 1]
    assert json.loads(path.with_suffix(".json").read_text())["status"] == "failed"
    people = records.read("participants", tmp_path / "participants" / path.name)
    assert people.query("round == 2")["rejected"].tolist() == ["", "error", "error"]


def test_a_participant_that_lost_its_state_gets_everything_in_the_same_round(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(request: Message, reply: Message, context: Context) -> Message:
        if context.node_id == NODE and request.content["config"]["round"] == 2:
            for name in ("held", "experts"):
                del context.state[name]
        return reply

    monkeypatch.setattr(client_app, "app", wrapped(forgetful))
    result = federation.run(make_config())
    assert (result.participants["rejected"] == "").all()
    full = 8 * 4 * (8 * 8 + 8 * 4)
    sent = result.participants.query("round == 3").set_index("participant")["downlink_bytes"]
    assert sent[1] == sent[0] + full
    assert same_models(result.model, federation.run(make_config()).model)


def test_a_participant_with_another_base_model_is_refused(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(message: Message, context: Context) -> Message:
        reply = CLIENT(message, context)
        if context.node_id == NODE:
            reply.content["config"]["frozen_digest"] = "0" * 64
        return reply

    monkeypatch.setattr(client_app, "app", wrapped(lambda request, reply, context: reply, join=other))
    with pytest.raises(RunFailed, match="missing: 1.*participant 1 has another base model"):
        federation.run(make_config())


def test_one_participant_tunes_alone_and_its_change_comes_back_exactly(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    kept: dict[str, Any] = {}

    def keep(request: Message, reply: Message, context: Context) -> Message:
        kept.update({name: torch.from_numpy(a.numpy().copy()) for name, a in reply.content["arrays"].items()})
        return reply

    monkeypatch.setattr(client_app, "app", wrapped(keep))
    result = federation.run(make_config({"federation.participants": 1, "federation.rounds": 1}))
    base, tuned = ExpertStore(tiny.build_model()), ExpertStore(result.model)
    for key in base.keys:
        for name, tensor in base.tensors(key).items():
            change = kept.get(f"{key[0]}.{key[1]}.{name}")
            assert torch.equal(tuned.tensors(key)[name], tensor if change is None else tensor + change)
    assert 0 < len(kept) < 2 * len(base.keys)


def test_a_server_app_ends_a_while_after_the_process_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, slept, ended = iter([7, 7, 1]), [], []
    monkeypatch.setattr(server_app.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(server_app.time, "sleep", slept.append)
    monkeypatch.setattr(server_app.os, "_exit", ended.append)
    server_app._end_after(7)
    assert (slept, ended) == ([1.0, 1.0, 3.0], [1])
