"""How experts are stored: names and orientation of the stacks, and one expert as a set of neurons.

- :class:`Layout`, :func:`read_layout` -- what the stacks of an experts module are called and how they are stored,
- :func:`neurons`, :func:`permute_neurons` -- one expert as interchangeable neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

STACK_NAMES = ("gate_up_proj", "up_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj", "down_proj_bias")

# Classes of transformers that keep fused stacks without declaring their layout through the decorator:
# class name -> (gated, transposed, the gate weight is multiplied into the input and the call is one dense block).
_UNDECLARED = {"Llama4TextExperts": (True, True, True)}


@dataclass(frozen=True)
class Layout:
    """How one experts module stores its experts.

    Attributes:
        names: Stacked parameters, each ``[E, ...]``.
        has_gate: ``gate_up_proj`` (gate and up in one matrix) rather than ``up_proj``.
        has_bias: A bias after both projections.
        is_transposed: Matrices are ``[in, out]`` rather than ``[out, in]``.
        is_concatenated: Gate first, then up; otherwise the two are interleaved.
        has_post_norm: A norm follows every expert, before the gate weight is applied.
        is_dense: Called as ``experts(scaled [E * N, H]) -> [E * N, H]``; rows of experts that were not chosen are
            zero (Llama-4).
    """

    names: tuple[str, ...]
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True
    has_post_norm: bool = False
    is_dense: bool = False

    @property
    def up_name(self) -> str:
        """Name of the stack that is applied first."""
        return "gate_up_proj" if self.has_gate else "up_proj"


def read_layout(experts: nn.Module) -> Layout:
    """Layout of an experts module, original or replaced.

    Raises:
        ValueError: The module does not hold stacked experts, or does not say how.
    """
    if isinstance(known := getattr(experts, "layout", None), Layout):
        return known
    kind = type(experts).__name__
    names = tuple(
        n for n in STACK_NAMES if isinstance(getattr(experts, n, None), Tensor) and getattr(experts, n).dim() > 1
    )
    if "down_proj" not in names or not {"gate_up_proj", "up_proj"} & set(names):
        raise ValueError(f"experts: {kind} holds no stacks gate_up_proj or up_proj, and down_proj; found {names}")
    if kind in _UNDECLARED:
        gated, transposed, dense = _UNDECLARED[kind]
        return Layout(names, has_gate=gated, is_transposed=transposed, is_dense=dense)
    if not hasattr(experts, "is_transposed"):
        raise ValueError(f"experts: {kind} holds stacks {names} but does not declare their layout (is_transposed, ...)")
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    declared = {flag: bool(getattr(experts, flag)) for flag in flags}
    return Layout(names, **declared, has_post_norm=bool(getattr(experts, "has_post_expert_norm", False)))


def neurons(tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """One expert as rows ``[I, 3H]`` (``[I, 2H]`` without a gate): gate, up and down weights of each neuron.

    The order of the rows is arbitrary: an expert computes the same under any permutation of them.
    """
    up = tensors[layout.up_name]
    up = up.T if layout.is_transposed else up
    down = tensors["down_proj"] if layout.is_transposed else tensors["down_proj"].T
    parts = [up[rows] for rows in _gate_up_rows(down.shape[0], layout, up.device)]
    return torch.cat([*parts, down], dim=1)


def permute_neurons(tensors: Mapping[str, Tensor], order: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The same expert with its neurons in another order (``order [I]``, a permutation); a copy."""
    size = tensors["down_proj"].shape[0 if layout.is_transposed else 1]
    order = order.to(tensors["down_proj"].device)
    if not torch.equal(order.sort().values, torch.arange(size, device=order.device)):
        raise ValueError(f"order: expected a permutation of 0..{size - 1}, got {order.tolist()}")
    parts = _gate_up_rows(size, layout, order.device)
    rows = torch.empty(size * len(parts), dtype=torch.long, device=order.device)
    for part in parts:
        rows[part] = part[order]
    out = {}
    for name, tensor in tensors.items():
        if name == "down_proj":
            out[name] = tensor.index_select(0 if layout.is_transposed else 1, order)
        elif name == "down_proj_bias":
            out[name] = tensor.clone()
        else:
            out[name] = tensor.index_select(tensor.dim() - 1 if layout.is_transposed else 0, rows)
    return out


def _gate_up_rows(size: int, layout: Layout, device: torch.device) -> list[Tensor]:
    """Rows of the first matrix that belong to neurons 0..I-1: gate and up, or up alone."""
    one = torch.arange(size, device=device)
    if not layout.has_gate:
        return [one]
    return [one, one + size] if layout.is_concatenated else [2 * one, 2 * one + 1]
