"""Tiny stand-ins for what the profile `paper` fetches: both public checkpoints, and files of all four data sets.

    python tests/tiny.py FOLDER        # FOLDER/models and FOLDER/files, as config/overlays/tiny.yaml names them

Weights are random, in the keys and the `config.json` of the published ones; a token is a letter. Files have the public
names, columns and splits, and rows that this code makes up.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from fluxlib.models import DeepseekMoeConfig, LlamaMoeConfig
from fluxlib.models.saving import export

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?+-*/=#<>$()' \n"
SMALL = {
    "vocab_size": len(LETTERS) + 3, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "LLaMA-MoE-v1-3_5B-4_16": LlamaMoeConfig(
        **SMALL, intermediate_size=64, num_experts=8, num_selects=2, score_scale_factor=4.0
    ),
    "deepseek-moe-16b-base": DeepseekMoeConfig(
        **SMALL | {"num_hidden_layers": 3},
        intermediate_size=24,
        moe_intermediate_size=8,
        n_routed_experts=16,
        num_experts_per_tok=3,
    ),
}
WORDS = ("red", "blue", "green", "grey")
ROWS = 480
"""Of each data set: eight participants of a study have 48 each, of which 32 are held out."""


def write_models(folder: Path) -> None:
    """Both checkpoints, by the last parts of their hub names."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: i for i, letter in enumerate(LETTERS, start=3)}
    letters = Tokenizer(WordLevel(words, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    for name, config in MODELS.items():
        model = tf.AutoModelForCausalLM.from_config(config)
        chance = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.2, generator=chance)
        export(model, folder / name, tokenizer, torch.bfloat16)


def rows(task: str) -> list[dict[str, Any]]:
    """Rows of a data set, all of them different."""
    made = {
        "dolly": lambda n, word: {
            "instruction": f"Name {n}.", "context": "", "response": f"It is {word} {n}.", "category": word
        },
        "gsm8k": lambda n, word: {
            "question": f"Add {n} and 1, {word}?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"
        },
        "piqa": lambda n, word: {"goal": f"Paint {n} {word}", "sol1": f"use {word}", "sol2": "eat it", "label": 0},
    }[task]  # fmt: skip
    return [made(n, WORDS[n % 4]) for n in range(ROWS)]


def write_files(folder: Path) -> None:
    """JSON lines for three data sets, a CSV file per subject for MMLU."""
    for task in ("dolly", "gsm8k", "piqa"):
        (folder / task).mkdir(parents=True, exist_ok=True)
        (folder / task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(task)))
    (folder / "mmlu" / "test").mkdir(parents=True, exist_ok=True)
    for subject in WORDS:
        with (folder / "mmlu" / "test" / f"{subject}_test.csv").open("w", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
            writer.writerows([f"Which {n}, {subject}?", *WORDS, n % 4] for n in range(ROWS // 4))


def main(folder: Path) -> None:
    """Whatever is not there yet, so that nothing that was made from it becomes out of date."""
    if not (folder / "models").is_dir():
        write_models(folder / "models")
    if not (folder / "files").is_dir():
        write_files(folder / "files")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
