"""The smoke profile through the same path as `make reproduce`: every notebook, tiny counts, a folder of its own."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest

from fluxlib import records
from fluxlib.app import pipeline
from fluxlib.config import REPO_ROOT

pytestmark = pytest.mark.smoke

PROFILE = pipeline.load(REPO_ROOT / "config" / "smoke.yaml")
STUDIES = ast.literal_eval(re.search(r"^STUDIES = (\{.*?^\})", (REPO_ROOT / "Snakefile").read_text(), re.S | re.M)[1])


def make(folder) -> str:
    """Run the smoke profile with ``folder`` as working directory; gives what was said."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPO_ROOT / "Snakefile")]
    command += ["--directory", str(folder), "--cores", "2", "--rerun-triggers", "mtime", "params", "input"]
    command += ["--quiet", "host", "--show-failed-logs", "--config", "profile=smoke"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment.pop("MPLBACKEND", None)  # kernels draw into the notebook
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    make(folder)
    return folder


def test_every_run_of_the_profile_left_valid_tables(smoke):
    results = smoke / "data" / "results" / "smoke"
    rounds = records.read_all("rounds", results)
    participants = records.read_all("participants", results)
    assert set(rounds["run_id"]) == set(participants["run_id"]) == set(PROFILE.runs)
    for run_id, run in PROFILE.runs.items():
        rows = rounds[rounds["run_id"] == run_id]
        assert rows["round"].tolist() == list(range(run.federation.rounds + 1))
        assert rows["device_s"].is_monotonic_increasing and rows["wall_s"].is_monotonic_increasing
        assert (rows["num_rejected"] == 0).all()
        assert (
            len(participants[participants["run_id"] == run_id]) == run.federation.rounds * run.federation.participants
        )


def test_flux_sends_and_tunes_less_than_the_full_model(smoke):
    rounds = records.read_all("rounds", smoke / "data" / "results" / "smoke")
    uplink = rounds[rounds["round"] > 0].groupby(["model", "method"])["uplink_bytes"].mean().unstack()
    assert (uplink["flux"] < 0.5 * uplink["fmd"]).all()


def test_every_figure_is_there_with_its_numbers(smoke):
    folder = smoke / "figures" / "smoke"
    stems = {path.stem for path in folder.iterdir()}
    slugs = ["convergence", "time_to_accuracy", *(slug for study in PROFILE.studies for slug in STUDIES[study])]
    assert stems == {f"{slug}-{model}" for slug in slugs for model in PROFILE.models} | {
        "claims",
        "speed_up",
        "race_measured-mini-llama-moe",
    }
    assert "claims: " in (folder / "claims.md").read_text()
    for stem in stems:
        assert (folder / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
        assert (folder / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert len(pd.read_csv(folder / f"{stem}.csv"))


def test_the_executed_notebooks_show_no_error_and_no_bare_widget(smoke):
    executed = sorted((smoke / "build" / "smoke" / "notebooks").glob("*.ipynb"))
    assert len(executed) == 5 + len(PROFILE.runs) + len(PROFILE.studies) * len(PROFILE.models)
    for path in executed:
        text = path.read_text()
        assert '"output_type": "error"' not in text, path.name
        assert not re.search(r"[HV]Box\(children", text), path.name


def test_what_you_try_shows_something_at_once(smoke):
    for path in sorted((smoke / "build" / "smoke" / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if "try-it" in cell["metadata"]["tags"]:
                shown = {kind for output in cell["outputs"] for kind in output.get("data", ())}
                assert shown & {"image/png", "text/html"}, path.name
                assert cell["metadata"]["papermill"]["duration"] < 6, "two seconds where nothing runs beside it"


def test_a_second_call_does_no_work(smoke):
    assert "Nothing to be done" in make(smoke)
