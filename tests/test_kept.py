"""A notebook's tables and pictures, kept where its parameters say."""

from __future__ import annotations

import json

from fluxlib import figures
from fluxlib.analysis import studies
from fluxlib.app import pipeline
from fluxlib.app.kept import PLACES, keep
from fluxlib.config import REPO_ROOT


def parameters(stem: str, folder) -> dict:
    """As the notebook stands, with everything written in ``folder``."""
    declared = pipeline.declared_parameters(REPO_ROOT / "notebooks" / f"{stem}.ipynb")
    return declared | {"results": str(folder / "results"), "figures_folder": str(folder / "figures")}


def test_a_study_keeps_a_table_with_its_parameters_and_pictures_with_their_numbers(tmp_path):
    kept = keep("07_real_models", parameters("07_real_models", tmp_path) | {"seeds": [3], "another": "name"})
    table = kept.table([studies.row("s", "", 0.5, model=kept.name, task="t")])
    kept.write(table)
    picture = figures.picture.notice("nothing", table)
    assert kept.picture("real_links", picture) is picture
    stem, shown = "07_real_models-mini-llama-moe", "real_links-mini-llama-moe"
    written = {path.name for path in tmp_path.rglob("*.*")}
    assert written == {f"{stem}.parquet", f"{stem}.json", *(f"{shown}.{kind}" for kind in ("pdf", "png", "csv"))}
    about = json.loads((tmp_path / "results" / "measurements" / f"{stem}.json").read_text())["parameters"]
    assert about["seeds"] == [3] and "another" not in about and not about.keys() & set(PLACES)
    assert kept.verdicts(table).data.startswith("On `mini-llama-moe`, t:")


def test_a_notebook_that_reads_all_models_makes_no_folder_of_results(tmp_path):
    kept = keep("05_time_to_accuracy", parameters("05_time_to_accuracy", tmp_path))
    kept.picture("convergence-a", figures.picture.notice("nothing", kept.table([studies.row("s", "", 1.0, model="m")])))
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]
    assert (tmp_path / "figures" / "convergence-a.png").is_file()
