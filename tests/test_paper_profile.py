"""The `paper` profile's path on a small scale: public checkpoint formats, files in the public schemas, four methods."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from fluxlib import federation, models
from fluxlib.app import pipeline
from fluxlib.config import REPO_ROOT, RunConfig
from fluxlib.models.deepseek_moe import DeepseekMoeConfig
from fluxlib.models.llama_moe import LlamaMoeConfig
from fluxlib.models.saving import export

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?+-*/=#<>$()' \n"
SMALL = {
    "vocab_size": len(LETTERS) + 3, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama-moe/LLaMA-MoE-v1-3_5B-4_16": LlamaMoeConfig(
        **SMALL, intermediate_size=32, num_experts=8, num_selects=2, score_scale_factor=4.0
    ),
    "deepseek-ai/deepseek-moe-16b-base": DeepseekMoeConfig(
        **SMALL, intermediate_size=24, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=3
    ),
}
WORDS = ("red", "blue", "green", "grey")
PAPERS = ("flux", "fmd", "fmq", "fmes")
"""Methods of the paper; FLUX+ is the suite's own."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint for each model of the profile, in the keys of the public one, by the profile's name."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: i for i, letter in enumerate(LETTERS, start=3)}
    letters = Tokenizer(WordLevel(words, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    folders = {}
    for name, config in MODELS.items():
        model = tf.AutoModelForCausalLM.from_config(config)
        chance = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.2, generator=chance)
        folders[name] = export(model, tmp_path_factory.mktemp("models") / name.rpartition("/")[2], tokenizer)
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of every task, one folder per task."""
    folder = tmp_path_factory.mktemp("data")
    rows: dict[str, list[dict[str, Any]]] = {
        "dolly": [
            {"instruction": f"Name {n}.", "context": "", "response": f"It is {n}.", "category": WORDS[n % 4]}
            for n in range(24)
        ],
        "gsm8k": [
            {"question": f"Add {n} and 1, {WORDS[n % 4]}?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
            for n in range(24)
        ],
        "piqa": [
            {"goal": f"Paint it {WORDS[n % 4]}", "sol1": f"use {n}", "sol2": "eat it", "label": 0} for n in range(24)
        ],
    }
    for task, lines in rows.items():
        (folder / task).mkdir()
        (folder / task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "mmlu" / "test").mkdir(parents=True)
    for subject in WORDS:
        with (folder / "mmlu" / "test" / f"{subject}_test.csv").open("w", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
            writer.writerows([f"Which {n}?", *WORDS, n % 4] for n in range(6))
    return folder


def paper(tmp_path: Path, checkpoints: dict[str, Path], data: Path) -> pipeline.Pipeline:
    """config/paper.yaml with its models and data on this machine and small counts; all else as it stands."""
    content = yaml.safe_load((REPO_ROOT / "config" / "paper.yaml").read_text())
    content["grid"]["models"] = [str(checkpoints[name]) for name in content["grid"]["models"]]
    content["run"] |= {
        "data.path": str(data), "federation.rounds": 1, "federation.participants": 2, "evaluation.samples": 2,
        "training.local_steps": 1, "training.batch_size": 2, "training.max_tokens": 128, "profiling.batches": 1,
    }  # fmt: skip
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump(content))
    return pipeline.load(path)


def test_the_paper_profile_is_the_papers_experiment() -> None:
    profile = pipeline.load(REPO_ROOT / "config" / "paper.yaml")
    assert {run.method for run in profile.runs.values()} == set(PAPERS)
    assert set(profile.models.values()) == set(MODELS)
    assert {run.task for run in profile.runs.values()} == {"dolly", "gsm8k", "mmlu", "piqa"}
    one = next(iter(profile.runs.values()))
    assert (one.training.learning_rate, one.training.batch_size, one.profiling.bits, one.federation.participants) == (
        1e-5,
        16,
        4,
        10,
    )
    assert {models.config(name).model_type for name in profile.models.values()} == {"llama_moe", "deepseek"}


def test_every_task_runs_on_both_formats(tmp_path: Path, checkpoints: dict[str, Path], data: Path) -> None:
    runs = paper(tmp_path, checkpoints, data).runs
    assert len(runs) == 32
    kinds = {"dolly": "rouge_l", "gsm8k": "exact_match", "mmlu": "accuracy", "piqa": "accuracy"}
    chosen = [run for run in runs.values() if (run.method, run.task) in zip(PAPERS, kinds, strict=True)]
    assert len(chosen) == 8
    for run in chosen:
        result = federation.run(run)
        assert result.rounds["metric_name"].unique().tolist() == [kinds[run.task]]
        assert (result.participants["rejected"] == "").all(), run.run_id
        assert (result.rounds["round_device_s"].iloc[1:] > 0).all()


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
