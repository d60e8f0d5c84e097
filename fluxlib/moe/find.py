"""Finding a model's experts and reading them one at a time.

Every MoE model of transformers v5 calls its experts as ``experts(hidden [N, H], top_k_index [N, k],
top_k_weights [N, k]) -> [N, H]`` and keeps them as stacks ``[E, ...]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ExpertKey = tuple[int, int]
"""``(layer, expert)``, both counted over routed experts: layer 0 is the model's first MoE layer."""

STACK_NAMES = ("gate_up_proj", "up_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj", "down_proj_bias")


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
        block: The parent of the experts, which also holds the router.
        num_experts, top_k: Routed experts, E, and experts per token, k.
        hidden_size, expert_size: Width of the model, H, and of one expert, I.
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
    """Base of the modules this project puts at the experts' place.

    The original waits beside it, unregistered: ``model.to(device)`` leaves it where it is, and so does saving.

    Attributes:
        place: Empty; goes where the model goes and takes its type, for the original to follow.
        on_restore: Called when the original comes back.
    """

    place: Tensor

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.layout = read_layout(original)
        self.num_experts, self.hidden_size, self.expert_size = _sizes(original, self.layout)
        self._original = (original,)
        stack = expert_tensors(original, 0)["down_proj"]
        self.register_buffer("place", torch.empty(0, dtype=stack.dtype, device=stack.device), persistent=False)
        self.on_restore: list[Callable[[], None]] = []

    @property
    def original(self) -> nn.Module:
        """The module that was replaced."""
        return self._original[0]

    @property
    def device(self) -> torch.device:
        """Where this module computes."""
        return self.place.device

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Tensors of one expert, in the canonical form; see :func:`expert_tensors`."""
        return expert_tensors(self.original, expert)

    def write_back(self) -> None:
        """Write what was learned into the original; nothing by default."""

    def discard(self) -> None:
        """Forget what was learned; nothing by default."""


def layers(model: nn.Module) -> list[MoELayer]:
    """MoE layers of a model, first to last.

    Raises:
        ValueError: The model is dense, or holds experts in a form this library cannot handle; the message names them.
    """
    found: list[MoELayer] = []
    unknown: dict[str, list[str]] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if name.rpartition(".")[2] != "experts" and not isinstance(module, ReplacedExperts):
            continue
        try:
            sizes = _sizes(module, read_layout(module))
        except ValueError as error:
            unknown.setdefault(str(error), []).append(name)
            continue
        block = modules[name.rpartition(".")[0]]
        found.append(MoELayer(len(found), name, module, block, sizes[0], _top_k(model, block, name), *sizes[1:]))
    kind = type(model).__name__
    if not found and not unknown:
        named = ("MoE", "Moe", "MoeBlock", "Experts")  # by the class, or else it is dense
        mixtures = [name for name, module in modules.items() if name and type(module).__name__.endswith(named)]
        if not mixtures:
            raise ValueError(
                f"model: {kind} has no MoE layer (no fused 'experts' module); a dense model cannot be used"
            )
        unknown[f"no fused 'experts' module: {type(modules[mixtures[0]]).__name__}"] = mixtures
    if unknown:
        what = "; ".join(f"{error}, at {', '.join(at[:2])} ({len(at)} in all)" for error, at in unknown.items())
        raise ValueError(f"model: {kind} has experts in a form that is not handled ({len(found)} are): {what}")
    return found


def decoder_layers(model: nn.Module, layer: MoELayer) -> tuple[list[nn.Module], int]:
    """The model's list of decoder layers, and the place in it that a MoE layer is at; ValueError: it is in no list."""
    path, _, place = layer.name.rpartition(".")
    while path:
        if isinstance(found := model.get_submodule(path), nn.ModuleList):
            return list(found), int(place)
        path, _, place = path.rpartition(".")
    raise ValueError(f"model: {layer.name} is in no list of layers")


def read_layout(experts: nn.Module) -> Layout:
    """Layout of an experts module, original or replaced.

    Raises:
        ValueError: The module does not hold stacked experts, or does not say how.
    """
    if isinstance(experts, ReplacedExperts):
        return experts.layout
    kind = type(experts).__name__
    stacks = {name: stack for name in STACK_NAMES if isinstance(stack := getattr(experts, name, None), Tensor)}
    names = tuple(name for name, stack in stacks.items() if stack.dim() > 1)
    if "down_proj" not in names or not {"gate_up_proj", "up_proj"} & set(names):
        raise ValueError(f"experts: {kind} holds no stacks gate_up_proj or up_proj, and down_proj; found {names}")
    if kind == "Llama4TextExperts":  # of transformers' classes with fused stacks the only one that declares nothing
        return Layout(names, is_transposed=True, is_dense=True)
    if not hasattr(experts, "is_transposed"):
        raise ValueError(f"experts: {kind} holds stacks {names} but does not declare their layout (is_transposed, ...)")
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    declared = {flag: bool(getattr(experts, flag)) for flag in flags}
    return Layout(names, **declared, has_post_norm=bool(getattr(experts, "has_post_expert_norm", False)))


def expert_tensors(experts: nn.Module, expert: int) -> dict[str, Tensor]:
    """Tensors of one expert, by the name of their stack, in its layout: views where the module holds stacks.

    For the usual layout ``{"gate_up_proj": [2I, H], "down_proj": [H, I]}``, gate first.
    """
    if isinstance(experts, ReplacedExperts):
        return experts.expert_tensors(expert)
    stacks = {name: getattr(experts, name).detach() for name in read_layout(experts).names}
    check_expert(expert, len(stacks["down_proj"]))
    return {name: stack[expert] for name, stack in stacks.items()}


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


def check_expert(expert: int, num_experts: int) -> None:
    """Raise ValueError for the number of an expert that does not exist."""
    if not 0 <= expert < num_experts:
        raise ValueError(f"expert: expected 0..{num_experts - 1}, got {expert}")


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


def _sizes(experts: Any, layout: Layout) -> tuple[int, int, int]:
    """Number of experts, hidden size, expert size."""
    if isinstance(experts, ReplacedExperts):
        return experts.num_experts, experts.hidden_size, experts.expert_size
    num, first, second = experts.down_proj.shape
    return (num, second, first) if layout.is_transposed else (num, first, second)


def _top_k(model: nn.Module, block: nn.Module, name: str) -> int:
    """Experts per token, from the router, the block or the configuration."""
    config: Any = getattr(model, "config", None)
    modules, configs = (*block.children(), block), (config, getattr(config, "text_config", None))
    names = ("num_experts_per_tok", "num_selects", "moe_topk", "top_k_experts")
    # A configuration's top_k is that of sampling.
    for place, key in (*itertools.product(modules, ("top_k", *names)), *itertools.product(configs, names)):
        if isinstance(value := getattr(place, key, None), int):
            return value
    raise ValueError(f"model: no number of experts per token found for {name} (router, block, configuration)")
