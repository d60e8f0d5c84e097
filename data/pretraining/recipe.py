"""The recipe and the training loop."""

from __future__ import annotations

import json
import math
import operator
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mini_bases import build_model, build_tokenizer
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import one_hot

from fluxlib import models, seeding
from fluxlib.models.loading import MINI
from fluxlib.tasks import FORMATS, mini
from fluxlib.tasks.batches import IGNORED, collate, encode

MAX_TOKENS = 96


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a base model's weights."""

    steps: int = 1200
    samples_per_family: int = 24
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    router: float = 0.3
    """Weight of the router term."""
    temperature: float = 0.25
    """Of the softmax in the router term: experts of different labels part before the model's own gates saturate."""
    target_exponent: tuple[float, float] = (0.6, 0.0)
    """Of the Zipf-like target shares of a layer's experts, in the first and in the last MoE layer; 0: even shares."""
    balance: tuple[float, float] = (1.0, 4.0)
    """Weight of the divergence from the target shares within the router term, first and last layer."""
    label_entropy: tuple[float, float] = (0.1, 0.7)
    """Weight of H(expert | label) within the router term, first and last layer."""
    z_loss: float = 8e-3
    """Weight of the squared log-sum-exp of the router logits (ST-MoE, Zoph et al. 2022), which keeps logits small."""
    gate_entropy: float = 0.0
    """Weight of H(expert | token), which is raised: a token's weight spreads over its experts."""
    router_steps: int = 60
    """Steps at the end in which the routers alone learn, with the load-balancing loss beside the other terms."""
    load_balance: tuple[float, float] = (0.0, 0.3)
    """Weight of that loss, first and last layer (Switch Transformers, Fedus et al. 2022, eq. 4)."""
    seed: int = 0


RECIPES = dict(zip(MINI, (Recipe(), Recipe(target_exponent=(0.45, 0.0), gate_entropy=0.15)), strict=True))


