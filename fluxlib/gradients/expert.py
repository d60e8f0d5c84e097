"""One expert by itself, on the tokens that were routed to it: its output under changed weights, its gradients.

Everything about an expert's gradient except the gradient of the layer's output is local: with that one ``[N,
H]`` tensor, :meth:`ExpertCall.gradients` gives the gradient of any expert of the layer. Without it,
:meth:`ExpertCall.output` gives the layer's change under changed weights, and no weight of the model is ever
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluxlib.moe import find
from fluxlib.moe.compact import CompactExperts
from fluxlib.moe.dispatch import dense_choices
from fluxlib.moe.expert import Activation, Matrices, to_matrices

Signs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Rows of +-1 per sample, for inputs and outputs of the first and of the second matrix."""

Factors = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Inputs and output gradients of both matrices, ``[n, ...]`` each: a gradient is the product of such a pair."""


@dataclass(frozen=True)
class ExpertCall:
    """An expert and the n real tokens routed to it, in float32 (float64 in a float64 model).

    Attributes:
        states: ``[n, H]`` inputs.
        weight: ``[n, 1]`` gate weights.
        rows: ``[n]`` rows of the layer's output that the expert adds to.
        samples: ``[n]`` sequence of the batch each token belongs to.
        matrices: weights in computing order.
        activation: the model's own gate and norm.
        layout: of the stacks.
    """

    states: Tensor
    weight: Tensor
    rows: Tensor
    samples: Tensor
    matrices: Matrices
    activation: Activation
    layout: find.Layout

    def output(self, change: Change | None = None, size: float = 0.0) -> Tensor:
        """``[n, H]`` weighted output with weights ``W + size * change``."""
        projected = _affine(self.states, self.matrices.up, self.matrices.up_bias)
        if change is not None:
            projected = projected + size * change.up(self.states, self.samples)
        act = self.activation.function(projected)
        result = _affine(act, self.matrices.down, self.matrices.down_bias)
        if change is not None:
            result = result + size * change.down(act, self.samples)
        if self.activation.post_norm is not None:
            result = self.activation.post_norm(result)
        return result * self.weight

    def gradients(self, output_gradient: Tensor) -> Matrices:
        """Weight gradients from the gradient of the layer's output, ``[N, H]``."""
        (states, projected), (act, result) = self.factors(output_gradient)
        has_bias = self.layout.has_bias
        return Matrices(
            up=states.T @ projected,
            down=act.T @ result,
            up_bias=projected.sum(dim=0) if has_bias else None,
            down_bias=result.sum(dim=0) if has_bias else None,
        )

    def sample_norms(self, output_gradient: Tensor, num_samples: int) -> Tensor:
        """``[S]`` squared norm of each sample's own gradient.

        ``|sum_t a_t b_t'|^2 = sum_tu (a_t a_u)(b_t b_u)`` over the token pairs of a sample: no gradient is formed.
        """
        total = self.states.new_zeros(len(self.rows))
        same = self.same_sample()
        for inputs, outputs in self.factors(output_gradient):
            pairs = inputs @ inputs.T + (1 if self.layout.has_bias else 0)
            total += (same * pairs * (outputs @ outputs.T)).sum(dim=1)
        return per_sample(total, self.samples, num_samples)

    def same_sample(self) -> Tensor:
        """``[n, n]``, 1 for two tokens of one sample."""
        return (self.samples[:, None] == self.samples).to(self.states)

    def factors(self, output_gradient: Tensor) -> Factors:
        """Inputs and output gradients of both matrices."""
        incoming = output_gradient[self.rows].to(self.states) * self.weight
        projected = _affine(self.states, self.matrices.up, self.matrices.up_bias)
        act, pull = self.activation.backward(projected)
        if self.activation.post_norm is not None:
            with torch.enable_grad():
                leaf = _affine(act, self.matrices.down, self.matrices.down_bias).detach().requires_grad_()
                normed = self.activation.post_norm(leaf)
            incoming = torch.autograd.grad(normed, leaf, incoming)[0]
        return (self.states, pull(incoming @ self.matrices.down.T)), (act, incoming)


