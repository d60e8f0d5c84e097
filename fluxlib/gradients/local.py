"""One expert by itself, on the tokens that were routed to it: its output under changed weights, its gradients.

Everything about an expert's gradient except the gradient of the layer's output is local: with that one ``[N,
H]`` tensor, :meth:`ExpertCall.gradients` gives the gradient of any expert of the layer. Without it,
:meth:`ExpertCall.output` gives the layer's change under changed weights, and no weight of the model is ever
written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxlib.moe import find
from fluxlib.moe.compact import CompactExperts
from fluxlib.moe.dispatch import dense_choices
from fluxlib.moe.expert import Activation, Matrices, to_matrices
from fluxlib.moe.find import ExpertKey


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
        frame: with an adapter its A's as ``[in, rank]``: changes and gradients are then those of B, ``[rank, out]``.
    """

    states: Tensor
    weight: Tensor
    rows: Tensor
    samples: Tensor
    matrices: Matrices
    activation: Activation
    frame: Matrices | None

    @property
    def learned(self) -> Matrices:
        """What a change is to look like: the weights, or something of B's shape."""
        if self.frame is None:
            return self.matrices
        return combined(lambda down, weight: down.T @ weight, self.frame, self.matrices)

    def output(self, change: Matrices | None = None, size: float = 0.0) -> Tensor:
        """``[n, H]`` weighted output with weights ``W + size * change``."""
        if change is not None and self.frame is not None:
            change = combined(torch.matmul, self.frame, change)
        projected = _affine(self.states, self.matrices.up, self.matrices.up_bias)
        if change is not None:
            projected = projected + size * _affine(self.states, change.up, change.up_bias)
        act = self.activation.function(projected)
        result = _affine(act, self.matrices.down, self.matrices.down_bias)
        if change is not None:
            result = result + size * _affine(act, change.down, change.down_bias)
        if self.activation.post_norm is not None:
            result = self.activation.post_norm(result)
        return result * self.weight

    def gradients(self, output_gradient: Tensor) -> Matrices:
        """Weight gradients from the gradient of the layer's output, ``[N, H]``."""
        own = self.matrices
        incoming = output_gradient[self.rows].to(self.states) * self.weight
        act, pull = self.activation.backward(_affine(self.states, own.up, own.up_bias))
        if self.activation.post_norm is not None:
            incoming = self.activation.norm_backward(_affine(act, own.down, own.down_bias), incoming)[1]
        projected = pull(incoming @ own.down.T)
        if self.frame is not None:
            return Matrices((self.states @ self.frame.up).T @ projected, (act @ self.frame.down).T @ incoming)
        return Matrices(
            up=self.states.T @ projected,
            down=act.T @ incoming,
            up_bias=None if own.up_bias is None else projected.sum(dim=0),
            down_bias=None if own.down_bias is None else incoming.sum(dim=0),
        )


def by_layer(model: torch.nn.Module, experts: Sequence[ExpertKey]) -> list[tuple[find.MoELayer, dict[int, list[int]]]]:
    """The layers that ``experts`` names, first to last, each with the places of its experts in the list.

    ValueError: one that does not exist, or that is merged with others, so that it has no gradient of its own.
    """
    found = find.layers(model)
    places: dict[int, dict[int, list[int]]] = {}
    for place, (index, expert) in enumerate(experts):
        if not 0 <= index < len(found):
            raise ValueError(f"experts: the model has MoE layers 0..{len(found) - 1}, got {(index, expert)}")
        layer = found[index]
        if not 0 <= expert < layer.num_experts:
            raise ValueError(f"experts: layer {index} has 0..{layer.num_experts - 1}, got {expert}")
        for group in layer.experts.plan.groups if isinstance(layer.experts, CompactExperts) else ():
            if expert in group and len(group) > 1:
                raise ValueError(f"experts: {expert} of layer {index} is merged with others: {list(group)}")
        places.setdefault(index, {}).setdefault(expert, []).append(place)
    return [(found[index], places[index]) for index in sorted(places)]


def calls(
    layer: find.MoELayer, arguments: Sequence[Tensor], experts: Sequence[int], mask: Tensor
) -> dict[int, ExpertCall]:
    """Calls of some experts of a layer, whose module was called with ``arguments``; ``mask [B, T]``: real tokens."""
    module, hidden = layer.experts, arguments[0]
    layout = find.read_layout(module)
    held = getattr(module, "activation", None)
    activation = held if isinstance(held, Activation) else Activation(module)
    if layout.is_dense:
        index, weights = dense_choices(hidden, layer.num_experts)
    else:  # in whichever order the model passes them
        index, weights = sorted(arguments[1:3], key=torch.is_floating_point)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    tokens = mask.flatten().to(hidden.device)
    found = {}
    for expert in experts:
        fixed = module.fixed([expert]) if isinstance(module, CompactExperts) else None
        rows, position = torch.where((index == expert) & tokens.repeat(len(index) // len(tokens))[:, None])
        found[expert] = ExpertCall(
            states=hidden[rows].to(wide),
            weight=weights[rows, position, None].to(wide),
            rows=rows,
            samples=rows % len(tokens) // mask.shape[1],
            matrices=to_matrices(find.expert_tensors(module, expert), layout, wide),
            activation=activation,
            frame=Matrices(*(fixed[name][0].T.to(wide) for name in (layout.up_name, "down_proj"))) if fixed else None,
        )
    return found


def combined(function: Callable[..., Tensor], *sets: Matrices) -> Matrices:
    """``function`` of the like weights of each set; without the biases that the first set has not."""
    weights = zip(*(vars(one).values() for one in sets), strict=True)
    return Matrices(*(None if one[0] is None else function(*one) for one in weights))  # type: ignore[arg-type]


def dot(first: Matrices, second: Matrices) -> Tensor:
    """Scalar product of two sets of weights."""
    products = vars(combined(torch.mul, first, second)).values()
    return sum(product.sum() for product in products if product is not None)  # type: ignore[return-value]


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else x @ weight + bias
