"""A model and a text: which experts the text uses, as tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxlib import profiling

if TYPE_CHECKING:
    import pandas as pd

BATCH_SIZE = 8
COVERED = 0.8
"""Share of a layer's tokens that the busiest experts are counted for."""


@dataclass(frozen=True)
class TextProfile:
    """``frequency [L, E]``, the number of tokens read, and tables with one row per layer and one per expert."""

    frequency: Tensor
    num_tokens: int
    by_layer: pd.DataFrame
    by_expert: pd.DataFrame


def text_batches(text: str, tokenizer: Any, num_tokens: int, max_samples: int) -> list[dict[str, Tensor]]:
    """``text`` cut into samples of ``num_tokens`` tokens, in batches; a shorter rest counts only if it is all there is.

    Raises:
        ValueError: a text without a token, or of unknown tokens alone.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("the text holds no token")
    unknown = getattr(tokenizer, "unk_token_id", None)
    if all(token == unknown for token in ids):
        raise ValueError("the text holds no token that the model's tokenizer knows")
    width = min(num_tokens, len(ids))
    rows = [ids[start : start + width] for start in range(0, len(ids) - width + 1, width)][:max_samples]
    return [
        {"input_ids": torch.tensor(part), "attention_mask": torch.ones(len(part), width, dtype=torch.long)}
        for part in (rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE))
    ]


def profile_table(model: Any, batches: Iterable[dict[str, Tensor]], bits: int = 16) -> TextProfile:
    """Profile ``model`` on ``batches`` (section 4 of the paper).

    Raises:
        ValueError: a model without experts, or other ``bits``.
    """
    import pandas as pd

    found = profiling.profile(model, batches, bits=bits)
    num_layers, num_experts = found.frequency.shape
    shares = found.frequency.sort(dim=1, descending=True).values
    layers = [
        {
            "layer": layer,
            "experts": num_experts,
            "busiest": int(found.frequency[layer].argmax()),
            "its_share": float(shares[layer, 0]),
            f"experts_for_{COVERED:.0%}": int((shares[layer].cumsum(0) < COVERED).sum()) + 1,
            "unused": int((found.tokens[layer] == 0).sum()),
        }
        for layer in range(num_layers)
    ]
    grid = pd.MultiIndex.from_product([range(num_layers), range(num_experts)], names=["layer", "expert"])
    columns = {
        "share": found.frequency.flatten().tolist(),
        "tokens": found.tokens.flatten().tolist(),
        "attention": found.attention.flatten().tolist(),
    }
    by_expert = pd.DataFrame(columns, index=grid).reset_index()
    return TextProfile(found.frequency, found.num_tokens, pd.DataFrame(layers), by_expert)
