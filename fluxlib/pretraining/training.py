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

from fluxlib import seeding
from fluxlib.pretraining.bases import NAMES, build_model, build_tokenizer
from fluxlib.tasks import FORMATS, mini
from fluxlib.tasks.batches import IGNORED, collate, encode
from fluxlib.tasks.mini.generate import pretraining_row

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
    balance_first: float = 0.3
    balance_last: float = 1.0
    """Weight of H(expert) within the router term, in the first and in the last MoE layer."""
    seed: int = 0


RECIPES = {name: Recipe() for name in NAMES}


def pretraining_batch(
    family: str, count: int, chance: random.Random, tokenizer: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """``count`` samples of one family with every real token scored, and their labels."""
    data_set = FORMATS[family.removeprefix("mini-")]
    drawn = [pretraining_row(family, chance) for _ in range(count)]
    batch = collate(
        [encode(data_set.to_example(row), tokenizer, MAX_TOKENS) for _, row in drawn], tokenizer.pad_token_id
    )
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return batch, [label for label, _ in drawn]


def gates(model: nn.Module) -> list[nn.Module]:
    """The routers, in layer order."""
    return [module.gate for module in model.modules() if hasattr(module, "gate") and hasattr(module, "experts")]


@contextmanager
def router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect each MoE layer's router logits ``[N, E]`` of the forward passes inside the block, in layer order."""
    found: list[Tensor] = []
    hooks = [gate.register_forward_hook(lambda _m, _i, out: found.append(out[0])) for gate in gates(model)]
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
) -> tuple[float, float]:
    """Backward through one micro-batch per family; returns the mean language-model loss and router term."""
    num_layers = len(gates(model))
    total_loss = total_router = 0.0
    for batch, labels in batches.values():
        with router_logits(model) as logits:
            loss = model(**batch).loss
        mask = batch["attention_mask"].bool()
        ids = torch.tensor([label_ids[label] for label in labels])[:, None].expand_as(mask)[mask]
        router = torch.zeros(())
        for index, layer_logits in enumerate(logits):
            share = index / max(1, num_layers - 1)
            balance = recipe.balance_first + share * (recipe.balance_last - recipe.balance_first)
            kept = layer_logits[mask.reshape(-1)]
            router = router + mutual_information(kept, ids, len(label_ids), balance) / num_layers
        ((loss - recipe.mutual_information * router) / len(batches)).backward()
        total_loss += loss.item() / len(batches)
        total_router += router.item() / len(batches)
    return total_loss, total_router


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
        loss, router = train_step(model, batches, label_ids, recipe)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % log_every == 0 or step == recipe.steps - 1:
            curve.append({"step": step, "tokens": tokens, "loss": round(loss, 4), "router": round(router, 4)})
            seconds = time.perf_counter() - start
            print(f"{name} step {step} tokens {tokens} loss {loss:.3f} router {router:.3f} {seconds:.0f} s", flush=True)
    record = {
        "name": name,
        "recipe": asdict(recipe),
        "tokens": tokens,
        "wall_s": round(time.perf_counter() - start, 1),
        "curve": curve,
    }
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(record, indent=1) + "\n")
    return record
