"""Tables and pictures of section 6, from tables small enough to check by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from fluxlib import records
from fluxlib.analysis.runs import phase_shares
from fluxlib.figures import roles, style

DEFAULTS = {"string": "", "int64": 0, "float64": 0.0}


def table(name: str, rows: list[dict[str, object]]) -> pd.DataFrame:
    blank = {c.name: DEFAULTS[c.dtype] for c in records.columns(name)}
    return pd.DataFrame([blank | row for row in rows])


@pytest.fixture
def participants() -> pd.DataFrame:
    """Two settings of one seed, two rounds, two participants; one layer of four experts."""
    told = {
        ("FLUX", 1): [("0.0", "0.1"), ("0.0", "0.2")],
        ("FLUX", 2): [("0.0", "0.3"), ("0.1", "0.0")],
        ("random", 1): [("0.0", ""), ("0.1", "")],
        ("random", 2): [("0.2", ""), ("0.3", "")],
    }
    rows: list[dict[str, object]] = []
    for (setting, number), both in told.items():
        for p, (exploited, explored) in enumerate(both):
            row = {"setting": setting, "seed": 0, "round": number, "participant": p, "exploited": exploited,
                   "explored": explored, "train_device_s": 3.0, "probe_device_s": 1.0, "train_wall_s": 0.5}  # fmt: skip
            rows.append(row)
    return table("participants", rows)


@pytest.fixture
def rounds() -> pd.DataFrame:
    scores = {"FLUX": [0.2, 0.6, 1.0], "random": [0.2, 0.4, 0.5]}
    return table(
        "rounds",
        [
            {"setting": s, "seed": 0, "round": i, "metric": m, "loss": 1 - m, "device_s": 10.0 * i,
             "run_id": s, "num_experts": 4,
             "model": "mini", "task": "t", "metric_name": "accuracy", "clock_model": "self", "link": "1gbps"}
            for s, metrics in scores.items() for i, m in enumerate(metrics)
        ],
    )  # fmt: skip


def test_roles_come_one_row_per_expert(participants: pd.DataFrame) -> None:
    found = roles.roles_table(participants)
    assert found["role"].value_counts().to_dict() == {"exploited": 8, "explored": 4}
    flux = found.query("setting == 'FLUX' and round == 2 and participant == 1").set_index("role")["expert"]
    assert flux.to_dict() == {"exploited": 1, "explored": 0}


def test_coverage_and_load_by_hand(participants: pd.DataFrame) -> None:
    found = roles.roles_table(participants)
    covered = roles.coverage(found, 4).set_index(["setting", "round"])["covered_frac"]
    assert covered.to_dict() == {("FLUX", 1): 0.25, ("FLUX", 2): 0.5, ("random", 1): 0.5, ("random", 2): 1.0}
    loads = roles.load(found, 4).groupby("setting")["share"].apply(list)
    assert loads["FLUX"] == [0.75, 0.25, 0.0, 0.0]
    assert loads["random"] == [0.25] * 4


def test_outcomes_of_runs(rounds: pd.DataFrame, participants: pd.DataFrame) -> None:
    found = roles.outcomes(rounds, participants, "FLUX", fraction=1.0).set_index("setting")
    assert found.loc["FLUX", ["target", "round_to_target", "device_s_to_target"]].tolist() == [0.6, 1.0, 10.0]
    assert math.isnan(found.loc["random", "device_s_to_target"])
    assert found["covered_frac"].tolist() == [0.5, 1.0]
    assert found["load_cv"].tolist() == pytest.approx([math.sqrt(0.375 / 4) / 0.25, 0.0])


def test_shares_of_a_round_add_up(participants: pd.DataFrame) -> None:
    shares = phase_shares(participants).set_index(["clock", "phase"])["share"]
    assert shares["device", "probe"] == 0.25
    assert shares["wall", "train"] == 1.0
    assert shares.groupby("clock").sum().tolist() == pytest.approx([1.0, 1.0])


def test_pictures_of_runs_name_settings_clock_and_seeds(rounds: pd.DataFrame, participants: pd.DataFrame) -> None:
    found = roles.roles_table(participants)
    curves = roles.role_convergence(rounds)
    assert [text.get_text() for text in curves.axes[2].get_legend().get_texts()] == ["FLUX", "random"]
    assert "1gbps" in curves.get_supxlabel() and "1 seed" in curves.get_supxlabel()
    bars = roles.role_ablation(roles.outcomes(rounds, participants, "FLUX"))
    assert any("not reached: 1/1" in text.get_text() for text in bars.axes[2].texts)
    assert "95 % of FLUX" in bars.get_supxlabel()
    assert roles.role_coverage(found, rounds).axes[0].get_ylabel() == "experts tuned so far (%)"


def test_the_map_has_a_panel_per_participant_and_a_level_per_role(participants: pd.DataFrame) -> None:
    found = roles.roles_table(participants)
    picture = roles.role_map(found[found["setting"] == "FLUX"], 4)
    grid = picture.axes[1].collections[0].get_array()
    assert grid.tolist() == [[2, 1], [0, 2], [1, 0], [0, 0]]


def test_settings_are_told_apart_without_colour() -> None:
    for part in ("color", "marker", "dashes", "hatch"):
        assert len({getattr(look, part) for look in style.SETTINGS}) == len(style.SETTINGS)


@pytest.fixture
def measured() -> pd.DataFrame:
    rows: list[dict[str, object]] = []
    for setting in ("true", "one-sided (paper)", "two-sided"):
        rows += [{"study": "utility", "setting": setting, "layer": 0, "expert": e, "value": 1.0 + e} for e in range(3)]
    for setting in ("one-sided (paper)", "two-sided"):
        for count in (1, 2):
            values = {"cosine_distance": 0.1, "rank_correlation": 0.9, "bias": 0.0, "bias_error": 0.1, "spread": 1.0}
            rows += [{"study": f"probe_{n}", "setting": setting, "x": count, "value": v} for n, v in values.items()]
            rows.append({"study": "probe_passes", "setting": setting, "x": count, "value": 0.5 * count})
    rows.append({"study": "probe_rank_correlation", "setting": "frequency alone", "x": 0, "value": 0.5})
    rows += [{"study": "probe_seconds", "setting": s, "x": 0, "value": 0.01} for s in ("one probe per pass", "other")]
    return table("measurements", [{"model": "mini", "task": "t", "seed": 0} | row for row in rows])


def test_pictures_of_probes(measured: pd.DataFrame, participants: pd.DataFrame) -> None:
    assert [ax.get_title() for ax in roles.role_utilities(measured).axes] == ["one-sided (paper)", "two-sided"]
    picture = roles.role_probes(measured)
    assert {text.get_text() for text in picture.axes[0].texts} == {"paper: 0.29", "to reach: 0.20"}
    assert {text.get_text() for text in picture.axes[1].texts} == {"frequency alone, no pass: 0.50"}
    seconds = roles.role_seconds(measured, participants)
    assert any("probe 25.0 %" in text.get_text() for text in seconds.axes[1].texts)
