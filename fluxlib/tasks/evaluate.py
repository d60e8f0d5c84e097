"""Score a model on a task's test samples: the metric of its data set and the loss of the right responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fluxlib.tasks.base import Example, Metric
from fluxlib.tasks.batches import IGNORED, collate, encode, to_device
from fluxlib.tasks.metrics import exact_match, rouge_l

_TEXT_SCORES = {"rouge_l": rouge_l, "exact_match": exact_match}


@dataclass(frozen=True)
class Score:
    """``metric`` between 0 and 1 (higher is better), ``loss`` in nats per response token."""

    metric: float
    loss: float
    num_samples: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    metric: Metric,
    examples: Sequence[Example],
    max_tokens: int,
    batch_size: int = 64,
) -> Score:
    """Mean metric and mean loss per response token over ``examples``; the model is left in its own mode.

    Raises:
        ValueError: no examples.
    """
    if not examples:
        raise ValueError("examples is empty: there is nothing to score")
    was_training, _ = model.training, model.eval()
    try:
        if metric == "accuracy":
            return _choices(model, tokenizer, examples, max_tokens, batch_size)
        return _texts(model, tokenizer, metric, examples, max_tokens, batch_size)
    finally:
        model.train(was_training)


def _choices(model: nn.Module, tokenizer: Any, examples: Sequence[Example], max_tokens: int, batch_size: int) -> Score:
    """An option's score is the summed log-likelihood of its tokens; ties go to the first."""
    rows = [(e, option) for e in examples for option in e.options]
    encoded = [encode(e, tokenizer, max_tokens, option) for e, option in rows]
    nll, count = _response_nll(model, tokenizer, encoded, batch_size)
    correct = total = tokens = 0.0
    first = 0
    for example in examples:
        assert example.answer is not None
        span = nll[first : first + len(example.options)]
        correct += int(span.argmin()) == example.answer
        total += float(span[example.answer])
        tokens += float(count[first + example.answer])
        first += len(example.options)
    return Score(correct / len(examples), total / tokens, len(examples))


def _texts(
    model: nn.Module,
    tokenizer: Any,
    metric: Metric,
    examples: Sequence[Example],
    max_tokens: int,
    batch_size: int,
) -> Score:
    """Greedy generation of at most twice the references' tokens, scored against the reference text."""
    encoded = [encode(example, tokenizer, max_tokens) for example in examples]
    nll, count = _response_nll(model, tokenizer, encoded, batch_size)
    score = 0.0
    by_length = sorted(range(len(examples)), key=lambda i: encoded[i][1])
    for chunk in _chunks(by_length, batch_size):
        longest = max(len(encoded[i][0]) - encoded[i][1] for i in chunk)
        texts = generate(
            model,
            tokenizer,
            [encoded[i][0][: encoded[i][1]] for i in chunk],
            min(2 * longest, max_tokens),
        )
        score += sum(_TEXT_SCORES[metric](text, examples[i].response) for i, text in zip(chunk, texts, strict=True))
    return Score(score / len(examples), float(nll.sum() / count.sum()), len(examples))


def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy continuations of token-id ``prompts``, cut at the end-of-sequence token."""
    length = max(map(len, prompts))
    device = next(model.parameters()).device
    input_ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    out = model.generate(  # type: ignore[operator]
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)  # type: ignore[no-any-return]


def _response_nll(
    model: nn.Module, tokenizer: Any, encoded: Sequence[tuple[list[int], int]], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of each row's response tokens, and their number, both ``[rows]``."""
    device = next(model.parameters()).device
    nll, count = torch.zeros(len(encoded)), torch.zeros(len(encoded))
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    for chunk in _chunks(by_length, batch_size):
        batch = to_device(collate([encoded[i] for i in chunk], tokenizer.pad_token_id), device)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        nll[chunk] = losses.sum(-1).cpu()
        count[chunk] = (labels != IGNORED).sum(-1).float().cpu()
    return nll, count


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
