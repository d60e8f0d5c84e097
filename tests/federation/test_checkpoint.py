"""A run that is killed between rounds, or while writing, ends as if it had not been."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlib import federation, records
from fluxlib.config import RunConfig
from fluxlib.federation import CheckpointError, LocalGrid, Output
from fluxlib.federation.client import client_app
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.server import rounds
from fluxlib.federation.server.strategy import FluxStrategy
from fluxlib.federation.store import checkpoint, tensor_file
from fluxlib.federation.store.tables import Tables
from fluxlib.io import ConfigError

Make = Callable[..., RunConfig]


class Killed(BaseException):
    """Stands for the process's end: nothing catches it."""


def kill_after(number: int) -> Callable[[dict[str, Any]], None]:
    def on_round(row: dict[str, Any]) -> None:
        if row["round"] == number:
            raise Killed

    return on_round


def path_of(config: RunConfig, out: Path) -> Path:
    return out / "checkpoints" / f"{config.run_id}.safetensors"


SAMPLED = {"federation.participants": 5, "federation.participants_per_round": 2}


@pytest.fixture
def config(make_config: Make) -> RunConfig:
    return make_config({"method": "fake-profiling", "federation.rounds": 5} | SAMPLED)


UNINTERRUPTED: dict[str, federation.RunResult] = {}


def as_uninterrupted(first: federation.RunResult, config: RunConfig) -> None:
    """Tables and models are those of a run that nobody killed, but for what a clock on the wall says."""
    text = config.model_dump_json()
    second = UNINTERRUPTED.get(text) or UNINTERRUPTED.setdefault(text, federation.run(config))
    for table in ("rounds", "participants"):
        one, other = getattr(first, table), getattr(second, table)
        keep = [name for name in one.columns if not name.endswith("wall_s") and name != "peak_memory_bytes"]
        pd.testing.assert_frame_equal(one[keep], other[keep], check_exact=True)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("number", "people"), [(1, {}), (3, SAMPLED), (4, {})], ids=["1", "3 sampled", "4"])
def test_a_killed_run_ends_as_an_uninterrupted_one(
    make_config: Make, tmp_path: Path, number: int, people: dict[str, Any]
) -> None:
    config = make_config({"method": "fake-profiling", "federation.rounds": 5} | people)
    with pytest.raises(Killed):
        federation.run(config, on_round=kill_after(number), out=tmp_path)
    assert path_of(config, tmp_path).is_file()
    rows: list[dict[str, Any]] = []
    resumed = federation.run(config, on_round=rows.append, out=tmp_path)
    assert [row["round"] for row in rows] == list(range(number + 1, 6))
    as_uninterrupted(resumed, config)
    assert not (tmp_path / "checkpoints").exists()


def test_flux_goes_on_with_the_profiles_it_had(make_config: Make, tmp_path: Path) -> None:
    config = make_config({"method": "flux", "training.local_steps": 2})
    with pytest.raises(Killed):
        federation.run(config, on_round=kill_after(1), out=tmp_path)
    as_uninterrupted(federation.run(config, out=tmp_path), config)


def test_copies_that_are_older_than_the_servers_come_back(make_config: Make, tmp_path: Path) -> None:
    config = make_config({"method": "flux_plus", "training.local_steps": 2, "federation.rounds": 5})
    with pytest.raises(Killed):
        federation.run(config, on_round=kill_after(3), out=tmp_path)
    tensors, _ = tensor_file.read_tensors(path_of(config, tmp_path))
    assert any(name.startswith("copies/") for name in tensors), "nobody holds one: nothing is tested"
    as_uninterrupted(federation.run(config, out=tmp_path), config)


class Elsewhere:
    """A grid whose nodes' states no checkpoint can keep."""

    def __init__(self, grid: LocalGrid) -> None:
        self.grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)


@pytest.mark.parametrize("same_nodes", [False, True])
def test_states_that_are_gone_are_said_to_be(
    make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, same_nodes: bool
) -> None:
    config = make_config({"engine": "deployment", "federation.rounds": 3})
    first, second = (LocalGrid(client_app.app, config.federation.participants) for _ in range(2))
    for grid, last in ((first, 2), (first if same_nodes else second, 3)):
        options = Output(tmp_path, on_round=lambda row, last=last: row["round"] == last)
        rounds.serve(Elsewhere(grid), config, options)  # type: ignore[arg-type]
    about = json.loads((tmp_path / "rounds" / f"{config.run_id}.json").read_text())
    expected = None if same_nodes else {"after_round": 2, "participants": [0, 1, 2]}
    assert about["status"] == "complete" and about.get("states_lost") == expected
    assert ("3 participants no longer have what they kept after round 2" in caplog.text) != same_nodes


