"""Finding a model's experts and reading them one at a time.

Every MoE model of transformers v5 calls its experts as ``experts(hidden [N, H], top_k_index [N, k],
top_k_weights [N, k]) -> [N, H]`` and keeps them as stacks ``[E, ...]``, stored as :mod:`fluxlib.moe.layout` says.

- :class:`MoELayer` and :func:`layers` -- where the experts of a model are,
- :func:`expert_tensors` and :func:`write_expert` -- one expert, in the form in which it travels,
- :class:`ReplacedExperts`, :func:`replace` and :func:`restore` -- another module at the experts' place,
- :func:`replacing` -- at all of them, or at none.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout, neurons, permute_neurons, read_layout
from .product import freeze_linears, thaw_linears

__all__ = [
    "Layout",
    "MoELayer",
    "ReplacedExperts",
    "expert_tensors",
    "layers",
    "freeze",
    "neurons",
    "permute_neurons",
    "read_layout",
    "replace",
    "replaced",
    "replacing",
    "restore",
    "write_expert",
]


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
    """Base of the modules this project puts at the experts' place.

    The original waits beside it, unregistered: ``model.to(device)`` leaves it where it is, and so does saving.

    Attributes:
        place: Empty; goes where the model goes and takes its type, for the original to follow.
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

    def bring_back(self) -> nn.Module:
        """The original, moved to where the model is by now and to the type it was given."""
        self.original.to(self.device)
        if expert_tensors(self.original, 0)["down_proj"].dtype != self.place.dtype:
            self.original.to(self.place.dtype)
        return self.original

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
            layout = read_layout(module)
        except ValueError as error:
            unknown.setdefault(str(error), []).append(name)
            continue
        sizes = _sizes(module, layout)
        block = modules[name.rpartition(".")[0]]
        found.append(MoELayer(len(found), name, module, block, sizes[0], _top_k(model, block, name), *sizes[1:]))
    kind = type(model).__name__
    if unknown:
        what = "; ".join(
            f"{error}, at {', '.join(names[:2])} ({len(names)} in all)" for error, names in unknown.items()
        )
        raise ValueError(f"model: {kind} has experts in a form that is not handled ({len(found)} are): {what}")
    if not found and (others := [name for name, module in modules.items() if name and _is_mixture(module)]):
        what = f"{type(modules[others[0]]).__name__}, at {', '.join(others[:2])} ({len(others)} in all)"
        raise ValueError(f"model: {kind} has experts in a form that is not handled (no fused 'experts' module): {what}")
    if not found:
        raise ValueError(f"model: {kind} has no MoE layer (no fused 'experts' module); a dense model cannot be used")
    return found


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


def replace(model: nn.Module, layer: MoELayer, new: nn.Module) -> None:
    """Put another module at the experts' place.

    On an accelerator the original of a :class:`ReplacedExperts` moves to host memory: holding both would defeat the
    purpose. It comes back with :func:`restore`. Until then ``model.save_pretrained``, which would write a checkpoint
    without experts, is refused.
    """
    setattr(layer.block, layer.name.rpartition(".")[2], new)
    if isinstance(new, ReplacedExperts) and "save_pretrained" not in model.__dict__:
        model.__dict__["save_pretrained"] = types.MethodType(_refuse_saving, model)
    if isinstance(new, ReplacedExperts) and new.device.type != "cpu":
        new.original.to("cpu")


@contextmanager
def replacing(model: nn.Module, found: Sequence[MoELayer]) -> Iterator[None]:
    """Freeze a model whose layers are replaced in the ``with`` block; an error there leaves it as it was.

    Args:
        model: A model with its original experts.
        found: Its layers.
    """
    devices = [next(layer.experts.parameters()).device for layer in found]
    try:
        freeze(model)
        yield
    except BaseException:
        restore(model, write=False)
        for layer, device in zip(found, devices, strict=True):
            layer.experts.to(device)
        raise


def replaced(model: nn.Module) -> Iterator[tuple[MoELayer, ReplacedExperts]]:
    """Layers whose experts were replaced, with the module that stands there."""
    for layer in layers(model):
        if isinstance(layer.experts, ReplacedExperts):
            yield layer, layer.experts


def check_original(model: nn.Module) -> list[MoELayer]:
    """MoE layers of a model whose experts are its own.

    Raises:
        ValueError: Some experts were replaced before.
    """
    found = layers(model)
    for layer in found:
        if isinstance(layer.experts, ReplacedExperts):
            raise ValueError(f"model: experts of {layer.name} were replaced before; call restore(model) first")
    return found


def restore(model: nn.Module, write: bool = True) -> None:
    """Put the original experts, routing and ``requires_grad`` flags back; nothing happens to an original model.

    Args:
        model: A customised, quantized or offloaded model.
        write: Write what was learned into the originals first.
    """
    for layer, module in list(replaced(model)):
        if not write:
            module.discard()
        module.bring_back()
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


def freeze(model: nn.Module) -> None:
    """Turn ``requires_grad`` off everywhere, remembering for :func:`restore` where it was on.

    What does not learn, routers apart, is multiplied by the faster library from here on
    (:func:`fluxlib.moe.product.freeze_linears`).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.__dict__.setdefault("_frozen_parameters", []).extend(trainable)
    for parameter in trainable:
        parameter.requires_grad_(False)
    freeze_linears(model, wider_than=max(layer.num_experts for layer in layers(model)))


def check_expert(expert: int, num_experts: int) -> None:
    """Raise ValueError for the number of an expert that does not exist."""
    if not 0 <= expert < num_experts:
        raise ValueError(f"expert: expected 0..{num_experts - 1}, got {expert}")


def _refuse_saving(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Stands at ``save_pretrained`` while experts are replaced."""
    raise ValueError(
        f"model: experts of this {type(model).__name__} are replaced, its checkpoint would lack them; put them back"
        " first (fluxlib.moe.compact.restore), or write a customised model as it is (fluxlib.models.save_compact)"
    )


def _is_mixture(module: nn.Module) -> bool:
    """Whether a module calls itself a mixture of experts."""
    return type(module).__name__.endswith(("MoE", "Moe", "MoeBlock", "Experts"))


def _sizes(experts: Any, layout: Layout) -> tuple[int, int, int]:
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
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for key in ("num_experts_per_tok", "num_selects", "moe_topk", "top_k_experts"):
            if isinstance(value := getattr(part, key, None), int):
                return value
    raise ValueError(f"model: no number of experts per token found for {name} (router, block, configuration)")