def pretraining_row(family: str, chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A ``(label, row)`` of the pre-training text: known facts as they are, all others drawn anew every time."""
    label = chance.choice(mini.FAMILIES[family].labels)
    return label, mini.FAMILIES[family].make(
        label, chance.choice(mini.names()[label]), mini.Teller(chance, "pretraining")
    )


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


def router_term(logits: Tensor, label: Tensor, targets: Tensor, weights: tuple[float, float]) -> Tensor:
    """What one layer's router is charged for one family's tokens, in nats.

    ``balance * KL(target || shares) + label_entropy * H(expert | label)``: experts are to be used as the target
    says, within every family, and each label is to use few of them. That parts the labels and starves no expert.

    Args:
        logits: ``[N, E]`` router logits of real tokens, at the term's temperature.
        label: ``[N]`` label index of each token's sample; every label counts alike.
        targets: ``[E]`` shares that the experts are to have.
        weights: balance and label entropy.
    """
    probability = logits.float().softmax(-1)
    sums = torch.zeros(int(label.max()) + 1, logits.shape[-1], device=logits.device).index_add_(0, label, probability)
    given = sums[sums.sum(-1) > 0]
    given = given / given.sum(-1, keepdim=True)
    entropy = -(given * given.clamp_min(1e-9).log()).sum(-1).mean()
    divergence = (targets * (targets / probability.mean(0).clamp_min(1e-4)).log()).sum()
    return weights[0] * divergence + weights[1] * entropy


def load_balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """Experts times the sum of share of places x mean probability, less 1: 0 where all are used alike.

    Args:
        logits: ``[N, E]`` router logits of real tokens.
    """
    num_experts = logits.shape[-1]
    places = one_hot(logits.topk(top_k).indices, num_experts).float().sum((0, 1))
    return num_experts * (places / places.sum() * logits.float().softmax(-1).mean(0)).sum() - 1


def target_shares(num_experts: int, exponent: float, layer: int) -> Tensor:
    """``[E]`` shares in proportion to rank^-exponent; which expert has which rank differs from layer to layer."""
    share = torch.arange(1, num_experts + 1).float() ** -exponent
    rank = torch.randperm(num_experts, generator=seeding.generator(layer, "rank"))
    return (share / share.sum())[rank]


def between(ends: tuple[float, float], layer: int, num_layers: int) -> float:
    """From the first layer's value to the last one's, linear in depth."""
    return ends[0] + (ends[1] - ends[0]) * layer / max(1, num_layers - 1)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def train_step(
    model: nn.Module,
    batches: dict[str, tuple[dict[str, Tensor], list[str]]],
    recipe: Recipe,
    at_the_end: bool = False,
) -> dict[str, float]:
    """Backward through one micro-batch per family; returns what is logged, averaged over families.

    ``at_the_end`` adds the load-balancing loss.

    ``loss`` of the language model, ``router`` term, and ``first_weight``: the mean share of a token's gate weight that
    goes to its first expert (1 = the other experts of its top-k play no part).
    """
    sums = {"loss": 0.0, "router": 0.0, "first_weight": 0.0}
    for batch, labels in batches.values():
        with watch_gates(model) as seen:
            loss = model(**batch).loss
        mask = batch["attention_mask"].bool()
        known = sorted(set(labels))
        ids = torch.tensor([known.index(label) for label in labels])[:, None].expand_as(mask)[mask]
        kept = [logits[mask.reshape(-1)] for logits, _ in seen]
        router = torch.stack([_layer_term(layer, kept, ids, recipe) for layer in range(len(kept))]).mean()
        z_loss = torch.stack([logits.float().logsumexp(-1).square().mean() for logits in kept]).mean()
        soft = torch.stack([Categorical(logits=logits.float()).entropy().mean() for logits in kept]).mean()
        total = loss + recipe.router * router + recipe.z_loss * z_loss - recipe.gate_entropy * soft
        if at_the_end:
            weights = [between(recipe.load_balance, layer, len(kept)) for layer in range(len(kept))]
            uneven = [load_balance_loss(logits, top.shape[-1]) for logits, (_, top) in zip(kept, seen, strict=True)]
            total = total + sum(map(operator.mul, weights, uneven)) / len(kept)
        (total / len(batches)).backward()
        first = [(weights.amax(-1) / weights.sum(-1))[mask.reshape(-1)].mean().item() for _, weights in seen]
        for name, value in zip(sums, (loss.item(), router.item(), sum(first) / len(first)), strict=True):
            sums[name] += value / len(batches)
    return sums


def _layer_term(layer: int, logits: list[Tensor], label: Tensor, recipe: Recipe) -> Tensor:
    exponent, balance, entropy = (
        between(ends, layer, len(logits)) for ends in (recipe.target_exponent, recipe.balance, recipe.label_entropy)
    )
    targets = target_shares(logits[layer].shape[-1], exponent, layer)
    return router_term(logits[layer] / recipe.temperature, label, targets, (balance, entropy))


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
    curve, tokens, start = [], 0, time.perf_counter()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        batches = {
            family: pretraining_batch(family, recipe.samples_per_family, chance, tokenizer) for family in mini.FAMILIES
        }
        tokens += sum(int(batch["attention_mask"].sum()) for batch, _ in batches.values())
        logged = train_step(model, batches, recipe)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % log_every == 0 or step == recipe.steps - 1:
            curve.append({"step": step, "tokens": tokens} | {key: round(value, 4) for key, value in logged.items()})
            print(f"{name} {curve[-1]} {time.perf_counter() - start:.0f} s", flush=True)
    tokens += even_routers(model, name, recipe, tokenizer)
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


def even_routers(model: nn.Module, name: str, recipe: Recipe, tokenizer: Any) -> int:
    """The last steps: routers alone, from weights rounded as they are stored; returns the tokens that they took."""
    model.to(torch.bfloat16).float()
    routers = [weight for gate in gates(model) for weight in gate.parameters()]
    for weight in model.parameters():
        weight.requires_grad_(any(weight is one for one in routers))
    optimizer = torch.optim.AdamW(routers, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
    chance, tokens = random.Random(seeding.derive(recipe.seed, "even", name)), 0
    for step in range(recipe.router_steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate / 3 * (1 - step / recipe.router_steps)
        batches = {
            family: pretraining_batch(family, recipe.samples_per_family, chance, tokenizer) for family in mini.FAMILIES
        }
        tokens += sum(int(batch["attention_mask"].sum()) for batch, _ in batches.values())
        train_step(model, batches, recipe, at_the_end=True)
        nn.utils.clip_grad_norm_(routers, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return tokens
