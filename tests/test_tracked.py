"""The tracked results are those of the configuration beside them."""

from __future__ import annotations

import pytest

from fluxlib import records
from fluxlib.analysis import store
from fluxlib.app import pipeline
from fluxlib.config import REPO_ROOT, make_config

TRACKED = ("full", "tune")


@pytest.mark.parametrize("name", TRACKED)
def test_every_run_of_a_profile_is_stored_with_the_parameters_that_it_has_today(name: str) -> None:
    """A run made before its profile changed would be drawn beside runs that it cannot be compared with."""
    folder = REPO_ROOT / "data" / "results" / name
    runs = pipeline.load(REPO_ROOT / "config" / f"{name}.yaml").runs
    stored = {file.stem: store.parameters(file) for file in (folder / "rounds").glob("*.parquet")}
    assert set(stored) == set(runs)
    for run, known in stored.items():
        had, wanted = make_config(known), runs[run]
        assert had.numbers == wanted.numbers, f"{run}: stored {had.settings(True)}, wanted {wanted.settings(True)}"


@pytest.mark.parametrize("name", TRACKED)
def test_no_stored_run_is_unfinished(name: str) -> None:
    assert not records.unfinished(REPO_ROOT / "data" / "results" / name)


@pytest.mark.parametrize("name", TRACKED)
def test_every_stored_run_has_its_participants(name: str) -> None:
    rounds, participants = (
        {path.name for path in (REPO_ROOT / "data" / "results" / name / table).glob("*.parquet")}
        for table in ("rounds", "participants")
    )
    assert rounds and rounds == participants
