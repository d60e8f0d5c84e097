"""True gradient norms of experts, as a by-product of one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fluxlib.gradients import expert as local
from fluxlib.gradients.answering import quiet
from fluxlib.gradients.replay import sample_losses, scored_tokens
from fluxlib.moe import find

ExpertKey = tuple[int, int]
"""``(layer, expert)``, counted over MoE layers."""


def true_norms(model: nn.Module, batch: dict[str, Tensor], experts: Sequence[ExpertKey], unit: str = "batch") -> Tensor:
    """Squared gradient norm of each expert, by one backward pass; nothing in the model changes.

    Args:
        model: original or customised; an expert must not be merged with others.
        batch: ``input_ids``, ``attention_mask``, ``labels``, each ``[B, T]``.
        experts: ``(layer, expert)`` pairs.
        unit: ``batch``: ``|g|^2`` of the batch's loss (mean over its scored tokens). ``sample``: mean of
            ``|g_s|^2`` over the samples that reach the expert, each with the loss it would have as a batch of
            its own: k in eq. 3 is then a sample, as the paper writes it.

    Returns:
        ``[len(experts)]`` float32 on the CPU; 0 for an expert that no token reaches.

    Raises:
        ValueError: an unknown or merged expert, or a batch without a scored token.
    """
    with quiet(model), watch(model, batch, experts, unit) as norms, torch.enable_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False).logits
        total = sample_losses(logits, batch["labels"]).sum() / scored_tokens(batch["labels"]).sum()
        if total.requires_grad:
            total.backward()
    return norms


@contextmanager
def watch(
    model: nn.Module, batch: dict[str, Tensor], experts: Sequence[ExpertKey], unit: str = "batch"
) -> Iterator[Tensor]:
    """Norms of experts as a by-product of a backward pass the caller makes, frozen experts included.

    Exactly one forward and backward pass of ``batch`` belongs inside. One expert's gradient exists at a time
    and is thrown away at once, so this costs no optimizer state, no gradient memory and a fraction of the
    backward pass.

    Yields:
        ``[len(experts)]``, filled during the backward pass; see :func:`true_norms` for the arguments.
    """
    if unit not in ("batch", "sample"):
        raise ValueError(f"unit must be 'batch' or 'sample', got {unit!r}")
    scored_tokens(batch["labels"])
    norms = torch.zeros(len(experts))
    with ExitStack() as stack:
        for layer, places in by_layer(model, experts):
            keep = _on_call(layer, places, batch, unit, norms)
            stack.callback(layer.experts.register_forward_hook(keep, with_kwargs=True).remove)
        yield norms


def by_layer(model: nn.Module, experts: Sequence[ExpertKey]) -> list[tuple[find.MoELayer, dict[int, list[int]]]]:
    """The layers that ``experts`` names, first to last, each with the places of its experts in the list."""
    found = find.layers(model)
    places: dict[int, dict[int, list[int]]] = {}
    for place, (layer, expert) in enumerate(experts):
        if not 0 <= layer < len(found):
            raise ValueError(f"experts: the model has MoE layers 0..{len(found) - 1}, got {(layer, expert)}")
        places.setdefault(layer, {}).setdefault(expert, []).append(place)
    return [(found[layer], places[layer]) for layer in sorted(places)]


def _on_call(
    layer: find.MoELayer, places: dict[int, list[int]], batch: dict[str, Tensor], unit: str, norms: Tensor
) -> Any:
    """Hook that waits for the gradient of a layer's output and turns it into norms."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        arguments = [value.detach() for value in (*args, *kwargs.values())]
        if not output.requires_grad:
            output = output.detach().requires_grad_()

        def arrived(gradient: Tensor) -> None:
            with torch.no_grad():
                calls = local.of(layer, arguments, list(places), _mask(batch))
                for expert, call in calls.items():
                    norms[places[expert]] = squared_norm(call, gradient, batch["labels"], unit).cpu().float()

        output.register_hook(arrived)
        return output

    return hook


def squared_norm(call: local.ExpertCall, output_gradient: Tensor, labels: Tensor, unit: str) -> Tensor:
    """Squared norm in the given unit from the gradient of the layer's output ``[N, H]``."""
    if unit == "batch":
        gradients = call.gradients(output_gradient)
        return local.dot(gradients, gradients)
    squares = call.sample_norms(output_gradient, len(labels)) * sample_scale(labels).square()
    return squares.sum() / reached(call, labels).sum().clamp(min=1)


def reached(call: local.ExpertCall, labels: Tensor) -> Tensor:
    """``[B]`` bool: samples with a scored token of which some token goes to the expert."""
    hit = torch.zeros(len(labels), dtype=torch.bool, device=call.rows.device)
    hit[call.samples] = True
    return hit & (scored_tokens(labels) > 0).to(hit.device)


def sample_scale(labels: Tensor) -> Tensor:
    """``[B]`` factor from a sample's share of the batch's loss to the loss it has alone; 0 if it is not scored."""
    counts = scored_tokens(labels).float()
    return torch.where(counts > 0, counts.sum() / counts.clamp(min=1), 0)


def _mask(batch: dict[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["labels"], dtype=torch.bool) if mask is None else mask.bool()
