"""The pipeline: what is refused before any work, and what Snakemake re-runs, on notebooks that do next to nothing."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import steps
import yaml

from fluxlib.app import pipeline
from fluxlib.config import REPO_ROOT
from fluxlib.io import ConfigError, check_writable

PROFILE = {
    "profile": "mini",
    "grid": {"methods": ["flux", "fmd"], "models": ["mini-llama-moe"], "tasks": ["mmlu"], "seeds": [0]},
    "run": {"federation.rounds": 3, "training.learning_rate": 1e-3},
    "per_method": {"flux": {"training.learning_rate": 2e-3}},
}
RUN_CODE = """\
from pathlib import Path
name = f"{method}-{model}-{task}-seed{seed}"
assert settings.get("training.local_steps") != 13, "unlucky"
for table in ("rounds", "participants"):
    path = Path(out) / table / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".parquet").write_text(f"{rounds} {settings}")
    path.with_suffix(".json").write_text("{}")
"""
DRAW_CODE = """\
from pathlib import Path
for figure in ("convergence", "time_to_accuracy"):
    for kind in ("pdf", "png", "csv"):
        Path(figures_folder).mkdir(parents=True, exist_ok=True)
        (Path(figures_folder) / f"{figure}-mini-llama-moe.{kind}").write_text(figure)
"""
REPORT_CODE = """\
from pathlib import Path
for name in ("claims.md", *(f"{slug}.{kind}" for slug in ("claims", "speed_up") for kind in ("pdf", "png", "csv"))):
    (Path(figures_folder) / name).write_text(name)
