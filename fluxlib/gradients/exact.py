"""True gradient norms of experts, as a by-product of one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fluxlib.gradients.local import by_layer, calls, dot
from fluxlib.gradients.patching import quiet, real_tokens, sample_losses, scored_tokens
from fluxlib.moe import find
from fluxlib.moe.find import ExpertKey


def true_norms(model: nn.Module, batch: dict[str, Tensor], experts: Sequence[ExpertKey]) -> Tensor:
    """Squared gradient norm of each expert, by one backward pass; nothing in the model changes.

    One expert's gradient exists at a time and is thrown away at once, so this costs no optimizer state, no gradient
    memory and a fraction of the backward pass. Arguments are those of :func:`fluxlib.gradients.probe_norms`.

    Returns:
        ``[len(experts)]`` float32 on the CPU, ``|g|^2`` of the batch's loss (mean over its scored tokens); 0 for an
        expert that no token reaches.

    Raises:
        ValueError: an unknown or merged expert, or a batch without a scored token.
    """
    num_scored = scored_tokens(batch["labels"]).sum()
    norms = torch.zeros(len(experts))
    with quiet(model), torch.enable_grad(), ExitStack() as stack:
        for layer, places in by_layer(model, experts):
            watch = _watch(layer, places, real_tokens(batch), norms)
            stack.enter_context(layer.experts.register_forward_hook(watch, with_kwargs=True))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False).logits
        total = sample_losses(logits, batch["labels"]).sum() / num_scored
        if total.requires_grad:
            total.backward()
    return norms


def _watch(layer: find.MoELayer, places: dict[int, list[int]], mask: Tensor, norms: Tensor) -> Any:
    """Hook that waits for the gradient of a layer's output and turns it into norms."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        arguments = [value.detach() for value in (*args, *kwargs.values())]
        if not output.requires_grad:
            output = output.detach().requires_grad_()

        def arrived(gradient: Tensor) -> None:
            with torch.no_grad():
                for expert, call in calls(layer, arguments, list(places), mask).items():
                    own = call.gradients(gradient)
                    norms[places[expert]] = dot(own, own).cpu().float()

        output.register_hook(arrived)
        return output

    return hook
