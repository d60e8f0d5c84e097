"""From examples to tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fluxlib.tasks.base import Example

IGNORED = -100
"""Label of tokens that are not scored: the prompt and the padding."""


def encode(example: Example, tokenizer: Any, max_tokens: int, response: str | None = None) -> tuple[list[int], int]:
    """Token ids of prompt, ``response`` (None: the example's own) and end-of-sequence, and where the response starts.

    A prompt that leaves no room is cut from its left, so that the end of the question and the whole response stay. A
    response that does not fit is cut at its end, without end-of-sequence, where the example allows it; it then has
    what the prompt leaves, but at least half of ``max_tokens``.

    Raises:
        ValueError: a response that must not be cut does not fit into ``max_tokens``.
    """
    text = example.response if response is None else response
    prompt: list[int] = tokenizer(example.prompt)["input_ids"]
    answer: list[int] = tokenizer(" " + text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    if example.may_be_cut and len(answer) >= max_tokens:
        answer = answer[: max_tokens - min(len(prompt), max_tokens // 2)]
    room = max_tokens - len(answer)
    if room < 1:
        raise ValueError(
            f"max_tokens is {max_tokens}, allowed is at least {len(answer) + 1} for a response of {len(answer)} tokens"
        )
    prompt = prompt[-room:] if len(prompt) > room else prompt
    return prompt + answer, len(prompt)


def collate(encoded: Sequence[tuple[list[int], int]], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded batch of what :func:`encode` gives: ``input_ids``, ``attention_mask``, ``labels``, ``[B, T]``."""
    return {
        "input_ids": padded([ids for ids, _ in encoded], pad_token_id),
        "attention_mask": padded([[1] * len(ids) for ids, _ in encoded], 0),
        "labels": padded([[IGNORED] * start + ids[start:] for ids, start in encoded], IGNORED),
    }


def padded(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Rows as one tensor ``[B, T]``; shorter ones are filled up with ``value`` on one side."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value, side)


def make_batch(examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> dict[str, Tensor]:
    """One batch of ``examples`` in the given order."""
    return collate([encode(example, tokenizer, max_tokens) for example in examples], tokenizer.pad_token_id)


def sample_batches(
    examples: Sequence[Example], tokenizer: Any, batch_size: int, max_tokens: int, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Endless batches: passes over ``examples``, each in a new order; one may straddle two. ValueError: no examples."""
    if not examples:
        raise ValueError("examples is empty: a participant needs at least one sample")
    order: list[int] = []
    while True:
        while len(order) < batch_size:
            order += torch.randperm(len(examples), generator=generator).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        yield make_batch([examples[i] for i in chosen], tokenizer, max_tokens)


def to_device(batch: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The batch's tensors on ``device``."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
