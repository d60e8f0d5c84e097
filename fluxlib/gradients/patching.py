"""Running a model again from the experts of one layer on, with another output patched in.

What was computed before those experts were called does not depend on them. So it is computed once, kept, and answered
from memory: earlier decoder layers, and of the layer itself its attention and its router. A pass then costs the layers
above. It works by module, not by architecture: nothing needs to be known of a model but where its experts are.

The layers above keep the experts they chose in the first pass; only the gate weights follow. The gradient knows nothing
of a token's next best expert, but a difference of two losses does: one token that changes its mind would outweigh the
slope of all others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fluxlib.moe import find
from fluxlib.moe.replace import evaluating, with_forward
from fluxlib.tasks.batches import IGNORED


class CachedForward:
    """One forward pass of a batch, kept to be run again with other outputs of the ``wanted`` layers' experts.

    Memory: the output of every decoder layer, and of attention and router of the layers asked for.

    Attributes:
        arguments, outputs: per layer asked for, what its experts were called with and what they put out.
        base: ``[B]`` float64, each sample's summed token losses.
        mask: ``[B, T]`` bool, real tokens.

    Raises:
        ValueError: no scored token in the batch.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], wanted: Sequence[find.MoELayer]) -> None:
        self.model, self.labels, self.mask = model, batch["labels"], real_tokens(batch)
        scored_tokens(self.labels)
        self.inputs = {name: rows for name, rows in batch.items() if name != "labels"}
        self.arguments: dict[int, tuple[Tensor, ...]] = {}
        self.outputs: dict[int, Tensor] = {}
        self._kept: dict[int, dict[nn.Module, list[Any]]] = {layer.index: {} for layer in wanted}
        self._choices: dict[nn.Module, list[Tensor]] = {layer.block: [] for layer in find.layers(model)}
        self._decoder, _ = find.decoder_layers(model, wanted[0])
        self._last: list[Any] = []
        with ExitStack() as stack, torch.no_grad():
            last = self._decoder[-1].register_forward_hook(lambda _m, _a, output: self._last.append(output))
            for handle in (last, *itertools.chain.from_iterable(map(self._watch, wanted))):
                stack.enter_context(handle)
            stack.enter_context(_choosing(self._choices, again=False))
            self.base = sample_losses(self._logits(self.inputs), self.labels)

    def losses(self, layer: find.MoELayer, samples: Tensor, output: Tensor) -> Tensor:
        """``[R]`` float64 summed token losses of some samples, if the experts of a layer had put out something else.

        Args:
            layer: one of those asked for.
            samples: ``[R]`` rows of the batch, in any order, repeated as needed: only these are run.
            output: what the experts put out for these, in the form of :meth:`output_of`.
        """
        kept = self._kept[layer.index]
        answers = {module: [self._rows(samples, value) for value in values] for module, values in kept.items()}
        answers[layer.experts] = [output.flatten(0, -2)]
        choices = {block: [self._rows(samples, index) for index in indices] for block, indices in self._choices.items()}
        inputs = {name: rows[samples] for name, rows in self.inputs.items()}
        with torch.no_grad(), _answering(answers), _choosing(choices, again=True):
            return sample_losses(self._logits(inputs), self.labels[samples])

    def output_of(self, layer: find.MoELayer, samples: Tensor) -> Tensor:
        """What the experts put out for these samples in the first pass: ``[R, T, H]`` (Llama-4: ``[E, R, T, H]``)."""
        output = self.outputs[layer.index]
        shape = (*self.labels.shape, output.shape[-1])
        if len(output) == shape[0] * shape[1]:
            return output.view(shape)[samples]
        return output.view(-1, *shape)[:, samples]

    def stream_gradient(self) -> Tensor:
        """``[B * T, H]`` gradient of the batch's loss with respect to the last decoder layer's output.

        It needs the final norm and the head only. Along the residual stream the same gradient reaches every
        layer, beside what passes through the layers above; for the last layer it is all there is.
        """
        (last,) = self._last
        states, *others = last if isinstance(last, tuple) else (last,)
        leaf = states.detach().requires_grad_()
        answer = (leaf, *others) if isinstance(last, tuple) else leaf
        with torch.enable_grad(), _answering({module: [answer] for module in self._decoder}):
            total = sample_losses(self._logits(self.inputs), self.labels).sum() / scored_tokens(self.labels).sum()
        return torch.autograd.grad(total, leaf)[0].flatten(0, 1)

    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs, use_cache=False).logits

    def _rows(self, samples: Tensor, value: Any) -> Any:
        """Rows of a kept value that belong to these samples; B or B * T of them lie along its first dimension."""
        if isinstance(value, tuple):
            return tuple(self._rows(samples, part) for part in value)
        batch, length = self.labels.shape
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) not in (batch, batch * length):
            return value
        if len(value) == batch:
            return value[samples]
        return value.view(batch, length, *value.shape[1:])[samples].flatten(0, 1)

    def _watch(self, layer: find.MoELayer) -> Iterator[Any]:
        """Hooks that keep what the first pass makes until a layer's experts have answered."""

        def beside(module: nn.Module, _args: Any, output: Any) -> None:
            if layer.index not in self.arguments:
                self._kept[layer.index].setdefault(module, []).append(output)

        def at_experts(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self.arguments[layer.index], self.outputs[layer.index] = (*args, *kwargs.values()), output

        for module in _siblings(self.model, layer):
            yield module.register_forward_hook(beside)
        yield layer.experts.register_forward_hook(at_experts, with_kwargs=True)


def sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B]`` float64: summed losses of each sample's scored tokens; their sum over the tokens is the model's loss."""
    scored = labels[:, 1:] != IGNORED
    predictions = logits[:, :-1][scored]
    wide = predictions if predictions.dtype == torch.float64 else predictions.float()
    losses = nn.functional.cross_entropy(wide, labels[:, 1:][scored], reduction="none")
    sample = scored.nonzero()[:, 0]
    return losses.new_zeros(len(labels), dtype=torch.float64).index_add(0, sample, losses.double())


def scored_tokens(labels: Tensor) -> Tensor:
    """``[B]`` number of scored tokens of each sample; ValueError if there is none in the whole batch."""
    counts = (labels[:, 1:] != IGNORED).sum(dim=1)
    if not counts.any():
        raise ValueError(f"batch must have at least one scored token, got {len(labels)} samples of padding only")
    return counts


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """``[B, T]`` bool: what is no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["labels"], dtype=torch.bool) if mask is None else mask.bool()


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter asks for a gradient; both as before afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _siblings(model: nn.Module, layer: find.MoELayer) -> Iterator[nn.Module]:
    """Modules with a matrix that lie beside the path from the model to a layer's experts; norms are cheaper to run."""
    names = layer.name.split(".")
    for length in range(len(names)):
        parent = model.get_submodule(".".join(names[:length]))
        for name, child in parent.named_children():
            if isinstance(parent, nn.ModuleList) and int(name) > int(names[length]):
                break
            if name != names[length] and any(p.dim() > 1 for p in child.parameters()):
                yield child


def _answering(answers: dict[nn.Module, list[Any]]) -> Any:
    """Modules answer their first calls from a list, without computing; later calls are their own."""

    def answer(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        left = list(answers[module])
        return lambda *args, **kwargs: left.pop(0) if left else forward(*args, **kwargs)

    return with_forward(list(answers), answer)


def _choosing(choices: dict[nn.Module, list[Tensor]], again: bool) -> Any:
    """Blocks record the indices of their top-k, or with ``again`` choose those indices again."""

    def under(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        mode = _TopK(choices[block], again)

        def run(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return forward(*args, **kwargs)

        return run

    return with_forward(list(choices), under)


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
