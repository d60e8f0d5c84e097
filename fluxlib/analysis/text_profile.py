"""A model and a text: which experts the text uses, as tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fluxlib import profiling

BATCH_SIZE = 8
MAX_SQUARES = 8 * 1024**2
"""Pairs of tokens in a batch, at most: attention received takes the weights of all of them, layer by layer."""
COVERED = 0.8
"""Share of a layer's tokens that the busiest experts are counted for."""


@dataclass(frozen=True)
class TextProfile:
    """``frequency [L, E]``, the number of tokens read, and tables with one row per layer and one per expert."""

    frequency: Tensor
    num_tokens: int
    by_layer: pd.DataFrame
    by_expert: pd.DataFrame


def check(config: Any, bits: int, num_tokens: int) -> None:
    """Refuse what a model of ``config`` cannot be asked for, before its weights are loaded.

    Raises:
        ValueError: other ``bits``, or samples longer than the model can read at once.
    """
    if bits not in profiling.BITS:
        raise ValueError(f"bits is {bits}, allowed are {', '.join(map(str, profiling.BITS))}")
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and num_tokens > longest:
        raise ValueError(f"tokens is {num_tokens}, allowed is 1 to {longest}, the model's longest sequence")


def unknown_frac(batches: Iterable[dict[str, Tensor]], tokenizer: Any) -> float:
    """Share of the tokens in ``batches`` that stand for text the tokenizer does not know; 0 if it knows every text."""
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    unknown = getattr(tokenizer, "unk_token_id", None)
    return 0.0 if unknown is None else float((ids == unknown).float().mean())


def batches(text: str, tokenizer: Any, num_tokens: int, max_samples: int) -> list[dict[str, Tensor]]:
    """``text`` cut into samples of ``num_tokens`` tokens, in batches; a shorter rest counts only if it is all there is.

    Raises:
        ValueError: a text without a token, or of unknown tokens alone.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not set(ids) - {getattr(tokenizer, "unk_token_id", None)}:
        raise ValueError("the text holds no token" + " that the model's tokenizer knows" * bool(ids))
    width = min(num_tokens, len(ids))
    size = max(1, min(BATCH_SIZE, MAX_SQUARES // width**2))
    rows = [ids[start : start + width] for start in range(0, len(ids) - width + 1, width)][:max_samples]
    return [
        {"input_ids": torch.tensor(part), "attention_mask": torch.ones(len(part), width, dtype=torch.long)}
        for part in (rows[start : start + size] for start in range(0, len(rows), size))
    ]


def profile(model: Any, batches: Iterable[dict[str, Tensor]], bits: int = 16) -> TextProfile:
    """Profile ``model`` on ``batches`` (section 4 of the paper).

    Raises:
        ValueError: a model without experts, or other ``bits``.
    """
    found = profiling.profile(model, batches, bits=bits)
    num_layers, num_experts = found.frequency.shape
    shares = found.frequency.sort(dim=1, descending=True).values
    by_layer = pd.DataFrame({
        "layer": range(num_layers), "experts": num_experts, "busiest": found.frequency.argmax(dim=1),
        "its_share": shares[:, 0], f"experts_for_{COVERED:.0%}": (shares.cumsum(1) < COVERED).sum(dim=1) + 1,
        "unused": (found.tokens == 0).sum(dim=1),
    })  # fmt: skip
    grid = pd.MultiIndex.from_product([range(num_layers), range(num_experts)], names=["layer", "expert"])
    columns = {"share": found.frequency, "tokens": found.tokens, "attention": found.attention}
    by_expert = pd.DataFrame({name: values.flatten().tolist() for name, values in columns.items()}, index=grid)
    return TextProfile(found.frequency, found.num_tokens, by_layer, by_expert.reset_index())