"""


def notebook(path: Path, parameters: str, *code: str) -> Path:
    sources = [(parameters, ["parameters"]), *((text, []) for text in code)]
    empty = {"cell_type": "code", "outputs": [], "execution_count": None}
    cells = [
        empty | {"id": f"c{i}", "metadata": {"tags": tags}, "source": text} for i, (text, tags) in enumerate(sources)
    ]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def profile(path: Path, **changes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(PROFILE | changes))
    return path


def test_a_profile_is_a_grid_with_later_sections_winning(tmp_path):
    more = {
        "per_task": {"mmlu": {"federation.rounds": 5}},
        "per_model": {"mini-llama-moe": {"federation.rounds": 4, "federation.participants": 7}},
    }
    found = pipeline.load(profile(tmp_path / "mini.yaml", **more))
    assert list(found.runs) == ["flux-mini-llama-moe-mmlu-seed0", "fmd-mini-llama-moe-mmlu-seed0"]
    flux, fmd = found.runs.values()
    assert (flux.training.learning_rate, fmd.training.learning_rate) == (2e-3, 1e-3)
    assert (flux.federation.rounds, flux.federation.participants) == (5, 7)
    assert found.models == {"mini-llama-moe": "mini-llama-moe"}


def test_an_overlay_wins_where_it_says_something(tmp_path, monkeypatch):
    (tmp_path / "my" / "model").mkdir(parents=True)
    above = tmp_path / "mine.yaml"
    above.write_text("grid: {models: [my/model]}\nper_method: {flux: {training.batch_size: 3}}")
    monkeypatch.chdir(tmp_path)
    found = pipeline.load(profile(tmp_path / "mini.yaml"), above)
    assert found.models == {"model": str(tmp_path / "my" / "model")}  # notebooks are executed in another folder
    flux = found.runs["flux-model-mmlu-seed0"]
    assert (flux.training.learning_rate, flux.training.batch_size, flux.federation.rounds) == (2e-3, 3, 3)
    above.write_text("grids: {}")
    with pytest.raises(ConfigError, match="mini.yaml under .*mine.yaml: unknown section 'grids'"):
        pipeline.load(tmp_path / "mini.yaml", above)


def test_a_variant_is_part_of_the_grid_with_something_changed(tmp_path):
    variants = {"slow": {"methods": ["flux"], "run": {"training.learning_rate": 1e-5}}}
    found = pipeline.load(profile(tmp_path / "mini.yaml", variants=variants))
    assert list(found.runs) == [
        "flux-mini-llama-moe-mmlu-seed0",
        "fmd-mini-llama-moe-mmlu-seed0",
        "flux-slow-mini-llama-moe-mmlu-seed0",
    ]
    slow = found.runs["flux-slow-mini-llama-moe-mmlu-seed0"]
    assert (slow.variant, slow.training.learning_rate, slow.federation.rounds) == ("slow", 1e-5, 3)


def test_a_variant_may_have_parts(tmp_path):
    parts = [
        {"methods": ["flux"], "run": {"federation.rounds": 7}},
        {"methods": ["fmd"], "run": {"federation.rounds": 5}},
    ]
    found = pipeline.load(profile(tmp_path / "mini.yaml", variants={"slow": parts})).runs
    assert {run.method: run.federation.rounds for run in found.values() if run.variant == "slow"} == {
        "flux": 7,
        "fmd": 5,
    }


def test_a_study_reads_the_runs_of_the_variants_it_names(tmp_path):
    grid = PROFILE["grid"] | {"models": ["mini-llama-moe", "folder/n"]}
    variants = {"slow": {"methods": ["flux"], "models": ["mini-llama-moe"], "run": {"training.learning_rate": 1e-5}}}
    found = pipeline.load(profile(tmp_path / "mini.yaml", grid=grid, variants=variants))
    plain = ["flux-n-mmlu-seed0", "fmd-n-mmlu-seed0"]
    assert pipeline.runs_read(found, "n", [""]) == pipeline.runs_read(found, "n", ["", "slow"]) == plain
    assert pipeline.runs_read(found, "mini-llama-moe", ["slow"]) == ["flux-slow-mini-llama-moe-mmlu-seed0"]
    assert pipeline.runs_read(found, "mini-llama-moe", []) == []
    with pytest.raises(ConfigError, match=r"has the variants \['fast'\]; it has \['', 'slow'\]"):
        pipeline.runs_read(found, "mini-llama-moe", ["slow", "fast"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": {}}, "unknown section 'runs'; allowed are profile, grid, run"),
        ({"grid": {"method": []}}, "unknown section 'grid.method'; allowed are methods, models, tasks, seeds"),
        ({"grid": None}, "mini.yaml: grid: Input should be a valid .*, got None"),
        ({"run": 3}, "mini.yaml: run: Input should be a valid dictionary, got 3"),
        ({"per_method": {"flux": 3}}, "per_method.flux: Input should be a valid dictionary, got 3"),
        ({"per_task": {"mmlo": {"federation.rounds": 5}}}, "per_task names mmlo; the runs have mmlu"),
        ({"run": {"round": 3}}, "unknown parameter 'round'; did you mean federation.rounds"),
        ({"run": {"federation.rounds": 0}}, "rounds: .* got 0"),
        ({"variants": {"a": {"method": []}}}, "unknown section 'variants.a.0.method'; allowed are methods, .*run"),
        ({"variants": {"A b": {}}}, "variant: .* got 'A b'"),
    ],
)
def test_a_wrong_profile_is_refused_by_name(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        pipeline.load(profile(tmp_path / "mini.yaml", **change))


def test_an_unknown_profile_lists_the_known_ones(tmp_path):
    profile(tmp_path / "mini.yaml")
    with pytest.raises(ConfigError, match="no profile 'maxi' in .*; allowed are mini"):
        pipeline.load(tmp_path / "maxi.yaml")


def test_what_a_notebook_declares_is_passed_by_name_the_rest_in_settings(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "method = 'fmd'  # which\nrounds: int = 1\nsettings = {}")
    run = pipeline.load(profile(tmp_path / "mini.yaml")).runs["flux-mini-llama-moe-mmlu-seed0"]
    assert pipeline.declared_parameters(path) == {"method": "fmd", "rounds": 1, "settings": {}}
    assert steps.notebook_parameters(path, run) == {
        "method": "flux",
        "rounds": 3,
        "settings": {"task": "mmlu", "training.learning_rate": 2e-3},
    }


@pytest.mark.parametrize("code", ["import os", "a = os.getcwd()", "a, b = 1, 2"])
def test_the_parameters_cell_holds_literals_only(code, tmp_path):
    with pytest.raises(ConfigError, match=r"a\.ipynb"):
        pipeline.declared_parameters(notebook(tmp_path / "a.ipynb", code))


def test_an_unknown_notebook_parameter_is_refused_before_any_work(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "rounds = 1", "open('ran', 'w')")
    with pytest.raises(ConfigError, match=r"a\.ipynb has no parameter 'round'; allowed are rounds"):
        pipeline.execute(path, tmp_path / "out.ipynb", {"round": 3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ipynb"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to the output folder .*file/sub: Not a directory"):
        check_writable(tmp_path / "file" / "sub")
    assert check_writable(tmp_path / "new" / "folder").is_dir()


def test_prose_does_not_make_a_run_stale_and_code_does(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "rounds = 1", "print(rounds)")
    before = steps.notebook_digest(path)
    content = json.loads(path.read_text())
    content["cells"].append({"cell_type": "markdown", "id": "x", "metadata": {}, "source": ["more"]})
    path.write_text(json.dumps(content))
    assert steps.notebook_digest(path) == before
    assert steps.notebook_digest(notebook(path, "rounds = 1", "print(2)")) != before


class Repository:
    """A repository of its own: the project's Snakefile, a profile of two runs, notebooks that do next to nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copy(REPO_ROOT / "Snakefile", root)
        shutil.copytree(REPO_ROOT / "workflow", root / "workflow")
        names = "method='flux'\nmodel='mini-llama-moe'\ntask='mmlu'\nseed=0\nrounds=1\nsettings={}\nout=''"
        for plain in ("00_start_here", "09_from_scratch", "explore"):
            notebook(root / "notebooks" / f"{plain}.ipynb", "seed = 0")
        notebook(root / "notebooks" / "04_federated_run.ipynb", names, RUN_CODE)
        notebook(
            root / "notebooks" / "05_time_to_accuracy.ipynb", "profile=''\nresults=''\nfigures_folder=''", DRAW_CODE
        )
        notebook(root / "notebooks" / "08_report.ipynb", "profile=''\nresults=''\nfigures_folder=''", REPORT_CODE)
        self.configure()

    def configure(self, **changes) -> None:
        profile(self.root / "config" / "mini.yaml", **changes)

    def made(self) -> dict[str, float]:
        """Modification times of the results by name."""
        files = [*self.root.glob("data/results/mini/rounds/*.parquet"), *self.root.glob("figures/mini/*.pdf")]
        return {path.name: path.stat().st_mtime for path in files}

    def make(self, *more: str, **settings: str) -> tuple[int, dict[str, float], str]:
        """Exit code, what was made, and what was said."""
        command = [sys.executable, "-m", "snakemake", "--cores", "2", "--keep-going", "--rerun-incomplete"]
        command += ["--rerun-triggers", "mtime", "params", "input", "--quiet", "rules", "host", "reason", *more]
        command += ["--config", "profile=mini", *(f"{name}={value}" for name, value in settings.items())]
        environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
        result = subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        return result.returncode, self.made(), result.stdout + result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Repository:
    """A pipeline that ran once from nothing."""
    repository = Repository(tmp_path_factory.mktemp("repository"))
    code, files, said = repository.make()
    assert code == 0, said
    assert "7 of 7 steps in" in said and "; drew claims, speed_up" in said and "Finished jobid" not in said
    assert sorted(files) == [
        "claims.pdf",
        "convergence-mini-llama-moe.pdf",
        "flux-mini-llama-moe-mmlu-seed0.parquet",
        "fmd-mini-llama-moe-mmlu-seed0.parquet",
        "speed_up.pdf",
        "time_to_accuracy-mini-llama-moe.pdf",
    ]
    assert (repository.root / "build/mini/notebooks/04_federated_run-flux-mini-llama-moe-mmlu-seed0.ipynb").is_file()
    assert (repository.root / "build/mini/benchmarks/04_federated_run/flux-mini-llama-moe-mmlu-seed0.tsv").is_file()
    return repository


