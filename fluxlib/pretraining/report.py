"""What a base leaves to be learned, how skewed its routing is, and its model card."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fluxlib import models, seeding
from fluxlib.config import RunConfig, TrainingConfig
from fluxlib.methods.local import customized, tune
from fluxlib.moe import find
from fluxlib.moe.compact import LayerPlan
from fluxlib.pretraining.training import MAX_TOKENS
from fluxlib.profiling import profile
from fluxlib.tasks import load as load_task
from fluxlib.tasks import mini
from fluxlib.tasks.batches import make_batch, sample_batches
from fluxlib.tasks.evaluate import evaluate
from fluxlib.tasks.mini import KNOWN_FRACTION

FINE_TUNING = RunConfig(method="fmd", training=TrainingConfig(batch_size=32, learning_rate=4e-3))
FINE_TUNING_STEPS = 300


def room_to_learn(name: str, folder: Path, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Score of the base in ``folder`` on each mini task, and after tuning all its experts on all training samples.

    The first must leave room and the second must fill it, or there would be nothing for a federation to learn.
    """
    found: dict[str, dict[str, Any]] = {}
    for task_name in mini.FAMILIES:
        task = load_task(task_name, seed)
        model, tokenizer = models.load(str(folder))
        base = evaluate(model, tokenizer, task.metric, task.test, MAX_TOKENS)
        draws = sample_batches(
            task.train,
            tokenizer,
            FINE_TUNING.training.batch_size,
            MAX_TOKENS,
            seeding.generator(seed, "room", name, task_name),
        )
        everything = [LayerPlan(tuned=tuple(range(layer.num_experts))) for layer in find.layers(model)]
        with customized(model, everything) as compact:
            tune(model, compact, list(islice(draws, FINE_TUNING_STEPS)), FINE_TUNING)
            tuned = evaluate(model, tokenizer, task.metric, task.test, MAX_TOKENS)
        found[task_name] = {
            "metric": task.metric,
            "base": round(base.metric, 4),
            "tuned": round(tuned.metric, 4),
            "base_loss": round(base.loss, 4),
            "tuned_loss": round(tuned.loss, 4),
        }
        print(f"{name} {task_name}: {found[task_name]}", flush=True)
    return found


def skew(name: str, folder: Path, seed: int = 0, num_samples: int = 64) -> dict[str, list[float]]:
    """Per MoE layer and averaged over the mini tasks: largest share of tokens of one expert, and entropy / log E."""
    model, tokenizer = models.load(str(folder))
    largest, entropy = [], []
    for task_name in mini.FAMILIES:
        examples = load_task(task_name, seed).test[:num_samples]
        frequency = profile(model, [make_batch(examples, tokenizer, MAX_TOKENS)], bits=16).frequency
        largest.append(frequency.amax(1))
        entropy.append(-(frequency * frequency.clamp_min(1e-9).log()).sum(1) / math.log(frequency.shape[1]))
    mean = {"largest_share": torch.stack(largest).mean(0), "relative_entropy": torch.stack(entropy).mean(0)}
    return {key: [round(value, 4) for value in values.tolist()] for key, values in mean.items()}


def write_card(folder: Path) -> None:
    """The base's model card, from its ``recipe.json`` alone."""
    record = json.loads((folder / "recipe.json").read_text())
    rows = "\n".join(
        f"| {task} | {score['metric']} | {score['base']:.3f} | {score['tuned']:.3f} |"
        for task, score in record["scores"].items()
    )
    layer_rows = "\n".join(
        f"| {index} | {share:.3f} | {entropy:.3f} |"
        for index, (share, entropy) in enumerate(zip(*record["skew"].values(), strict=True))
    )
    last = record["curve"][-1]
    (folder / "README.md").write_text(
        f"""# {record["name"]}

A small Mixture-of-Experts base model, pre-trained from nothing by this project (`python -m fluxlib.pretraining
{record["name"]}`) on {record["tokens"]:,} tokens of generated text: the formats and words of the mini tasks, and
{KNOWN_FRACTION:.0%} of their facts. Final pre-training loss {last["loss"]:.3f} nats per token. The recipe, with its
seed and loss curve, is `recipe.json`. Weights are bfloat16 safetensors in the public key format of the architecture.

It exists so that federated fine-tuning can be studied without a download, an account or a GPU. It knows nothing of
the real world and is of no other use. Licence: Apache-2.0.

## Room to learn

Test score of the base, and after tuning all experts centrally ({FINE_TUNING_STEPS} steps of
{FINE_TUNING.training.batch_size}, learning rate {FINE_TUNING.training.learning_rate:g}):

| task | metric | base | all experts tuned |
|---|---|---|---|
{rows}

## Activation

Share of the tokens that the busiest expert receives, and entropy of the shares relative to an even layer, per MoE
layer, averaged over the four tasks:

| MoE layer | largest share | relative entropy |
|---|---|---|
{layer_rows}
"""
    )
