"""What a base leaves to be learned, how skewed its routing is, and its model card."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from recipe import MAX_TOKENS
from torch.nn.functional import one_hot

from fluxlib import models, seeding
from fluxlib.config import RunConfig, TrainingConfig
from fluxlib.methods.local import customized, tune
from fluxlib.moe import find
from fluxlib.moe.capture import capture
from fluxlib.moe.compact import LayerPlan
from fluxlib.tasks import load as load_task
from fluxlib.tasks import mini
from fluxlib.tasks.batches import make_batch, sample_batches
from fluxlib.tasks.evaluate import evaluate

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


def routing(name: str, folder: Path, seed: int = 0, samples_per_label: int = 16) -> list[dict[str, float]]:
    """How the base in ``folder`` routes held-out text of all mini tasks, one row per MoE layer:

    - ``busiest``, ``rarest``: the expert with the most and with the fewest tokens, in even shares;
    - ``label_distance``: total variation between the experts' shares of two labels, mean over the pairs of a task;
    - ``first_weight``: mean share of a token's gate weight that its first expert has.
    """
    model, tokenizer = models.load(str(folder))
    num_experts = find.layers(model)[0].num_experts
    shares, first = [], []
    for task_name in mini.FAMILIES:
        task = load_task(task_name, seed)
        for label in task.labels:
            examples = [example for example in task.test if example.label == label][:samples_per_label]
            batch = make_batch(examples, tokenizer, MAX_TOKENS)
            with torch.no_grad(), capture(model) as seen:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            real = batch["attention_mask"].flatten().bool()
            chosen = [one_hot(record.top_k_index[0][real], num_experts).sum((0, 1)) for record in seen.layers]
            weights = [record.top_k_weights[0][real] for record in seen.layers]
            shares.append(torch.stack([count / count.sum() for count in chosen]))
            first.append(torch.stack([(weight.amax(-1) / weight.sum(-1)).mean() for weight in weights]))
    share = torch.stack(shares).unflatten(0, (len(mini.FAMILIES), -1)).movedim(2, 0)  # [L, tasks, labels, E]
    even = share.mean((1, 2)) * share.shape[-1]
    distance = (share[:, :, :, None] - share[:, :, None]).abs().sum(-1) / 2
    num_labels = share.shape[2]
    columns = {
        "busiest": even.amax(-1),
        "rarest": even.amin(-1),
        "label_distance": distance.mean(1).sum((1, 2)) / (num_labels * (num_labels - 1)),
        "first_weight": torch.stack(first).mean(0),
    }
    return [{key: round(float(values[layer]), 3) for key, values in columns.items()} for layer in range(len(share))]


def write_card(folder: Path) -> None:
    """The base's model card, from its ``recipe.json`` alone."""
    record = json.loads((folder / "recipe.json").read_text())
    rows = "\n".join(
        f"| {task} | {score['metric']} | {score['base']:.3f} | {score['tuned']:.3f} |"
        for task, score in record["scores"].items()
    )
    layer_rows = "\n".join(
        "| " + " | ".join([str(layer), *(f"{value:.2f}" for value in row.values())]) + " |"
        for layer, row in enumerate(record["routing"])
    )
    last, seen = record["curve"][-1], record.get("phenomena", {})
    told = "".join(f"- **{name}.** {text}\n" for name, text in seen.items())
    phenomena = f"\n## What the paper observes, here\n\nLooked for, not trained for.\n\n{told}" if seen else ""
    (folder / "README.md").write_text(
        f"""# {record["name"]}

A small Mixture-of-Experts base model, pre-trained from nothing by this project (`python data/pretraining/pretrain.py
{record["name"]}`) on {record["tokens"]:,} tokens of generated text: the formats and words of the mini tasks, and
the facts about {mini.NUM_KNOWN} of {mini.NUM_THINGS} things of every label. Final pre-training loss {last["loss"]:.3f}
nats per token. The recipe, with its seed and loss curve, is `recipe.json`. Weights are bfloat16 safetensors in the
public key format of the architecture.

It exists so that federated fine-tuning can be studied without a download, an account or a GPU. It knows nothing of
the real world and is of no other use. Licence: Apache-2.0.

## Room to learn

Test score of the base, and after tuning all experts centrally ({FINE_TUNING_STEPS} steps of
{FINE_TUNING.training.batch_size}, learning rate {FINE_TUNING.training.learning_rate:g}):

| task | metric | base | all experts tuned |
|---|---|---|---|
{rows}

## Routing

On held-out text of all four tasks, per MoE layer: the tokens of the busiest and of the rarest expert, in even shares;
how far the labels of a task part (total variation between their shares of the experts); the share of a token's gate
weight that its first expert has.

| MoE layer | busiest | rarest | labels apart | first weight |
|---|---|---|---|---|
{layer_rows}
{phenomena}"""
    )
