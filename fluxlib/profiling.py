"""What a participant's own data activate, seen cheaply (section 4 of the paper).

L MoE layers, E experts per layer, N tokens (padding is never counted).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fluxlib.moe import find
from fluxlib.moe.capture import Capture, LayerCapture, capture
from fluxlib.moe.quantized import QuantizedExperts, quantize
from fluxlib.moe.replace import evaluating, restoring, with_forward

BITS = (2, 3, 4, 8, 16)


@dataclass(frozen=True)
class Profile:
    """Activation of every expert on one participant's data.

    Attributes:
        frequency: ``[L, E]`` share of the layer's routed tokens; rows add up to 1.
        tokens: ``[L, E]`` long, tokens routed to the expert, ``|D|``.
        attention: ``[L, E]`` mean attention received by those tokens in that layer, 0 where there were none.
        num_tokens: tokens seen, N.
        fingerprint: per layer (experts, top-k, hidden size, expert size): the model it is of.
        gate: ``[L, E]`` squared gate weight summed over the tokens, as a share of the layer's sum; empty if it was not
            measured.
        sampling_error: what :func:`frequency_error` to expect of so few samples, against all the data they were drawn
            from, see :func:`expected_error`; NaN for a single sample.
    """

    frequency: Tensor
    tokens: Tensor
    attention: Tensor
    num_tokens: int
    fingerprint: tuple[tuple[int, ...], ...] = ()
    gate: Tensor = field(default_factory=lambda: torch.empty(0))
    sampling_error: float = math.nan


def fingerprint(model: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Shapes of a model's MoE layers: (experts, top-k, hidden size, expert size) of each."""
    return tuple((m.num_experts, m.top_k, m.hidden_size, m.expert_size) for m in find.layers(model))


def check_fits(known: Profile, model: nn.Module) -> None:
    """Raise ValueError if a profile was made with a model of other shapes."""
    expected = fingerprint(model)
    if known.fingerprint != expected:
        raise ValueError(
            "profile is of another model: its layers (experts, top-k, hidden, width) are "
            f"{sorted(set(known.fingerprint))}, this model's are {sorted(set(expected))}"
        )


