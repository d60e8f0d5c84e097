"""The recipe and the training loop."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluxlib import models, seeding
from fluxlib.pretraining.bases import NAMES, build_model, build_tokenizer
from fluxlib.tasks import FORMATS, mini
from fluxlib.tasks.batches import IGNORED, collate, encode
from fluxlib.tasks.mini import pretraining_row

MAX_TOKENS = 96


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a base model's weights."""

    steps: int = 1600
    samples_per_family: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    mutual_information: float = 0.1
    """Weight of the router term."""
    temperature: float = 0.25
    """Of the softmax in the router term: experts of different labels part before the model's own gates saturate."""
    z_loss: float = 1e-3
    """Weight of the squared log-sum-exp of the router logits (ST-MoE, Zoph et al. 2022), which keeps gates soft."""
    balance_first: float = 0.3
    balance_last: float = 1.0
    """Weight of H(expert) within the router term, in the first and in the last MoE layer."""
    seed: int = 0


RECIPES = {name: Recipe() for name in NAMES}


def pretraining_batch(
    family: str, count: int, chance: random.Random, tokenizer: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """``count`` samples of one family with every real token scored, and their labels."""
    form = FORMATS[family.removeprefix("mini-")]
    drawn = [pretraining_row(family, chance) for _ in range(count)]
    batch = collate([encode(form.to_example(row), tokenizer, MAX_TOKENS) for _, row in drawn], tokenizer.pad_token_id)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return batch, [label for label, _ in drawn]


def gates(model: nn.Module) -> list[nn.Module]:
    """The routers, in layer order."""
    blocks = [module for module in model.modules() if hasattr(module, "gate") and hasattr(module, "experts")]
    return [block.get_submodule("gate") for block in blocks]


@contextmanager
def watch_gates(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect ``(logits [N, E], top-k weights [N, k])`` of each gate, in layer order."""
    found: list[tuple[Tensor, Tensor]] = []
    hooks = [gate.register_forward_hook(lambda _m, _i, out: found.append(out[:2])) for gate in gates(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def mutual_information(logits: Tensor, label: Tensor, num_labels: int, balance: float) -> Tensor:
    """``balance * H(expert) - H(expert | label)`` in nats, over tokens.

    Args:
        logits: ``[N, E]`` router logits of real tokens.
        label: ``[N]`` label index of each token's sample.
    """
    probability = logits.float().softmax(-1)
    sums = torch.zeros(num_labels, logits.shape[-1], device=logits.device).index_add_(0, label, probability)
    mass = sums.sum(-1)
    given = sums / mass.clamp_min(1e-9)[:, None]
    entropy_given = -(given * given.clamp_min(1e-9).log()).sum(-1)
    overall = sums.sum(0) / mass.sum()
    entropy = -(overall * overall.clamp_min(1e-9).log()).sum()
    return balance * entropy - (mass / mass.sum() * entropy_given).sum()


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def train_step(
    model: nn.Module,
    batches: dict[str, tuple[dict[str, Tensor], list[str]]],
    label_ids: dict[str, int],
    recipe: Recipe,
) -> dict[str, float]:
    """Backward through one micro-batch per family; returns what is logged, averaged over families.

    ``loss`` of the language model, ``router`` term, and ``top_weight``: the mean share of a token's gate weight that
    goes to its first expert (1 = the other experts of its top-k play no part).
    """
    sums = {"loss": 0.0, "router": 0.0, "top_weight": 0.0}
    for batch, labels in batches.values():
        with watch_gates(model) as seen:
            loss = model(**batch).loss
        mask = batch["attention_mask"].bool()
        ids = torch.tensor([label_ids[label] for label in labels])[:, None].expand_as(mask)[mask]
        kept = [logits[mask.reshape(-1)] for logits, _ in seen]
        router = router_term(kept, ids, len(label_ids), recipe)
        z_loss = torch.stack([logits.float().logsumexp(-1).square().mean() for logits in kept]).mean()
        total = loss - recipe.mutual_information * router + recipe.z_loss * z_loss
        (total / len(batches)).backward()
        top = [(weights.amax(-1) / weights.sum(-1))[mask.reshape(-1)].mean().item() for _, weights in seen]
        for name, value in zip(sums, (loss.item(), router.item(), sum(top) / len(top)), strict=True):
            sums[name] += value / len(batches)
    return sums


def router_term(logits: list[Tensor], label: Tensor, num_labels: int, recipe: Recipe) -> Tensor:
    """Mutual information averaged over layers; the weight of H(expert) grows linearly with depth."""
    values = []
    for index, layer_logits in enumerate(logits):
        share = index / max(1, len(logits) - 1)
        balance = recipe.balance_first + share * (recipe.balance_last - recipe.balance_first)
        values.append(mutual_information(layer_logits / recipe.temperature, label, num_labels, balance))
    return torch.stack(values).mean()


def pretrain(name: str, out: Path, recipe: Recipe | None = None, log_every: int = 50) -> dict[str, Any]:
    """Pre-train the base called ``name`` into ``out``: weights, tokenizer, ``recipe.json`` with the loss curve.

    Returns the record that is written. Weights are float32 in training and bfloat16 on disk.
    """
    recipe = recipe or RECIPES[name]
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        # transformers draws initial weights from the global generator; it is forked above.
        torch.manual_seed(seeding.derive(recipe.seed, "init", name))  # noqa: TID251
        model = build_model(name, len(tokenizer))
        for gate in gates(model):
            # The usual init of 0.02 leaves the two-layer gate at a saddle where routing stays uniform for long.
            for weight in gate.parameters():
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    chance = random.Random(seeding.derive(recipe.seed, "text", name))
    label_ids = {
        label: i for i, label in enumerate(label for family in mini.FAMILIES.values() for label in family.labels)
    }
    curve, tokens, start = [], 0, time.perf_counter()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        batches = {
            family: pretraining_batch(family, recipe.samples_per_family, chance, tokenizer) for family in mini.FAMILIES
        }
        tokens += sum(int(batch["attention_mask"].sum()) for batch, _ in batches.values())
        logged = train_step(model, batches, label_ids, recipe)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % log_every == 0 or step == recipe.steps - 1:
            curve.append({"step": step, "tokens": tokens} | {key: round(value, 4) for key, value in logged.items()})
            print(f"{name} {curve[-1]} {time.perf_counter() - start:.0f} s", flush=True)
    record = {
        "name": name,
        "recipe": asdict(recipe),
        "tokens": tokens,
        "wall_s": round(time.perf_counter() - start, 1),
        "curve": curve,
    }
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16)
    (out / "model.safetensors").unlink(missing_ok=True)
    models.export(model, out, tokenizer)
    (out / "recipe.json").write_text(json.dumps(record, indent=1) + "\n")
    return record
