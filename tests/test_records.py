from __future__ import annotations

import datetime
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from fluxlib import records
from fluxlib.federation.store.progress import Progress
from fluxlib.federation.store.tensor_file import write_tensors

VALUES = {"string": "x", "int64": 3, "float64": 0.5, "bool": True}


def frame(table: str, rows: int = 2) -> pd.DataFrame:
    return pd.DataFrame({c.name: [VALUES[c.dtype]] * rows for c in records.columns(table)})


@pytest.mark.parametrize("table", records.TABLES)
def test_what_is_written_is_read_back(table, tmp_path):
    path = records.write(table, frame(table), tmp_path / table / "a.parquet", {"parameters": {"seed": 0}})
    pd.testing.assert_frame_equal(records.read(table, path), frame(table))
    assert json.loads(path.with_suffix(".json").read_text()) == {"table": table, "parameters": {"seed": 0}}


def test_units_and_meanings_travel_in_the_file(tmp_path):
    path = records.write("rounds", frame("rounds"), tmp_path / "a.parquet", {})
    field = pq.read_schema(path).field("uplink_bytes")
    assert field.metadata[b"unit"] == b"B"
    assert b"participants" in field.metadata[b"description"]


def test_a_folder_is_read_run_after_run(tmp_path):
    for name in ("b", "a"):
        records.write("rounds", frame("rounds").assign(run_id=name), tmp_path / "rounds" / f"{name}.parquet", {})
    assert records.read_all("rounds", tmp_path)["run_id"].tolist() == ["a", "a", "b", "b"]


def test_a_missing_optional_value_is_nan(tmp_path):
    path = records.write("rounds", frame("rounds").assign(metric=[0.1, float("nan")]), tmp_path / "a.parquet", {})
    assert records.read("rounds", path)["metric"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="loss"), "missing column 'loss'"),
        (lambda f: f.assign(extra_s=1.0), "extra column 'extra_s'"),
        (lambda f: f.assign(seed="zero"), "table 'rounds': .*string.*column seed"),
        (lambda f: f.assign(round=0.5), "Float value 0.5.*column round"),
        (lambda f: f.assign(method=1), "Expected a string.*column method"),
        (
            lambda f: f.assign(wall_s=float("nan")),
            "wall_s.* was non-nullable but pandas column had 2 null",
        ),
    ],
)
def test_a_wrong_table_is_refused_by_column_and_nothing_is_written(change, message, tmp_path):
    with pytest.raises(records.TableError, match=message):
        records.write("rounds", change(frame("rounds")), tmp_path / "a.parquet", {})
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_named_at_once():
    with pytest.raises(records.TableError, match="missing column 'loss'; .*missing column 'wall_s'"):
        records.validate("rounds", frame("rounds").drop(columns=["loss", "wall_s"]))


def test_a_failing_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = records.write("rounds", frame("rounds"), tmp_path / "a.parquet", {})
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        records.write("rounds", frame("rounds", 5), path, {})
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.parquet"]


def test_a_file_that_is_no_table_is_named(tmp_path):
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "a.parquet").write_text("not parquet")
    with pytest.raises(records.TableError, match=r"a\.parquet"):
        records.read_all("rounds", tmp_path)
    with pytest.raises(records.TableError, match="no 'rounds' table at"):
        records.read("rounds", tmp_path / "none.parquet")
    with pytest.raises(records.TableError, match="no 'participants' tables in"):
        records.read_all("participants", tmp_path)
    with pytest.raises(records.TableError, match="unknown table 'round'; allowed are rounds, participants"):
        records.read("round", tmp_path)


def test_about_a_run_says_what_made_it():
    about = records.about_run({"seed": 0}, datetime.datetime.now(datetime.UTC), device="cpu")
    assert {"parameters", "versions", "commit", "machine", "start", "end", "device"} <= set(about)
    assert about["versions"]["torch"]
    assert about["start"] <= about["end"]
    json.dumps(about)


@contextmanager
def no_room(num_bytes: int) -> Iterator[None]:
    """No file may become larger: the operating system then fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.parquet", lambda path: records.write("rounds", frame("rounds", 1000), path, {})),
        (
            "a.json",
            lambda path: records.write("rounds", frame("rounds"), path.with_suffix(".parquet"), {"x": "y" * 999}),
        ),
        ("a.safetensors", lambda path: write_tensors(path, {"x": torch.ones(1000)})),
        ("progress/a.jsonl", lambda path: Progress(path.parent.parent, "a").add({"x": "y" * 1000})),
    ],
)
def test_a_full_disk_names_the_file_and_what_was_there_stays(name, write, tmp_path: Path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("before")
    with no_room(500), pytest.raises(OSError, match=f"{path} cannot be written: .*too large"):
        write(path)
    assert path.read_text().startswith("before") and [p.name for p in path.parent.iterdir() if "tmp" in p.name] == []


@pytest.mark.parametrize("content", ["[]", "{", "null", ""])
def test_a_note_beside_a_table_that_is_none_is_named(content, tmp_path):
    path = records.write("rounds", frame("rounds"), tmp_path / "rounds" / "a.parquet", {}).with_suffix(".json")
    path.write_text(content)
    with pytest.raises(records.TableError, match=f"^{path}: "):
        records.unfinished(tmp_path)


def test_a_damaged_table_is_named_in_short(tmp_path):
    path = records.write("rounds", frame("rounds"), tmp_path / "a.parquet", {})
    good = path.read_bytes()
    for at in range(0, len(good), 97):
        path.write_bytes(good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :])
        try:
            records.read("rounds", path)
        except records.TableError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 1000