def test_a_second_run_does_no_work(finished):
    before = finished.made()
    code, after, said = finished.make()
    assert (code, after) == (0, before)
    assert "Nothing to be done" in said


def test_a_lost_table_is_made_again(finished):
    before = finished.made()
    (finished.root / "data/results/mini/rounds/fmd-mini-llama-moe-mmlu-seed0.parquet").unlink()
    code, after, said = finished.make()
    assert code == 0 and set(after) == set(before), said
    assert after["flux-mini-llama-moe-mmlu-seed0.parquet"] == before["flux-mini-llama-moe-mmlu-seed0.parquet"]


def test_a_changed_parameter_runs_that_run_and_the_figures_again(finished):
    before = finished.made()
    finished.configure(per_method={"flux": {"training.learning_rate": 5e-3}})
    code, after, said = finished.make()
    assert code == 0, said
    changed = {name for name in after if after[name] != before[name]}
    drawn = {"claims.pdf", "convergence-mini-llama-moe.pdf", "speed_up.pdf", "time_to_accuracy-mini-llama-moe.pdf"}
    assert changed == drawn | {"flux-mini-llama-moe-mmlu-seed0.parquet"}


def test_a_figure_of_the_paper_needs_its_own_runs_only(tmp_path):
    repository = Repository(tmp_path)
    repository.configure(variants={"slow": {"methods": ["flux"], "run": {"training.learning_rate": 1e-5}}})
    code, _, said = repository.make("--dry-run", "figure", figure="10")
    assert code == 0, said
    counts = dict(re.findall(r"^(\w+) +(\d+)$", said, re.M))
    assert counts == {"federated_run": "2", "figure": "1", "time_to_accuracy": "1", "total": "4"}
    code, _, said = repository.make("--dry-run", "figure", figure="21")
    assert (
        code != 0 and "FIG is '21', allowed are 10, 11, table2 (the paper's), convergence, time_to_accuracy, " in said
    )