def test_on_the_simulation_engine_no_run_goes_on(make_config: Make, tmp_path: Path) -> None:
    config = make_config({"engine": "simulation"})
    path_of(config, tmp_path).parent.mkdir()
    path_of(config, tmp_path).touch()
    with pytest.raises(ConfigError, match=f"{path_of(config, tmp_path)} is of a run that was interrupted"):
        federation.run(config, out=tmp_path)


def test_killed_again_and_again(config: RunConfig, tmp_path: Path) -> None:
    for number in (1, 2, 3, 4):
        with pytest.raises(Killed):
            federation.run(config, on_round=kill_after(number), out=tmp_path)
    as_uninterrupted(federation.run(config, out=tmp_path), config)


def test_killed_while_writing_the_checkpoint_before_is_whole(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        federation.run(config, on_round=kill_after(2), out=tmp_path)

    def half(tensors: Any, path: Path, *rest: Any) -> None:
        path.write_bytes(b"half a file")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "save_file", half)
        with pytest.raises(Killed):
            federation.run(config, out=tmp_path)
    rows: list[dict[str, Any]] = []
    resumed = federation.run(config, on_round=rows.append, out=tmp_path)
    assert rows[0]["round"] == 3
    as_uninterrupted(resumed, config)


def test_a_full_disk_is_an_error_and_loses_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        federation.run(config, on_round=kill_after(1), out=tmp_path)

    def full(path: Path, *rest: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(OSError, match="No space left"):
            federation.run(config, out=tmp_path)
    as_uninterrupted(federation.run(config, out=tmp_path), config)


def test_a_disk_that_is_full_when_the_tables_are_written_loses_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint goes only after the tables are there."""
    write = records.write

    def full(table: str, frame: Any, path: Path, *rest: Any) -> Any:
        if path.parent.name == "rounds":
            raise OSError(28, "No space left on device", str(path))
        return write(table, frame, path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(records, "write", full)
        with pytest.raises(OSError, match="No space left"):
            federation.run(config, out=tmp_path)
    rows: list[dict[str, Any]] = []
    as_uninterrupted(federation.run(config, on_round=rows.append, out=tmp_path), config)
    assert [row["round"] for row in rows] == [5]


def test_time_limits_may_change_before_a_run_goes_on(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        federation.run(make_config({"federation.round_timeout_s": 100.0}), on_round=kill_after(2), out=tmp_path)
    rows: list[dict[str, Any]] = []
    federation.run(make_config(), on_round=rows.append, out=tmp_path)
    assert rows[0]["round"] == 3


def test_who_was_profiled_comes_back(make_config: Make, tmp_path: Path, store: ExpertStore) -> None:
    config = make_config({"method": "fake-profiling"})
    grid = LocalGrid(client_app.app, 3)
    before, after = (FluxStrategy(grid, config, store) for _ in range(2))
    before.profiled = {0, 2}
    tables = Tables(config, store.model, "accuracy", len(store.keys))
    checkpoint.Checkpoint(tmp_path, config).save(1, before, tables)
    assert checkpoint.Checkpoint(tmp_path, config).resume(after, tables) == 1
    assert after.profiled == {0, 2}


def damaged(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> None:
    """Write the checkpoint anew, changed, and with the right digest."""
    tensors, text = tensor_file.read_tensors(path)
    about = json.loads(text)
    change(about, tensors)
    tensor_file.write_tensors(path, tensors, json.dumps(about))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda about, _: about.update(round="2"), "round is '2', allowed is int"),
        (lambda about, _: about.update(rows=[]), "rows is [], allowed is dict"),
        (lambda about, _: about.update(profiled=["0"]), "profiled is '0', allowed is int"),
        (lambda about, _: about.update(history=7), "remove it"),
        (lambda about, _: about.pop("digests"), "digests"),
        (lambda _, tensors: tensors.pop("roles/first"), "first"),
        (lambda _, tensors: tensors.update({"roles/first": torch.ones(3)}), "first is torch.float32 [3], allowed"),
        (lambda _, tensors: tensors.update({"roles/first": tensors["roles/first"].long()}), "first is torch.int64"),
        (lambda _, tensors: tensors.update({"nodes/2/others": torch.ones(2)}), "a participant's state"),
        (lambda _, tensors: tensors.update({"nodes/x/others": tensors["nodes/2/others"].clone()}), "'x'"),
    ],
)
def test_what_is_wrong_in_a_checkpoint_is_named(
    make_config: Make, tmp_path: Path, change: Callable[..., Any], named: str
) -> None:
    with pytest.raises(Killed):
        federation.run(make_config(), on_round=kill_after(1), out=tmp_path)
    damaged(path_of(make_config(), tmp_path), change)
    with pytest.raises(CheckpointError, match=re.escape(named)):
        federation.run(make_config(), out=tmp_path)


ODD = [None, True, -1, 3.5, 2**63, 1e308, math.nan, "", "x", "\ud800", "9" * 5000, [], [[]], {}, {"1": 2}]


def anything_else(value: Any, chance: random.Random) -> None:
    """Put something odd in one place of a JSON value, at whatever depth, or take it out."""
    while True:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not (isinstance(value[key], (dict, list)) and value[key] and chance.random() < 0.8):
            break
        value = value[key]
    if chance.random() < 0.2:
        del value[key]
    else:
        value[key] = chance.choice(ODD)


def another(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    return chance.choice([
        lambda: torch.ones(3), lambda: tensor.double(), lambda: torch.zeros_like(tensor), lambda: tensor[:0].clone(),
        lambda: torch.full_like(tensor, 255), lambda: tensor.float() * math.nan,
    ])()  # fmt: skip


def test_a_checkpoint_of_whatever_comes_is_resumed_from_or_refused(
    make_config: Make, tmp_path: Path, store: ExpertStore
) -> None:
    """Its digest is right, so it may be another program's."""
    config = make_config({"method": "flux"})
    with pytest.raises(Killed):
        federation.run(config, on_round=kill_after(1), out=tmp_path)
    path, refused = path_of(config, tmp_path), []
    good, text = tensor_file.read_tensors(path)

    @settings(max_examples=settings().max_examples // 3)
    @given(st.randoms(use_true_random=False))
    def case(chance: random.Random) -> None:
        about, tensors = json.loads(text), dict(good)
        if chance.random() < 0.7:
            anything_else(about, chance)
        else:
            name = chance.choice(list(tensors))
            tensor = tensors.pop(name)
            name = chance.choice([name, name, "", "nodes/2/others", "experts/0.1", "roles/first"])
            tensors |= {name: another(tensor, chance)} if chance.random() < 0.8 else {}
        tensor_file.write_tensors(path, tensors, json.dumps(about))
        fresh = ExpertStore(copy.deepcopy(store.model))
        strategy = FluxStrategy(LocalGrid(client_app.app, 3), config, fresh)
        tables = Tables(config, store.model, "accuracy", len(store.keys))
        try:
            checkpoint.Checkpoint(tmp_path, config).resume(strategy, tables)
        except CheckpointError as error:
            assert len(str(error)) < 1000
            refused.append(str(error))
        else:
            assert strategy.store.delta().num_experts == len(store.keys) and tables.frames()

    case()
    assert refused


def test_another_configuration_starts_anew(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        federation.run(make_config(), on_round=kill_after(2), out=tmp_path)
    rows: list[dict[str, Any]] = []
    federation.run(make_config({"data.alpha": 2.0}), on_round=rows.append, out=tmp_path)
    assert rows[0]["round"] == 0


@pytest.mark.parametrize("damage", [lambda data: b"rubbish", lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_checkpoint_is_named(make_config: Make, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(Killed):
        federation.run(make_config(), on_round=kill_after(2), out=tmp_path)
    path = path_of(make_config(), tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="remove it to start the run anew"):
        federation.run(make_config(), out=tmp_path)


def test_a_changed_expert_in_a_checkpoint_is_noticed(make_config: Make, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with pytest.raises(Killed):
        federation.run(make_config(), on_round=kill_after(2), out=tmp_path)
    path = path_of(make_config(), tmp_path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    tensors[min(name for name in tensors if name.startswith("experts/"))].view(-1)[0] += 1
    save_file(tensors, path, about)
    with pytest.raises(CheckpointError, match="damaged"):
        federation.run(make_config(), out=tmp_path)
