"""Finding a model's experts and reading them one at a time.

Every MoE model of transformers v5 calls its experts as ``experts(hidden [N, H], top_k_index [N, k],
top_k_weights [N, k]) -> [N, H]`` and keeps them as stacks ``[E, ...]``. This module reads that layout:

- :class:`Layout` -- what the stacks are called and how they are stored,
- :class:`MoELayer` and :func:`find` -- where the experts of a model are,
- :func:`expert_tensors` and :func:`write_expert` -- one expert, in the form in which it travels,
- :func:`neurons` and :func:`permute_neurons` -- one expert as a set of interchangeable neurons,
- :class:`ReplacedExperts`, :func:`replace` and :func:`restore` -- another module at the experts' place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model: where its experts are and how large they are.

    Attributes:
        index: 0-based position among the MoE layers (dense layers are not counted).
        name: Dotted path of the experts module in the model.
        experts: The experts module, possibly a :class:`ReplacedExperts`.
        block: Its parent, which also holds the router.
        num_experts: Number of routed experts, E.
        top_k: Experts per token, k.
        hidden_size: Width of the model, H.
        expert_size: Width of one expert, I.
    """

    index: int
    name: str
    experts: nn.Module
    block: nn.Module
    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int


class ReplacedExperts(nn.Module):
    """Base of the modules this project puts at the experts' place; the original waits beside it, unregistered."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.layout = read_layout(original)
        self.num_experts, self.hidden_size, self.expert_size = _sizes(original, self.layout)
        self._original = (original,)
        self.on_restore: list[Callable[[], None]] = []

    @property
    def original(self) -> nn.Module:
        """The module that was replaced."""
        return self._original[0]

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Tensors of one expert, in the canonical form; see :func:`expert_tensors`."""
        return expert_tensors(self.original, expert)

    def write_back(self) -> None:
        """Write what was learned into the original; nothing by default."""


def read_layout(experts: nn.Module) -> Layout:
    """Layout of an experts module.

    Raises:
        ValueError: The module does not hold stacked experts, or does not say how.
    """
    if isinstance(experts, ReplacedExperts):
        return experts.layout
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
    return Layout(
        names=names,
        has_gate=experts.has_gate,
        has_bias=experts.has_bias,
        is_transposed=experts.is_transposed,
        is_concatenated=experts.is_concatenated,
        has_post_norm=getattr(experts, "has_post_expert_norm", False),
    )


def find(model: nn.Module) -> list[MoELayer]:
    """MoE layers of a model, first to last.

    Raises:
        ValueError: The model is dense, or holds experts in a form this library cannot handle; the message names them.
    """
    layers: list[MoELayer] = []
    unknown: list[str] = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if name.rpartition(".")[2] != "experts" and not isinstance(module, ReplacedExperts):
            continue
        try:
            layout = read_layout(module)
        except ValueError as error:
            unknown.append(f"{name}: {error}")
            continue
        sizes = _sizes(module, layout)
        block = modules[name.rpartition(".")[0]]
        layers.append(MoELayer(len(layers), name, module, block, sizes[0], _top_k(model, block, name), *sizes[1:]))
    kind = type(model).__name__
    if unknown:
        raise ValueError(f"model: {kind} has experts in a form that is not handled: " + "; ".join(unknown))
    if not layers:
        raise ValueError(f"model: {kind} has no MoE layer (no fused 'experts' module); a dense model cannot be used")
    return layers


def expert_tensors(experts: nn.Module, expert: int) -> dict[str, Tensor]:
    """Tensors of one expert, by the name of their stack, in its layout: views where the module holds stacks.

    For the usual layout ``{"gate_up_proj": [2I, H], "down_proj": [H, I]}``, gate first.
    """
    if isinstance(experts, ReplacedExperts):
        return experts.expert_tensors(expert)
    _check_expert(expert, experts.down_proj.shape[0])
    return {name: getattr(experts, name).detach()[expert] for name in read_layout(experts).names}


