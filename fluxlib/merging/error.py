"""What merging costs: error of each layer's output, alone and accumulated through the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fluxlib.moe import compact, find
from fluxlib.moe.compact import LayerPlan
from fluxlib.moe.replace import evaluating, restoring


@torch.no_grad()
def output_error(
    model: nn.Module, plans: Sequence[LayerPlan], batches: Iterable[dict[str, Tensor]], accumulated: bool = False
) -> Tensor:
    """Relative error of every MoE layer's output under the plans, over real tokens; the model is the same afterwards.

    Args:
        batches: ``input_ids`` and ``attention_mask`` ``[B, T]``.
        accumulated: False: each MoE block is given what it is given in the original model, so that only its
            own error shows. True: the hidden states after each decoder layer of the customised model, with
            the errors of all layers before; the last one is the model's.

    Returns:
        ``[L]``: ``|y' - y| / |y|``, Frobenius norms over all tokens; y is the block's output, or the hidden state.

    Raises:
        ValueError: no token in any batch, or plans that do not fit the model.
    """
    found, batches = find.layers(model), list(batches)
    blocks = watched = [layer.block for layer in found]
    if accumulated:
        watched = [stack[place] for stack, place in (find.decoder_layers(model, layer) for layer in found)]
    wrong, total = torch.zeros(2, len(found), dtype=torch.float64)
    with evaluating(model):
        kept = [_record(model, watched, batch) for batch in batches]
        with restoring(compact.customize(model, plans)):
            for batch, (calls, truth) in zip(batches, kept, strict=True):
                if accumulated:
                    _, outputs = _record(model, watched, batch)
                else:
                    outputs = [_first(block(*a, **k)) for block, (a, k) in zip(blocks, calls, strict=True)]
                mask = batch["attention_mask"].bool().flatten()
                for layer, pair in enumerate(zip(outputs, truth, strict=True)):
                    ours, theirs = (states.flatten(0, -2)[mask.to(states.device)].double() for states in pair)
                    wrong[layer] += (ours - theirs).square().sum().cpu()
                    total[layer] += theirs.square().sum().cpu()
    if not (total > 0).all():
        raise ValueError(f"batches must hold at least one token, got {len(batches)} batches of padding only")
    return (wrong / total).sqrt().float()


def growth(model: nn.Module, plans: Sequence[LayerPlan], batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """``[L, L]``: error of the hidden state after layer j when layer i alone is merged (Fig. 3b, 8; 0 before it)."""
    batches, as_it_is = list(batches), [LayerPlan(tuned=tuple(sorted(plan.experts))) for plan in plans]
    alone = ([*as_it_is[:layer], plans[layer], *as_it_is[layer + 1 :]] for layer in range(len(plans)))
    return torch.stack([output_error(model, one, batches, accumulated=True) for one in alone])


def _record(
    model: nn.Module, modules: Sequence[nn.Module], batch: dict[str, Tensor]
) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], list[Tensor]]:
    """Arguments and outputs of the modules in one forward pass."""
    calls, outputs = {}, {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[module], outputs[module] = (args, kwargs), _first(output)

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_hook(keep, with_kwargs=True))
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return [calls[module] for module in modules], [outputs[module] for module in modules]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
