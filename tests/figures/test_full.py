"""The tracked figures of the full profile show the tracked tables, and can be drawn from them again."""

from __future__ import annotations

import pandas as pd
import pytest

from fluxlib import records
from fluxlib.config import REPO_ROOT
from fluxlib.figures import merging, picture, profiling

TABLES = REPO_ROOT / "data" / "results" / "full" / "measurements"
FIGURES = REPO_ROOT / "figures" / "full"
SHOWN = {
    "01_profiling": (profiling, ("activation_by_layer", "profile_error", "sample_size", "drift", "round_saving")),
    "02_merging": (
        merging,
        ("discarding", "error_growth", "attention_frequency", "layer_budgets", "clustering_time", "merge_options")
        + ("own_share",),
    ),
}
CASES = [
    (module, figure, path)
    for stem, (module, figures) in SHOWN.items()
    for path in sorted(TABLES.glob(f"{stem}-*.parquet"))
    for figure in figures
]


@pytest.mark.parametrize(("module", "figure", "path"), CASES, ids=lambda value: getattr(value, "stem", str(value))[:30])
def test_a_tracked_figure_is_that_of_its_table(module, figure, path):
    table = records.read("measurements", path)
    model = path.stem.split("-", 1)[1]
    assert getattr(module, figure)(table).axes
    numbers = pd.read_csv(FIGURES / f"{figure}-{model}.csv")
    for name in numbers["study"].unique():
        own, theirs = numbers[numbers["study"] == name], picture.study(table, name)
        assert own["value"].to_numpy() == pytest.approx(theirs["value"].to_numpy()), name
    assert all((FIGURES / f"{figure}-{model}.{kind}").stat().st_size > 0 for kind in ("pdf", "png"))
