"""Figures of sections 4 and 5 from tables by hand: what is drawn is what the table says."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from fluxlib import records
from fluxlib.analysis import studies
from fluxlib.analysis.studies.profiling import SAMPLES
from fluxlib.figures import Picture, merging, picture, profiling

PROFILING = ("activation_by_layer", "profile_error", "sample_size", "drift", "round_saving")
MERGING = (
    "discarding", "error_growth", "attention_frequency", "layer_budgets", "clustering_time", "merge_options",
    "own_share",
)  # fmt: skip
ERRORS = ("discarded", "single", "uniform", "adaptive", "joint", *merging.OPTIONS)


def rows(seed: int) -> list[studies.bench.Row]:
    """One value of everything, larger for later seeds."""
    chance = np.random.default_rng(seed)
    value = 0.1 * (1 + seed)

    def one(study: str, setting: str, of: float = value, **more: object) -> studies.bench.Row:
        return studies.row(study, setting, of, model="mini", task="mini-mmlu", seed=seed, **more)  # type: ignore[arg-type]

    found = [one("error", setting) for setting in ERRORS]
    found += [one("divergence", s) for s in ("discarded", "single", "uniform", "adaptive", "joint + squared gate")]
    for layer, expert in itertools.product(range(3), range(4)):
        found += [one(s, "16 bit", chance.random(), layer=layer, expert=expert) for s in ("activation", "attention")]
    for kind, layer in itertools.product(("single", "uniform", "adaptive", "joint"), range(3)):
        found.append(one("budgets", kind, layer + 1, layer=layer))
    for merged, layer in itertools.product(range(3), range(3)):
        found += [one("growth", "one layer merged", x=merged, layer=layer)] if layer >= merged else []
    found += [one("accumulated", s, layer=layer) for s in ("merged", "discarded") for layer in range(3)]
    for measure, x in itertools.product(("frequency error", "rank correlation", "top overlap"), (2, 4)):
        found.append(one("profile_error", measure, x=x))
    found += [one("sample_size", s, x=x) for s in ("4 bit", "16 bit", "estimated") for x in (8, 16)]
    for setting, x in itertools.product(("a quarter tuned", "all tuned"), (1, 2)):
        found.append(one("drift", setting, x=x))
        for study, age in itertools.product(("profile_age", "age_overlap"), ("fresh", "stale")):
            found.append(one(study, f"{age}, {setting}", x=x))
    found += [one("round_saving", link, x=x) for link in ("1 Gb/s", "LTE") for x in SAMPLES]
    for shape, (method, seconds) in itertools.product(
        ("32 x 16 experts", "27 x 64 experts"), {"per layer": 0.05, "fused": 0.001}.items()
    ):
        found.append(one("clustering_seconds", f"{shape}, {method}", seconds, x=0, unit="s"))
    for phase, seconds in {"download": 1.0, "merge": 0.5, "train": 2.0, "profile": 0.5}.items():
        found.append(one("phase_device_s", f"1 Gb/s: {phase}", seconds, x=64, unit="s"))
        found.append(one("phase_wall_s", phase, seconds, x=0, unit="s"))
    return found


@pytest.fixture
def table() -> pd.DataFrame:
    found = studies.measurements([row for seed in range(3) for row in rows(seed)], "test")
    records.validate("measurements", found)
    return found


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("name", [*PROFILING, *MERGING])
def test_every_figure_draws_and_names_model_and_seeds(table: pd.DataFrame, name: str, num_seeds: int) -> None:
    draw = getattr(profiling if name in PROFILING else merging, name)
    before = table.copy()
    figure = draw(table[table["seed"] < num_seeds])
    small = figure.get_supxlabel()
    assert "mini" in small or name == "clustering_time"
    assert "seed" in small or name == "round_saving"
    if num_seeds == 3:
        assert figure._repr_png_().startswith(b"\x89PNG")
    assert table.equals(before)


def test_bars_are_means_over_seeds(table: pd.DataFrame) -> None:
    heights = [patch.get_height() for patch in profiling.profile_error(table).axes[0].patches]
    assert heights == pytest.approx([0.2, 0.2])
    assert "50 times" in [text.get_text() for text in merging.clustering_time(table).axes[0].texts]


def test_own_share_is_written_beside_each_bar(table: pd.DataFrame) -> None:
    texts = [text.get_text() for text in merging.own_share(table).axes[0].texts]
    assert texts.count("FLUX's own 25.0 %") == 2


def test_a_study_that_was_not_made_is_named(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="hold no study 'growth'; there are error"):
        picture.study(table[table["study"] == "error"], "growth")
    assert Picture is type(profiling.drift(table))
