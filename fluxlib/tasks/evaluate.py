"""Score a model on a task's test samples: the metric of its data set and the loss of the right responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fluxlib.moe.replace import evaluating
from fluxlib.tasks.base import Example, Metric
from fluxlib.tasks.batches import IGNORED, collate, encode, padded, to_device
from fluxlib.tasks.metrics import exact_match, rouge_l

T = TypeVar("T")
Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of a response to it."""
BATCH_TOKENS = 8192
"""Tokens that are scored at once, padding included."""
_TEXT_SCORES: dict[str, Callable[[str, str], float]] = {"rouge_l": rouge_l, "exact_match": exact_match}


@dataclass(frozen=True)
class Score:
    """``metric`` between 0 and 1 (higher is better), also ``of_each`` sample; ``loss`` in nats per response token."""

    metric: float
    loss: float
    of_each: tuple[float, ...]


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer: Any, metric: Metric, examples: Sequence[Example], max_tokens: int) -> Score:
    """Mean metric and mean loss per response token over ``examples`` (none: ValueError); the model keeps its mode.

    What occurs several times (options of one question, prompts of one text) is computed once; texts of similar length
    share a batch of at most :data:`BATCH_TOKENS`.
    """
    if not examples:
        raise ValueError("examples is empty: there is nothing to score")
    with evaluating(model):
        if metric == "accuracy":
            return _choices(model, tokenizer, examples, max_tokens)
        return _texts(model, tokenizer, examples, max_tokens, _TEXT_SCORES[metric])


def _choices(model: nn.Module, tokenizer: Any, examples: Sequence[Example], max_tokens: int) -> Score:
    """An option's score is the summed log-likelihood of its tokens; ties go to the first."""
    told = {(e.prompt, option): (e, option) for e in examples for option in e.options}
    known = {key: encode(example, tokenizer, max_tokens, option) for key, (example, option) in told.items()}
    encoded = [known[e.prompt, option] for e in examples for option in e.options]
    nll, count = _response_nll(model, tokenizer, encoded)
    correct, total, tokens, first = [], 0.0, 0.0, 0
    for example in examples:
        assert example.answer is not None
        span = nll[first : first + len(example.options)]
        correct.append(float(int(span.argmin()) == example.answer))
        total += float(span[example.answer])
        tokens += float(count[first + example.answer])
        first += len(example.options)
    return _score(correct, total / tokens)


def _score(of_each: Sequence[float], loss: float) -> Score:
    return Score(sum(of_each) / len(of_each), loss, tuple(of_each))


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
    return _score(scores, float(nll.sum() / count.sum()))


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]
) -> list[str]:
    """Greedy continuations of token-id ``prompts``, each cut at the end-of-sequence token or after its own number."""
    device = next(model.parameters()).device
    input_ids, mask = _left_padded(prompts, tokenizer.pad_token_id)
    out = model.generate(  # type: ignore[operator]
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max(max_new_tokens),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    length = input_ids.shape[1]
    new = [row[length : length + count] for row, count in zip(out, max_new_tokens, strict=True)]
    return tokenizer.batch_decode(new, skip_special_tokens=True)  # type: ignore[no-any-return]


def _response_nll(model: nn.Module, tokenizer: Any, encoded: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of each row's response tokens, and their number, both ``[rows]``."""
    device = next(model.parameters()).device
    rows: dict[Pair, list[int]] = {}
    for index, (ids, start) in enumerate(encoded):
        start = max(start, 1)  # a first token has nothing to be predicted from
        rows.setdefault((tuple(ids[:start]), tuple(ids[start:])), []).append(index)
    nll, count = torch.zeros(len(encoded)), torch.zeros(len(encoded))
    predicted = _from_prompts if _keeps_keys(model) else _from_whole_texts
    for chunk in _chunks(rows, lambda row: len(row[0]) + len(row[1])):
        logits, labels = predicted(model, tokenizer.pad_token_id, device, chunk)
        by_token = logits.float().transpose(1, 2)
        losses = nn.functional.cross_entropy(by_token, labels, ignore_index=IGNORED, reduction="none")
        for row, lost, scored in zip(chunk, losses.sum(-1).cpu(), (labels != IGNORED).sum(-1).cpu(), strict=True):
            nll[rows[row]], count[rows[row]] = lost, scored.float()
    return nll, count


def _keeps_keys(model: nn.Module) -> bool:
    """Whether a prompt's cache is keys and values alone; a recurrent state cannot be handed to several responses."""
    kinds = getattr(getattr(model, "config", None), "layer_types", None) or ()
    return all(kind.endswith(("full_attention", "sliding_attention")) for kind in kinds)


def _from_whole_texts(
    model: nn.Module, pad_token_id: int, device: torch.device, chunk: Sequence[Pair]
) -> tuple[Tensor, Tensor]:
    """Logits ``[B, T, V]`` and labels ``[B, T]`` of pairs of prompt and response, each text read as a whole."""
    texts = [([*prompt, *response], len(prompt)) for prompt, response in chunk]
    batch = to_device(collate(texts, pad_token_id), device)
    labels = batch.pop("labels")[:, 1:]
    return model(**batch).logits[:, :-1], labels


def _from_prompts(
    model: nn.Module, pad_token_id: int, device: torch.device, chunk: Sequence[Pair]
) -> tuple[Tensor, Tensor]:
    """As :func:`_from_whole_texts`, of the responses alone: a prompt is read once, and they go on from its cache."""
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in chunk))}
    mine = torch.tensor([prompts[prompt] for prompt, _ in chunk], device=device)
    input_ids, mask = (x.to(device) for x in _left_padded(list(prompts), pad_token_id))
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    read = model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, logits_to_keep=1, use_cache=True)
    batch = to_device(collate([(list(response), 0) for _, response in chunk], pad_token_id), device)
    labels, logits = batch["labels"], read.logits[mine, -1:]
    if labels.shape[1] == 1:
        return logits, labels
    read.past_key_values.reorder_cache(mine)
    new = batch["attention_mask"][:, :-1]
    rest = model(
        input_ids=batch["input_ids"][:, :-1], attention_mask=torch.cat([mask[mine], new], 1),
        position_ids=position_ids[mine, -1:] + new.cumsum(-1), past_key_values=read.past_key_values,
    )  # fmt: skip
    return torch.cat([logits, rest.logits], 1), labels


def _left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask ``[B, T]``, as generation wants them."""
    ones = [[1] * len(prompt) for prompt in prompts]
    return padded(prompts, pad_token_id, "left"), padded(ones, 0, "left")


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
