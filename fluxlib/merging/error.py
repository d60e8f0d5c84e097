"""What merging costs: error of each layer's output, alone and accumulated through the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fluxlib.moe import compact, find
from fluxlib.moe.compact import LayerPlan


@torch.no_grad()
def output_error(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    batches: Iterable[dict[str, Tensor]],
    accumulated: bool = False,
) -> Tensor:
    """Relative error of every MoE layer's output under the plans, over real tokens.

    Args:
        model: with its own experts; bit-identical afterwards.
        plans: one per MoE layer, from :func:`fluxlib.merging.plan` or :func:`fluxlib.merging.discard`.
        batches: ``input_ids`` and ``attention_mask`` ``[B, T]``.
        accumulated: False: each MoE block is given what it is given in the original model, so that only its
            own error shows. True: the hidden states after each decoder layer of the customised model, with
            the errors of all layers before; the last one is the model's.

    Returns:
        ``[L]``: ``|y' - y| / |y|``, Frobenius norms over all tokens; y is the block's output, or the hidden
        state.

    Raises:
        ValueError: no token in any batch, or plans that do not fit the model.
    """
    found = find.layers(model)
    watched = [_decoder_layer(model, layer) if accumulated else layer.block for layer in found]
    blocks = [layer.block for layer in found]
    batches = list(batches)
    training = model.training
    try:
        model.eval()
        kept = [_record(model, watched, batch) for batch in batches]
        compact.customize(model, plans)
    except BaseException:
        model.train(training)
        raise
    wrong, total = torch.zeros(2, len(found), dtype=torch.float64)
    try:
        for batch, (calls, truth) in zip(batches, kept, strict=True):
            if accumulated:
                _, outputs = _record(model, watched, batch)
            else:
                outputs = [_first(block(*a, **k)) for block, (a, k) in zip(blocks, calls, strict=True)]
            mask = batch["attention_mask"].bool().flatten()
            for layer, (ours, theirs) in enumerate(zip(outputs, truth, strict=True)):
                ours, theirs = (_rows(states, mask) for states in (ours, theirs))
                wrong[layer] += (ours - theirs).square().sum().cpu()
                total[layer] += theirs.square().sum().cpu()
    finally:
        compact.restore(model, write=False)
        model.train(training)
    if not (total > 0).all():
        raise ValueError(f"batches must hold at least one token, got {len(batches)} batches of padding only")
    return (wrong / total).sqrt().float()


def _decoder_layer(model: nn.Module, layer: find.MoELayer) -> nn.Module:
    """The element of the model's list of layers that a MoE layer is in."""
    path = layer.name
    while "." in path:
        parent = path.rpartition(".")[0]
        if isinstance(model.get_submodule(parent), nn.ModuleList):
            return model.get_submodule(path)
        path = parent
    raise ValueError(f"model: {layer.name} is in no list of layers")


def _record(
    model: nn.Module, modules: Sequence[nn.Module], batch: dict[str, Tensor]
) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], list[Tensor]]:
    """Arguments and outputs of the modules in one forward pass."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    outputs: dict[int, Tensor] = {}

    def hook(number: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[number], outputs[number] = (args, kwargs), _first(output)

        return keep

    with _hooked(modules, hook):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return [calls[i] for i in range(len(modules))], [outputs[i] for i in range(len(modules))]


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    handles = [m.register_forward_hook(hook(i), with_kwargs=True) for i, m in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _rows(states: Tensor, mask: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1])[mask.to(states.device)].double()
