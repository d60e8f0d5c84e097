"""Modules of a model that answer from memory, for the time of a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fluxlib.moe import find


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter asks for a gradient; both as before afterwards."""
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def siblings(model: nn.Module, layer: find.MoELayer) -> Iterator[nn.Module]:
    """Modules with a matrix that lie beside the path from the model to a layer's experts; norms are cheaper to run."""
    names = layer.name.split(".")
    for length in range(len(names)):
        parent = model.get_submodule(".".join(names[:length]))
        for name, child in parent.named_children():
            if isinstance(parent, nn.ModuleList) and int(name) > int(names[length]):
                break
            if name != names[length] and any(p.dim() > 1 for p in child.parameters()):
                yield child


@contextmanager
def answering(answers: dict[nn.Module, list[Any]]) -> Iterator[None]:
    """Modules answer their first calls from a list, without computing; later calls are their own."""
    before = {module: module.__dict__.get("forward") for module in answers}
    for module, values in answers.items():
        module.forward = _answer(values, module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        _put_back(before)


@contextmanager
def choosing(choices: dict[nn.Module, list[Tensor]], again: bool) -> Iterator[None]:
    """Blocks record the indices of their top-k, or with ``again`` choose those indices again."""
    before = {block: block.__dict__.get("forward") for block in choices}
    for block, indices in choices.items():
        block.forward = _under(_TopK(indices, again), block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        _put_back(before)


def _under(mode: _TopK, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return run


class _TopK(TorchFunctionMode):
    """While active, every top-k is recorded, or answered with the recorded indices and the values found there."""

    def __init__(self, indices: list[Tensor], again: bool) -> None:
        super().__init__()
        self.indices, self.again, self.position = indices, again, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function."""
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **(kwargs or {}))
        if self.again:
            index = self.indices[self.position]
            self.position += 1
            scores = args[0] if args else (kwargs or {})["input"]
            return torch.return_types.topk((scores.gather(-1, index), index))
        result = func(*args, **(kwargs or {}))
        self.indices.append(result[1])
        return result


def _put_back(before: dict[nn.Module, Any]) -> None:
    for module, forward in before.items():
        if forward is None:
            del module.__dict__["forward"]
        else:
            module.forward = forward  # type: ignore[method-assign]


def _answer(values: list[Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    left = iter(values)

    def respond(*args: Any, **kwargs: Any) -> Any:
        value = next(left, None)
        return forward(*args, **kwargs) if value is None else value

    return respond
