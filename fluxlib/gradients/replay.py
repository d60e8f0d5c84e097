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

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fluxlib.gradients.answering import answering, choosing, siblings
from fluxlib.moe import find

IGNORED = -100


class Replay:
    """One forward pass of a batch, kept so that it can be run again with other expert outputs.

    Memory: the output of every decoder layer, and of attention and router of the layers asked for.

    Attributes:
        arguments, outputs: per MoE layer asked for, what its experts were called with and what they put out.
        base: ``[B]`` float64, each sample's summed token losses.

    Args:
        model: a causal LM in evaluation mode; it is run without a cache.
        batch: ``input_ids``, ``attention_mask`` (optional), ``labels``, each ``[B, T]``.
        wanted: MoE layers that will be replayed.

    Raises:
        ValueError: no scored token in the batch.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], wanted: Sequence[find.MoELayer]) -> None:
        self.model, self.labels = model, batch["labels"]
        names = [name for name in ("input_ids", "attention_mask") if name in batch]
        self.inputs: dict[str, Tensor] = {name: batch[name] for name in names}
        mask = batch.get("attention_mask")
        self.mask = torch.ones_like(self.labels, dtype=torch.bool) if mask is None else mask.bool()
        scored_tokens(self.labels)
        self.arguments: dict[int, tuple[Tensor, ...]] = {}
        self.outputs: dict[int, Tensor] = {}
        self._kept: dict[int, dict[nn.Module, list[Any]]] = {}
        self._choices: dict[nn.Module, list[Tensor]] = {layer.block: [] for layer in find.layers(model)}
        self._record(wanted)

    def losses(self, layer: find.MoELayer, samples: Tensor, output: Tensor) -> Tensor:
        """Losses of some samples, if the experts of a layer had put out something else.

        Args:
            samples: ``[R]`` rows of the batch, in any order, repeated as needed: only these are run.
            output: what the experts put out for these, in the form of :meth:`output_of`.

        Returns:
            ``[R]`` float64, each row's summed token losses.
        """
        kept = {
            module: [self._of(samples, value) for value in values] for module, values in self._kept[layer.index].items()
        }
        choices = {block: [self._of(samples, index) for index in indices] for block, indices in self._choices.items()}
        answers: dict[nn.Module, list[Any]] = {layer.experts: [output.flatten(0, -2)], **kept}
        inputs = {name: rows[samples] for name, rows in self.inputs.items()}
        with torch.no_grad(), answering(answers), choosing(choices, again=True):
            return sample_losses(self._logits(inputs), self.labels[samples])

    def output_of(self, layer: find.MoELayer, samples: Tensor) -> Tensor:
        """What the experts put out for these samples in the first pass: ``[R, T, H]`` (Llama-4: ``[E, R, T, H]``)."""
        output = self.outputs[layer.index]
        shape = (*self.labels.shape, output.shape[-1])
        return (
            output.view(shape)[samples] if len(output) == shape[0] * shape[1] else output.view(-1, *shape)[:, samples]
        )

    def _of(self, samples: Tensor, value: Any) -> Any:
        """Rows of a kept value that belong to these samples; B or B * T of them lie along its first dimension."""
        if isinstance(value, tuple):
            return tuple(self._of(samples, part) for part in value)
        batch, length = self.labels.shape
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) not in (batch, batch * length):
            return value
        if len(value) == batch:
            return value[samples]
        return value.view(batch, length, *value.shape[1:])[samples].flatten(0, 1)

    def stream_gradient(self) -> Tensor:
        """``[B * T, H]`` gradient of the batch's loss with respect to the last decoder layer's output.

        It needs the final norm and the head only. Along the residual stream the same gradient reaches every
        layer, beside what passes through the layers above; for the last layer it is all there is.
        """
        states, *others = self._last if isinstance(self._last, tuple) else (self._last,)
        leaf = states.detach().requires_grad_()
        answer = (leaf, *others) if isinstance(self._last, tuple) else leaf
        with torch.enable_grad(), answering({module: [answer] for module in self._decoder}):
            total = sample_losses(self._logits(self.inputs), self.labels).sum() / scored_tokens(self.labels).sum()
        return torch.autograd.grad(total, leaf)[0].flatten(0, 1)

    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs, use_cache=False).logits

    def _record(self, wanted: Sequence[find.MoELayer]) -> None:
        self._decoder = decoder_layers(self.model, wanted[0])
        self._last: Any = None
        with ExitStack() as stack, torch.no_grad():
            stack.callback(self._decoder[-1].register_forward_hook(self._set_last).remove)
            for layer in wanted:
                kept = self._kept.setdefault(layer.index, {})
                for module in siblings(self.model, layer):
                    stack.callback(module.register_forward_hook(self._keep(layer, kept)).remove)
                reached, output = self._reached(layer), self._output(layer)
                stack.callback(layer.experts.register_forward_pre_hook(reached, with_kwargs=True).remove)
                stack.callback(layer.experts.register_forward_hook(output).remove)
            stack.enter_context(choosing(self._choices, again=False))
            self.base = sample_losses(self._logits(self.inputs), self.labels)

    def _set_last(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._last = output

    def _keep(self, layer: find.MoELayer, kept: dict[nn.Module, list[Any]]) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            if layer.index not in self.arguments:
                kept.setdefault(module, []).append(output)

        return hook

    def _reached(self, layer: find.MoELayer) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.arguments[layer.index] = (*args, *kwargs.values())

        return hook

    def _output(self, layer: find.MoELayer) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self.outputs[layer.index] = output

        return hook


def decoder_layers(model: nn.Module, layer: find.MoELayer) -> list[nn.Module]:
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


def depth(model: nn.Module, layer: find.MoELayer) -> float:
    """Share of the decoder layers that is not above a MoE layer: 1 / n for the first of n, 1 for the last."""
    stack = decoder_layers(model, layer)
    position = next(i for i, module in enumerate(stack) if layer.block in module.modules())
    return (position + 1) / len(stack)


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