@torch.no_grad()
def write_expert(experts: nn.Module, expert: int, tensors: Mapping[str, Tensor]) -> None:
    """Copy one expert's tensors into the stacks, in place; names that are left out stay as they are.

    Raises:
        ValueError: An unknown name or a wrong shape.
    """
    target = expert_tensors(experts, expert)
    for name, tensor in tensors.items():
        if name not in target:
            raise ValueError(f"tensors: expected names among {sorted(target)}, got {name!r}")
        if tensor.shape != target[name].shape:
            raise ValueError(f"tensors[{name!r}]: expected {tuple(target[name].shape)}, got {tuple(tensor.shape)}")
        target[name].copy_(tensor)


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
    size = layout_expert_size(tensors, layout)
    order = order.to(tensors["down_proj"].device)
    if not torch.equal(order.sort().values, torch.arange(size, device=order.device)):
        raise ValueError(f"order: expected a permutation of 0..{size - 1}, got {order.tolist()}")
    rows = torch.empty_like(tensors[layout.up_name][:, 0] if not layout.is_transposed else tensors[layout.up_name][0])
    rows = rows.to(torch.long)
    for part in _gate_up_rows(size, layout, order.device):
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


def layout_expert_size(tensors: Mapping[str, Tensor], layout: Layout) -> int:
    """Width of an expert, I, from its tensors."""
    return tensors["down_proj"].shape[0 if layout.is_transposed else 1]


def replace(model: nn.Module, layer: MoELayer, new: nn.Module) -> None:
    """Put another module at the experts' place."""
    setattr(layer.block, layer.name.rpartition(".")[2], new)


def replaced(model: nn.Module) -> Iterator[tuple[MoELayer, ReplacedExperts]]:
    """Layers whose experts were replaced, with the module that stands there."""
    for layer in find(model):
        if isinstance(layer.experts, ReplacedExperts):
            yield layer, layer.experts


def restore(model: nn.Module, write: bool = True) -> None:
    """Put the original experts back; ``write=True`` writes what was learned into them first."""
    for layer, module in list(replaced(model)):
        if write:
            module.write_back()
        for undo in module.on_restore:
            undo()
        replace(model, layer, module.original)
    for parameter in model.__dict__.pop("_frozen_parameters", []):
        parameter.requires_grad_(True)


def freeze(model: nn.Module) -> None:
    """Turn ``requires_grad`` off everywhere, remembering for :func:`restore` where it was on."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.__dict__.setdefault("_frozen_parameters", []).extend(trainable)
    for parameter in trainable:
        parameter.requires_grad_(False)


def _sizes(experts: nn.Module, layout: Layout) -> tuple[int, int, int]:
    """Number of experts, hidden size, expert size."""
    if isinstance(experts, ReplacedExperts):
        return experts.num_experts, experts.hidden_size, experts.expert_size
    num, first, second = experts.down_proj.shape
    return (num, second, first) if layout.is_transposed else (num, first, second)


def _top_k(model: nn.Module, block: nn.Module, name: str) -> int:
    """Experts per token, from the router, the block or the configuration."""
    for module in (*block.children(), block):
        for key in ("top_k", "num_experts_per_tok", "num_selects"):
            if isinstance(value := getattr(module, key, None), int):
                return value
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for key in ("num_experts_per_tok", "num_selects", "moe_topk", "top_k_experts"):
            if isinstance(value := getattr(part, key, None), int):
                return value
    raise ValueError(f"model: no number of experts per token found for {name} (router, block, configuration)")


def _gate_up_rows(size: int, layout: Layout, device: torch.device) -> list[Tensor]:
    """Rows of the first matrix that belong to neurons 0..I-1: gate and up, or up alone."""
    one = torch.arange(size, device=device)
    if not layout.has_gate:
        return [one]
    return [one, one + size] if layout.is_concatenated else [2 * one, 2 * one + 1]


def _check_expert(expert: int, num_experts: int) -> None:
    if not 0 <= expert < num_experts:
        raise ValueError(f"expert: expected 0..{num_experts - 1}, got {expert}")
