"""Score a model on a task's test samples: the metric of its data set and the loss of the right responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fluxlib.tasks.base import Example, Metric
from fluxlib.tasks.batches import IGNORED, collate, encode, to_device
from fluxlib.tasks.metrics import exact_match, rouge_l

T = TypeVar("T")
BATCH_TOKENS = 8192
"""Tokens that are scored at once, padding included."""
_TEXT_SCORES: dict[str, Callable[[str, str], float]] = {"rouge_l": rouge_l, "exact_match": exact_match}


@dataclass(frozen=True)
class Score:
    """``metric`` between 0 and 1 (higher is better), ``loss`` in nats per response token."""

    metric: float
    loss: float
    num_samples: int


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer: Any, metric: Metric, examples: Sequence[Example], max_tokens: int) -> Score:
    """Mean metric and mean loss per response token over ``examples`` (none: ValueError); the model keeps its mode.

    What occurs several times (options of one question, prompts of one text) is computed once; texts of similar length
    share a batch of at most :data:`BATCH_TOKENS`.
    """
    if not examples:
        raise ValueError("examples is empty: there is nothing to score")
    was_training, _ = model.training, model.eval()
    try:
        score = _choices if metric == "accuracy" else partial(_texts, score=_TEXT_SCORES[metric])
        return score(model, tokenizer, examples, max_tokens)
    finally:
        model.train(was_training)


def _choices(model: nn.Module, tokenizer: Any, examples: Sequence[Example], max_tokens: int) -> Score:
    """An option's score is the summed log-likelihood of its tokens; ties go to the first."""
    encoded = [encode(e, tokenizer, max_tokens, option) for e in examples for option in e.options]
    nll, count = _response_nll(model, tokenizer, encoded)
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
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], max_tokens: int, score: Callable[[str, str], float]
) -> Score:
    """Greedy generation of at most twice the references' tokens, scored against the reference text."""
    encoded = [encode(example, tokenizer, max_tokens) for example in examples]
    nll, count = _response_nll(model, tokenizer, encoded)
    room: dict[tuple[int, ...], int] = {}
    for ids, start in encoded:
        prompt = tuple(ids[:start])
        room[prompt] = max(room.get(prompt, 0), min(2 * (len(ids) - start), max_tokens))
    texts: dict[tuple[int, ...], str] = {}
    for chunk in _chunks(room, lambda prompt: len(prompt) + room[prompt]):
        texts |= zip(chunk, generate(model, tokenizer, chunk, [room[prompt] for prompt in chunk]), strict=True)
    scores = [score(texts[tuple(ids[:start])], e.response) for (ids, start), e in zip(encoded, examples, strict=True)]
    return Score(sum(scores) / len(examples), float(nll.sum() / count.sum()), len(examples))


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]
) -> list[str]:
    """Greedy continuations of token-id ``prompts``, each cut at the end-of-sequence token or after its own number."""
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
        max_new_tokens=max(max_new_tokens),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = [row[length : length + count] for row, count in zip(out, max_new_tokens, strict=True)]
    return tokenizer.batch_decode(new, skip_special_tokens=True)  # type: ignore[no-any-return]


def _response_nll(model: nn.Module, tokenizer: Any, encoded: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of each row's response tokens, and their number, both ``[rows]``."""
    device = next(model.parameters()).device
    rows: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, (ids, start) in enumerate(encoded):
        rows.setdefault((tuple(ids), start), []).append(index)
    nll, count = torch.zeros(len(encoded)), torch.zeros(len(encoded))
    for chunk in _chunks(rows, lambda row: len(row[0])):
        batch = to_device(collate([(list(ids), start) for ids, start in chunk], tokenizer.pad_token_id), device)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        for row, lost, scored in zip(chunk, losses.sum(-1).cpu(), (labels != IGNORED).sum(-1).cpu(), strict=True):
            nll[rows[row]], count[rows[row]] = lost, scored.float()
    return nll, count


def _chunks(items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Items by length, as many at once as fit into a batch when padded to the longest; at least one."""
    chunk: list[T] = []
    for item in sorted(items, key=length):
        if chunk and (len(chunk) + 1) * length(item) > BATCH_TOKENS:
            yield chunk
            chunk = []
        chunk.append(item)
    if chunk:
        yield chunk
