"""What section 6's notebook measures: rows of the table, and the runs it compares."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest

from fluxlib import records
from fluxlib.analysis import claims, studies
from fluxlib.analysis.studies import roles
from fluxlib.config import RunConfig


@pytest.fixture(scope="module")
def bench() -> studies.Bench:
    (found,) = studies.benches("mini-llama-moe", ["mini-piqa"], [0], held_out=4)
    return dataclasses.replace(found, parts=[found.parts[0][:4]])


def test_probes_are_measured_against_truth_for_every_setting_and_count(bench: studies.Bench) -> None:
    rows = list(roles.probe_quality([bench], num_experts=3, counts=(1, 2), draws=4))
    frame = studies.measurements(rows, "x")
    records.validate("measurements", frame)
    assert set(frame.loc[frame["study"] == "utility", "setting"]) == {"true", *roles.PROBES}
    distance = frame[(frame["study"] == "probe_cosine_distance") & (frame["x"] > 0)]
    assert len(distance) == 2 * len(roles.PROBES)
    assert distance["value"].between(0, 1).all()
    passes = frame[frame["study"] == "probe_passes"].set_index(["setting", "x"])["value"]
    assert passes["one-sided (paper)", 2] < passes["two-sided", 2]


def test_every_way_to_learn_a_utility_is_timed_per_expert(bench: studies.Bench) -> None:
    frame = pd.DataFrame(roles.probe_seconds([bench], num_experts=2, repeats=1))
    assert len(frame) == 3 and (frame["value"] > 0).all()
    assert set(frame["unit"]) == {"s per expert"}


def test_runs_are_read_under_the_names_they_are_given(tmp_path: Path) -> None:
    defaults = {"string": "", "int64": 0, "float64": 0.0}
    for variant in ("", "random"):
        run_id = RunConfig(variant=variant, model="mini", task="t", seed=1).run_id
        for table in ("rounds", "participants"):
            blank = {c.name: [defaults[c.dtype]] for c in records.columns(table)}
            records.write(table, pd.DataFrame(blank | {"run_id": [run_id]}), tmp_path / table / f"{run_id}.parquet", {})
    rounds, participants = roles.read_runs(tmp_path, "mini", "t", [1], {"FLUX": "", "by chance": "random"})
    assert rounds["setting"].tolist() == participants["setting"].tolist() == ["FLUX", "by chance"]
    assert rounds["run_id"].tolist() == ["flux-mini-t-seed1", "flux-random-mini-t-seed1"]
    with pytest.raises(records.TableError, match="no 'rounds' table"):
        roles.read_runs(tmp_path, "mini", "t", [2], {"FLUX": ""})


def test_the_notebook_compares_each_setting_with_the_first() -> None:
    rows = []
    for seed in range(3):
        more = {"model": "m", "task": "t", "seed": seed}
        for setting, scale in (("one-sided (paper)", 1.0), ("two-sided, guided", 0.5)):
            rows.append(studies.row("probe_cosine_distance", setting, scale * 0.3, x=1, **more))
        rows.append(studies.row("probe_share", "device clock", 0.04, **more))
        runs = (("FLUX", 0.6), ("other", 0.5))
        outcome = pd.DataFrame([{"setting": s, "seed": seed} | dict.fromkeys(roles.OUTCOMES, v) for s, v in runs])
        rows += roles.outcome_rows(outcome, "assignment", "m", "t")
    found = claims.in_notebook("03_role_assignment", studies.measurements(rows, "x"), "m").splitlines()
    told = {line.split(":")[0].removeprefix("- "): line for line in found}
    assert "paper 0.29, ours **0.3**: *does not*" in told["utilities from one forward-only probe"]
    assert "ours **0.15**: *agrees*" in told["the same with a guided probe in both directions (ours)"]
    assert "ours **4 %**: *agrees*" in told["share of a round that probes take"]
    assert "**against other: 0.833×**: *does not*" in told["FLUX's assignment reaches the target before others"]
