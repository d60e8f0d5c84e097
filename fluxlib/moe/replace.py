"""Another module at the experts' place, or another mode of the model, and what was there before back again."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .find import MoELayer, ReplacedExperts, expert_tensors, layers
from .product import freeze_linears, thaw_linears


def replace_all(model: nn.Module, make: Callable[[MoELayer], ReplacedExperts | None]) -> None:
    """Put what ``make`` gives, if any, at the experts' place of every layer and freeze the rest, or change nothing.

    What does not learn, routers apart, is multiplied by :func:`fluxlib.moe.product.matmul` meanwhile.

    Raises:
        ValueError: Some experts were replaced before.
    """
    found = layers(model)
    for layer in found:
        if isinstance(layer.experts, ReplacedExperts):
            raise ValueError(f"model: experts of {layer.name} were replaced before; call restore(model) first")
    devices = [next(layer.experts.parameters()).device for layer in found]
    model.__dict__["_frozen_parameters"] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        freeze_linears(model, wider_than=max(layer.num_experts for layer in found))
        for layer in found:
            if (new := make(layer)) is not None:
                replace(model, layer, new)
    except BaseException:
        restore(model, write=False)
        for layer, device in zip(found, devices, strict=True):
            layer.experts.to(device)
        raise


def replace(model: nn.Module, layer: MoELayer, new: nn.Module) -> None:
    """Put another module at the experts' place.

    On an accelerator the original of a :class:`ReplacedExperts` moves to host memory: holding both would defeat the
    purpose. It comes back with :func:`restore`. Until then ``model.save_pretrained``, which would write a checkpoint
    without experts, is refused.
    """
    setattr(layer.block, layer.name.rpartition(".")[2], new)
    if isinstance(new, ReplacedExperts):
        if "save_pretrained" not in model.__dict__:
            model.__dict__["save_pretrained"] = types.MethodType(_refuse_saving, model)
        if new.place.device.type != "cpu":
            new.original.to("cpu")


def restore(model: nn.Module, write: bool = True) -> nn.Module:
    """Put the original experts, routing and ``requires_grad`` flags back; nothing happens to an original model.

    With ``write`` what was learned is written into the originals first.
    """
    for layer in layers(model):
        module = layer.experts
        if not isinstance(module, ReplacedExperts):
            continue
        if not write:
            module.discard()
        module.original.to(module.place.device)
        if expert_tensors(module.original, 0)["down_proj"].dtype != module.place.dtype:
            module.original.to(module.place.dtype)
        if write:
            module.write_back()
        for undo in module.on_restore:
            undo()
        replace(model, layer, module.original)
    for parameter in model.__dict__.pop("_frozen_parameters", []):
        parameter.requires_grad_(True)
    if getattr(model.__dict__.get("save_pretrained"), "__func__", None) is _refuse_saving:
        del model.__dict__["save_pretrained"]
    thaw_linears(model)
    return model


@contextmanager
def restoring(model: nn.Module) -> Iterator[nn.Module]:
    """A ``model`` whose experts were replaced, for the duration of a ``with`` block; then the one it was before."""
    try:
        yield model
    finally:
        restore(model, write=False)


@contextmanager
def with_forward(
    modules: Sequence[nn.Module], wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Another ``forward`` for each module, made from its own, for the duration of a ``with`` block."""
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = wrap(module, module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward  # type: ignore[method-assign]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; the one of before afterwards."""
    training, _ = model.training, model.eval()
    try:
        yield
    finally:
        model.train(training)


def _refuse_saving(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Stands at ``save_pretrained`` while experts are replaced."""
    raise ValueError(
        f"model: experts of this {type(model).__name__} are replaced, its checkpoint would lack them; put them back"
        " first (fluxlib.moe.compact.restore)"
    )