@dataclass(frozen=True)
class Change:
    """A direction in an expert's weight space, the same for all samples or another one in each.

    Attributes:
        matrices: the direction Z.
        signs: with them sample s is changed by ``diag(in_s) Z diag(out_s)``: Gaussian like Z, and uncorrelated between
            samples.
        shift: what is added in each sample, as a multiple of a gradient that exists in factors only.
    """

    matrices: Matrices
    signs: Signs | None = None
    shift: Shift | None = None

    def up(self, states: Tensor, samples: Tensor) -> Tensor:
        """Change of the first matrix's output."""
        signs = (None, None) if self.signs is None else self.signs[:2]
        moved = _signed(states, samples, self.matrices.up, self.matrices.up_bias, *signs)
        return moved if self.shift is None else moved + self.shift.of(states, 0)

    def down(self, act: Tensor, samples: Tensor) -> Tensor:
        """Change of the second matrix's output."""
        signs = (None, None) if self.signs is None else self.signs[2:]
        moved = _signed(act, samples, self.matrices.down, self.matrices.down_bias, *signs)
        return moved if self.shift is None else moved + self.shift.of(act, 1)


@dataclass(frozen=True)
class Shift:
    """Each sample's gradient ``sum_t a_t b_t'`` times a number of its own, without forming it.

    Attributes:
        factors: inputs a and output gradients b, ``[n, ...]`` each, of both matrices.
        same: ``[n, n]``, the multiple for two tokens of one sample, 0 for tokens of different ones.
        has_bias: whether there are biases to shift too.
    """

    factors: Factors
    same: Tensor
    has_bias: bool

    def of(self, inputs: Tensor, matrix: int) -> Tensor:
        """What the shift adds to the output of a matrix for the inputs ``[n, ...]`` of the same tokens."""
        first, second = self.factors[matrix]
        return (self.same * (inputs @ first.T + (1 if self.has_bias else 0))) @ second


def per_sample(values: Tensor, samples: Tensor, num_samples: int) -> Tensor:
    """``[S]`` sums of ``values [n]`` over the tokens of each sample."""
    return values.new_zeros(num_samples).index_add_(0, samples, values)


def of(
    layer: find.MoELayer, arguments: Sequence[Tensor], experts: Sequence[int], mask: Tensor
) -> dict[int, ExpertCall]:
    """Calls of some experts of a layer.

    Args:
        arguments: what the experts module was called with.
        mask: bool ``[B, T]``, real tokens.

    Raises:
        ValueError: an expert that is not in the layer, or is merged with others, so that it has no gradient
            of its own.
    """
    module = layer.experts
    layout, activation = find.read_layout(module), _activation(module)
    hidden = arguments[0]
    if layout.is_dense:
        index, weights = dense_choices(hidden, layer.num_experts)
    else:
        index, weights = (value for value in _choices(*arguments[1:3]))
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    tokens = mask.flatten().to(hidden.device)
    calls = {}
    for expert in experts:
        _check(layer, expert)
        rows, position = torch.where((index == expert) & tokens.repeat(len(index) // len(tokens))[:, None])
        calls[expert] = ExpertCall(
            states=hidden[rows].to(wide),
            weight=weights[rows, position, None].to(wide),
            rows=rows,
            samples=rows % len(tokens) // mask.shape[1],
            matrices=to_matrices(find.expert_tensors(module, expert), layout, wide),
            activation=activation,
            layout=layout,
        )
    return calls


def dot(first: Matrices, second: Matrices) -> Tensor:
    """Scalar product of two sets of weights."""
    total = (first.up * second.up).sum() + (first.down * second.down).sum()
    for one, other in ((first.up_bias, second.up_bias), (first.down_bias, second.down_bias)):
        if one is not None and other is not None:
            total = total + (one * other).sum()
    return total


def _activation(module: nn.Module) -> Activation:
    held = getattr(module, "activation", None)
    return held if isinstance(held, Activation) else Activation(module)


def _choices(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Index and weights, in whichever order the model passes them."""
    return (second, first) if first.is_floating_point() else (first, second)


def _check(layer: find.MoELayer, expert: int) -> None:
    if not 0 <= expert < layer.num_experts:
        raise ValueError(f"experts: layer {layer.index} has 0..{layer.num_experts - 1}, got {expert}")
    if isinstance(layer.experts, CompactExperts):
        for group in layer.experts.plan.groups:
            if expert in group and len(group) > 1:
                raise ValueError(f"experts: {expert} of layer {layer.index} is merged with others: {list(group)}")


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else x @ weight + bias


def _signed(
    x: Tensor, samples: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, after: Tensor | None
) -> Tensor:
    if before is None or after is None:
        return _affine(x, weight, bias)
    return _affine(x * before[samples], weight, bias) * after[samples]
