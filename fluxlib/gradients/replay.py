"""Running a model again from the experts of one layer on.

Whatever was computed before those experts were called does not depend on them. So it is computed once, kept,
and answered from memory: earlier decoder layers, and of the layer itself its attention and its router. A pass
then costs the layers above. It works by module, not by architecture: nothing needs to be known of a model but
where its experts are.

The layers above keep the experts they chose in the first pass; only the gate weights follow. The gradient
knows nothing of a token's next best expert, but a difference of two losses does: one token that changes its
mind would outweigh the slope of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fluxlib.moe import layers

IGNORED = -100


class Replay:
    """One forward pass of a batch, kept so that it can be run again with other expert outputs.

    Memory: the output of every decoder layer, and of attention and router of the layers asked for.

    Args:
        model: a causal LM; it is run in evaluation mode and without a cache.
        batch: ``input_ids``, ``attention_mask`` (optional), ``labels``, each ``[B, T]``.
        wanted: MoE layers that will be replayed.

    Raises:
        ValueError: no scored token in the batch.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], wanted: Sequence[layers.MoELayer]) -> None:
        self.model, self.labels = model, batch["labels"]
        self.inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        mask = batch.get("attention_mask")
        self.mask = torch.ones_like(self.labels, dtype=torch.bool) if mask is None else mask.bool()
        scored_tokens(self.labels)
        self.arguments: dict[int, tuple[Tensor, ...]] = {}
        self.outputs: dict[int, Tensor] = {}
        self._kept: dict[int, dict[nn.Module, list[Any]]] = {}
        self._choices: dict[nn.Module, list[Tensor]] = {layer.block: [] for layer in layers.find(model)}
        self._record(wanted)

    def losses(self, layer: layers.MoELayer, output: Tensor) -> Tensor:
        """``[B]`` float64: each sample's summed token losses if that layer's experts had put out ``output``."""
        answers: dict[nn.Module, list[Any]] = {layer.experts: [output], **self._kept[layer.index]}
        with torch.no_grad(), _answering(answers), _choosing(self._choices, again=True):
            return sample_losses(self._logits(), self.labels)

    def stream_gradient(self) -> Tensor:
        """``[B * T, H]`` gradient of the batch's loss with respect to the last decoder layer's output.

        It needs the final norm and the head only. Along the residual stream the same gradient reaches every
        layer, beside what passes through the layers above; for the last layer it is all there is.
        """
        states, *others = self._last if isinstance(self._last, tuple) else (self._last,)
        leaf = states.detach().requires_grad_()
        answer = (leaf, *others) if isinstance(self._last, tuple) else leaf
        with torch.enable_grad(), _answering({module: [answer] for module in self._decoder}):
            total = sample_losses(self._logits(), self.labels).sum() / scored_tokens(self.labels).sum()
        return torch.autograd.grad(total, leaf)[0].flatten(0, 1)

    def _logits(self) -> Tensor:
        return self.model(**self.inputs, use_cache=False).logits

    def _record(self, wanted: Sequence[layers.MoELayer]) -> None:
        self._decoder = decoder_layers(self.model, wanted[0])
        self._last: Any = None
        with ExitStack() as stack, torch.no_grad():
            stack.callback(self._decoder[-1].register_forward_hook(self._set_last).remove)
            for layer in wanted:
                kept = self._kept.setdefault(layer.index, {})
                for module in _siblings(self.model, layer):
                    stack.callback(module.register_forward_hook(self._keep(layer, kept)).remove)
                reached, output = self._reached(layer), self._output(layer)
                stack.callback(layer.experts.register_forward_pre_hook(reached, with_kwargs=True).remove)
                stack.callback(layer.experts.register_forward_hook(output).remove)
            stack.enter_context(_choosing(self._choices, again=False))
            self._logits()

    def _set_last(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._last = output

    def _keep(self, layer: layers.MoELayer, kept: dict[nn.Module, list[Any]]) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            if layer.index not in self.arguments:
                kept.setdefault(module, []).append(output)

        return hook

    def _reached(self, layer: layers.MoELayer) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.arguments[layer.index] = (*args, *kwargs.values())

        return hook

    def _output(self, layer: layers.MoELayer) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self.outputs[layer.index] = output

        return hook


def decoder_layers(model: nn.Module, layer: layers.MoELayer) -> list[nn.Module]:
    """The list of decoder layers that a MoE layer is in an element of.

    Raises:
        ValueError: it is in none.
    """
    path = layer.name
    while path:
        path = path.rpartition(".")[0]
        if isinstance(found := model.get_submodule(path), nn.ModuleList):
            return list(found)
    raise ValueError(f"model: {layer.name} is in no list of layers")


def depth(model: nn.Module, layer: layers.MoELayer) -> float:
    """Share of the decoder layers that is not above a MoE layer: 1 / n for the first of n, 1 for the last."""
    stack = decoder_layers(model, layer)
    position = next(i for i, module in enumerate(stack) if layer.block in module.modules())
    return (position + 1) / len(stack)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B, T - 1]`` float32 cross entropy of each next token, 0 where it is not scored."""
    predictions = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    return nn.functional.cross_entropy(
        predictions.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED
    )


def sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B]`` float64: summed token losses of each sample; their sum over scored tokens is the model's loss."""
    return token_losses(logits, labels).double().sum(dim=1)


def scored_tokens(labels: Tensor) -> Tensor:
    """``[B]`` number of scored tokens of each sample; ValueError if there is none in the whole batch."""
    counts = (labels[:, 1:] != IGNORED).sum(dim=1)
    if not counts.any():
        raise ValueError(f"batch must have at least one scored token, got {len(labels)} samples of padding only")
    return counts


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


def _siblings(model: nn.Module, layer: layers.MoELayer) -> Iterator[nn.Module]:
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
def _answering(answers: dict[nn.Module, list[Any]]) -> Iterator[None]:
    """Modules answer their first calls from a list, without computing; later calls are their own."""
    before = {module: module.__dict__.get("forward") for module in answers}
    for module, values in answers.items():
        module.forward = _answer(values, module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        _put_back(before)


@contextmanager
def _choosing(choices: dict[nn.Module, list[Tensor]], again: bool) -> Iterator[None]:
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