def test_a_failed_run_stops_no_other_and_leaves_nothing_that_looks_done(tmp_path):
    repository = Repository(tmp_path)
    repository.configure(per_method={"flux": {"training.local_steps": 13}})
    code, files, said = repository.make("--until", "federated_run")
    assert code != 0 and "FAILED after" in said and "2 of 2 steps in" in said and ", 1 failed\n" in said
    assert list(files) == ["fmd-mini-llama-moe-mmlu-seed0.parquet"]
    log = (tmp_path / "build/mini/logs/04_federated_run/flux-mini-llama-moe-mmlu-seed0.log").read_text()
    assert "AssertionError: unlucky" in log
    assert (tmp_path / "build/mini/notebooks/04_federated_run-flux-mini-llama-moe-mmlu-seed0.ipynb").is_file()


def test_results_that_cannot_be_written_are_refused_first(tmp_path):
    repository = Repository(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "results").write_text("a file, where a folder should be")
    code, files, said = repository.make()
    assert code != 0 and not files
    assert "error: cannot write to the output folder data/results/mini" in said


def test_two_at_once_are_refused_and_a_killed_one_is_in_nobodys_way(finished):
    assert "--nolock" in (REPO_ROOT / "Makefile").read_text()
    with (finished.root / "build" / "mini" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, said = finished.make("--nolock")
        assert code != 0 and "error: another process is making build/mini" in said
    assert finished.make("--nolock")[0] == 0  # whoever held it is gone


def test_tables_of_other_runs_are_not_drawn_by_accident(tmp_path):
    repository = Repository(tmp_path)
    stray = tmp_path / "data" / "results" / "mini" / "rounds" / "old-mini-llama-moe-mmlu-seed0.parquet"
    stray.parent.mkdir(parents=True)
    stray.write_text("")
    code, _, said = repository.make()
    assert code != 0
    assert "old-mini-llama-moe-mmlu-seed0; move them away" in said