@torch.no_grad()
def profile(model: nn.Module, batches: Iterable[dict[str, Tensor]], bits: int = 4, attention: bool = True) -> Profile:
    """Profile a model on local batches.

    Args:
        model: with its own experts; it is quantised in place meanwhile and bit-identical afterwards.
        batches: ``input_ids`` and ``attention_mask`` ``[B, T]``; only tokens with mask 1 count.
        bits: of the experts: 2, 3, 4, 8; 16: not quantised.
        attention: also measure attention received, from the weights, O(T^2), of one layer at a time; else it is 0.

    Raises:
        ValueError: other ``bits``, no token in any batch, NaN in an expert.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    num_read = len(find.layers(model)) - 1  # nothing is routed by what the last layer's experts put out
    seen_through = restoring(quantize(model, bits, num_layers=num_read)) if bits < 16 else nullcontext()
    with seen_through, evaluating(model):
        _check_finite(model)
        received, gate, counts, num_tokens = _count(model, batches, attention)
    return of_counts(model, counts, gate, num_tokens, received)


def of_counts(
    model: nn.Module, counts: Tensor, gate: Tensor, num_tokens: int, received: Tensor | None = None
) -> Profile:
    """What passes through ``model`` counted, as a profile.

    Args:
        counts: ``[S, L, E]`` tokens of each sample routed to each expert.
        gate, received: ``[L, E]`` sums over tokens of squared gate weights and of attention (None: not measured).
    """
    tokens = counts.sum(dim=0)
    attention = torch.zeros(tokens.shape) if received is None else received / tokens.clamp(min=1)
    return Profile(
        frequency=tokens / tokens.sum(dim=1, keepdim=True),
        tokens=tokens,
        attention=attention.float(),
        gate=(gate / gate.sum(dim=1, keepdim=True)).float(),
        num_tokens=num_tokens,
        fingerprint=fingerprint(model),
        sampling_error=expected_error(counts),
    )


def expected_error(counts: Tensor) -> float:
    """Frequency error to expect from having seen only some samples of the data; ``counts [S, L, E]`` tokens of each.

    Frequencies are ratios of sums over samples; their standard errors follow from how much samples differ (tokens of
    one sample go to similar experts, so counting tokens would promise too much). A normal variable's mean distance
    from its mean is ``sqrt(2 / pi)`` standard errors. As :func:`frequency_error`; NaN for one sample.
    """
    num_samples, counts = len(counts), counts.double()
    if num_samples < 2:
        return math.nan
    totals = counts.sum(dim=0)
    routed = totals.sum(dim=1, keepdim=True)
    residuals = counts - totals / routed * counts.sum(dim=2, keepdim=True)
    error = (num_samples / (num_samples - 1) * residuals.square().sum(dim=0)).sqrt() / routed
    return float(math.sqrt(2 / math.pi) * error.sum(dim=1).mean())


def frequency_error(estimate: Profile, truth: Profile) -> float:
    """Relative error of the activation frequency, ``sum |f' - f| / sum f``, mean over layers.

    Paper: the measure of its 11.01 % at 4 bits is not given; this one is 0 for equal profiles, 2 at most, and
    gives an expert weight in proportion to its use.
    """
    return float((estimate.frequency - truth.frequency).abs().sum(dim=1).mean())


def rank_correlation(estimate: Profile, truth: Profile) -> float:
    """Spearman's correlation of the experts' frequencies, mean over layers; ties share their mean rank."""
    return float(spearman(estimate.frequency, truth.frequency).mean())


def top_overlap(estimate: Profile, truth: Profile, num_experts: int) -> float:
    """Share of the ``num_experts`` most used experts of all layers on which two profiles agree."""
    first, second = (
        set(p.frequency.flatten().argsort(descending=True, stable=True)[:num_experts].tolist())
        for p in (estimate, truth)
    )
    return len(first & second) / num_experts


def _check_finite(model: nn.Module) -> None:
    """NaN would be routed like any other value."""
    for layer in find.layers(model):
        experts = layer.experts
        if isinstance(experts, QuantizedExperts):
            sums = [packed.unit for packed in experts.packed.values()]
        else:
            sums = [getattr(experts, name).flatten(1).sum(dim=1) for name in find.read_layout(experts).names]
        bad = (~torch.stack([torch.isfinite(s) for s in sums]).all(dim=0)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"model: layer {layer.index} ({layer.name}): experts {bad} hold NaN or infinity")


def _count(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], attention: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Attention and squared gate weights ``[L, E]`` over the tokens, tokens ``[S, L, E]``, number of tokens."""
    sizes = [layer.num_experts for layer in find.layers(model)]
    received = torch.zeros(len(sizes), max(sizes), dtype=torch.float64)
    gate, counts, num_tokens = received.clone(), [], 0
    # The head's logits are not needed, nor what the last layer's experts put out.
    body = getattr(model, "base_model", model)
    last = [find.layers(body)[-1].experts]
    with capture(body, attention=attention) as seen, with_forward(last, lambda _module, _forward: _zeros):
        for batch in batches:
            body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            mask = batch["attention_mask"].bool()
            hits, attended, squares = count(seen, mask, max(sizes))
            received += attended
            gate += squares
            counts.append(hits)
            seen.clear()
            num_tokens += int(mask.sum())
    if num_tokens == 0:
        raise ValueError(f"batches must hold at least one token, got {sum(map(len, counts))} samples of padding only")
    return received, gate, torch.cat(counts), num_tokens


def _zeros(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(hidden)


def count(seen: Capture, mask: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the newest pass through a model routed where; ``mask`` bool ``[B, T]``: padding is not counted.

    Returns:
        On the CPU: tokens ``[B, L, E]`` of each sample, and of all tokens the attention that they received (0 where it
        was not captured) and their squared gate weights, ``[L, E]`` float64.
    """
    hits, attended, squares = zip(*(_count_layer(layer, mask, num_experts) for layer in seen.layers), strict=True)
    return torch.stack(hits, dim=1).cpu(), torch.stack(attended).double().cpu(), torch.stack(squares).double().cpu()


def _count_layer(layer: LayerCapture, mask: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of each sample routed to each expert ``[B, E]``, their attention and squared gate weights ``[E]``."""
    index = layer.top_k_index[-1].view(*mask.shape, -1)
    hits = torch.zeros(*mask.shape, num_experts, device=index.device)
    hits.scatter_(2, index, 1.0)
    hits *= mask[:, :, None]
    attended = torch.zeros(num_experts, device=index.device)
    if layer.attention:
        attended = torch.einsum("bte,bt->e", hits, layer.attention[-1].to(hits))
    weights = layer.top_k_weights[-1].view(index.shape).float()
    squares = torch.zeros_like(hits).scatter_(2, index, weights.square())
    return hits.sum(dim=1).long(), attended, (squares * mask[:, :, None]).sum(dim=(0, 1))


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of two rows of values each ``[..., N]``; equal values share their mean rank."""
    one, other = (rank - rank.mean(dim=-1, keepdim=True) for rank in (ranks(first), ranks(second)))
    return (one * other).sum(dim=-1) / (one.norm(dim=-1) * other.norm(dim=-1)).clamp(min=1e-12)


def ranks(values: Tensor) -> Tensor:
    """Rank of each value in its row ``[..., N]``, from 0; equal values share the mean of theirs."""
    below = (values[..., None, :] < values[..., :, None]).sum(dim=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(dim=-1)
    return below.double() + (equal - 1) / 2
