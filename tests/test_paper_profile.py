"""The `paper` profile's path on a small scale: public checkpoint formats, files in the public schemas, all methods."""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
import pytest
import tiny
import yaml

from fluxlib import federation, methods, models
from fluxlib.app import pipeline
from fluxlib.config import REPO_ROOT, RunConfig
from fluxlib.figures.picture import unique

PAPER, OVERLAY = REPO_ROOT / "config" / "paper.yaml", REPO_ROOT / "config" / "overlays" / "tiny.yaml"
METRICS = {"dolly": "rouge_l", "gsm8k": "exact_match", "mmlu": "accuracy", "piqa": "accuracy"}
COUNTS = {
    "federation.rounds", "federation.participants", "training.local_steps", "training.batch_size",
    "training.micro_batch", "training.max_tokens", "evaluation.samples", "profiling.batches",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    tiny.main(made)
    return made


@pytest.fixture
def runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, RunConfig]:
    monkeypatch.chdir(folder)
    return pipeline.load(PAPER, OVERLAY).runs


def test_the_paper_profile_is_the_papers_experiment_and_flux_plus() -> None:
    profile = pipeline.load(PAPER)
    assert {run.method for run in profile.runs.values()} == set(methods.METHODS)
    assert [name.rpartition("/")[2] for name in profile.models.values()] == list(tiny.MODELS)
    assert {run.task for run in profile.runs.values()} == set(METRICS)
    one = next(iter(profile.runs.values()))
    assert (one.training.learning_rate, one.training.batch_size, one.profiling.bits, one.federation.participants) == (
        1e-5,
        16,
        4,
        10,
    )
    assert {models.config(name).model_type for name in profile.models.values()} == {"llama_moe", "deepseek"}


def test_the_rehearsal_differs_in_paths_and_counts_alone(runs: dict[str, RunConfig]) -> None:
    wanted = pipeline.load(PAPER).runs
    assert list(runs) == list(wanted)
    for name, run in runs.items():
        theirs = wanted[name].settings()
        assert {key for key, value in run.settings().items() if value != theirs[key]} == {
            "model",
            "data.path",
            *COUNTS,
        }
    studies = pipeline.load(PAPER).studies
    for study, parameters in yaml.safe_load(OVERLAY.read_text())["studies"].items():
        switches = {"torch_device", "make_runs", "assignments", "learning_rate", "tasks", "task"}
        assert not switches & parameters.keys() and study in studies


def test_every_task_and_method_runs_on_both_formats_in_16_bits(runs: dict[str, RunConfig]) -> None:
    wanted = set(zip(methods.METHODS, itertools.cycle(METRICS)))
    chosen = [run for run in runs.values() if (run.method, run.task) in wanted and not run.variant]
    assert len(chosen) == 10
    for run in chosen:
        assert run.torch_dtype == "bfloat16" and run.training.checkpointing and run.training.micro_batch == 2
        result = federation.run(run.updated({"federation.rounds": 1, "federation.participants": 2}))
        assert result.rounds["metric_name"].unique().tolist() == [METRICS[run.task]]
        assert (result.participants["rejected"] == "").all(), run.run_id
        assert (result.rounds["round_device_s"].iloc[1:] > 0).all()


@pytest.mark.parametrize("method", ["flux", "flux_plus"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(runs: dict[str, RunConfig], tmp_path: Path, method: str) -> None:
    run = runs[f"{method}-deepseek-moe-16b-base-mmlu-seed0"].updated({"federation.participants": 2})
    whole = federation.run(run).rounds
    federation.run(run, lambda row: row["round"] == 1, out=tmp_path)
    assert list((tmp_path / "checkpoints").iterdir())
    again = federation.run(run, out=tmp_path).rounds
    same = [name for name in whole if "wall" not in name and name != "peak_memory_bytes"]
    pd.testing.assert_frame_equal(again[same], whole[same])


def test_a_figure_names_a_models_folder_by_its_last_name(runs: dict[str, RunConfig]) -> None:
    rounds = pd.DataFrame({"model": [run.model for run in runs.values()]})
    assert unique(rounds, "model") == ", ".join(tiny.MODELS)


def test_data_path_of_a_profile_is_from_where_make_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {
        "profile": "paper",
        "grid": {"methods": ["flux"], "models": ["m"], "tasks": ["gsm8k"], "seeds": [0]},
        "run": {"data.path": "my/data"},
        "studies": {"01_profiling": {"data_path": "my/data", "tasks": ["gsm8k"]}},
    }
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    profile = pipeline.load(tmp_path / "paper.yaml")
    (run,) = profile.runs.values()
    assert isinstance(run, RunConfig) and run.data.path == str(tmp_path / "my" / "data")
    assert profile.studies["01_profiling"] == {"data_path": run.data.path, "tasks": ["gsm8k"]}
