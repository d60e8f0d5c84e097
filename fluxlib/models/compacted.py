"""A customised model on disk: tuned and merged slots instead of all experts, for inference on a device.

A folder of ``config.json`` (of the whole model), ``compact.safetensors`` (everything outside the experts, and the
slots), ``plan.json`` (which expert is in which slot) and the tokenizer. Nothing is pickled, and the whole model is
never in memory when it is loaded.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.initialization import no_init_weights

from fluxlib.moe import find
from fluxlib.moe.compact import CompactExperts, LayerPlan
from fluxlib.moe.replace import replace

WEIGHTS, PLAN = "compact.safetensors", "plan.json"
FORMAT = 1


def save_compact(model: Any, path: str | Path, tokenizer: Any = None, dtype: torch.dtype | None = None) -> Path:
    """Write a customised model (:func:`fluxlib.moe.compact.customize`) to the folder ``path``.

    Args:
        model: with a :class:`~fluxlib.moe.compact.CompactExperts` at every MoE layer.
        path: an empty or new folder.
        tokenizer: written too where given.
        dtype: type of the stored tensors; None keeps the model's.

    Raises:
        ValueError: a layer that is not customised, dropped experts, or a folder that holds such a model.
    """
    path = Path(path)
    if (path / WEIGHTS).exists():
        raise ValueError(f"path: {path} holds {WEIGHTS} already; give a new folder")
    found = find.layers(model)
    plans: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for layer in found:
        experts = layer.experts
        if not isinstance(experts, CompactExperts) or experts.plan.dropped:
            raise ValueError(f"model: {layer.name} is not customised, or drops experts; customize it with merges")
        plans.append({name: asdict(experts.plan)[name] for name in ("tuned", "groups", "weights")})
        for kind, stacks in (("tuned", experts.tuned_stacks()), ("merged", experts.merged_stacks())):
            tensors |= {f"{layer.name}.{kind}_{name}": stack for name, stack in stacks.items()}
    inside = tuple(f"{layer.name}." for layer in found)
    tensors |= {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied:
        tensors.pop("lm_head.weight", None)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: _stored(tensor, dtype) for name, tensor in tensors.items()}, path / WEIGHTS)
    (path / PLAN).write_text(json.dumps({"format": FORMAT, "layers": plans}) + "\n")
    model.config.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


def load_compact(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)`` of a folder that :func:`save_compact` wrote; for inference, and nothing else.

    Raises:
        OSError: files that are missing or cannot be read, by name.
        ValueError: tensors that do not fit the plan, by name.
    """
    path = Path(path)
    for name in (WEIGHTS, PLAN, "config.json"):
        if not (path / name).is_file():
            raise OSError(f"{path} has no {name}; is it a compact model?")
    about = json.loads((path / PLAN).read_text())
    if about.get("format") != FORMAT:
        raise ValueError(f"{path / PLAN}: format is {about.get('format')}, this version reads {FORMAT}")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path / WEIGHTS).items()}
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    for layer, plan in zip(find.layers(model), about["layers"], strict=True):
        _put(model, layer, LayerPlan(**{name: _tuples(value) for name, value in plan.items()}), tensors)
    missing, extra = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    inside = tuple(f"{layer.name}." for layer in find.layers(model))
    lacking = [name for name in missing if not name.startswith(inside) and name != "lm_head.weight"]
    if lacking or extra:
        raise ValueError(f"{path / WEIGHTS}: missing {lacking[:6]}, not of this model {extra[:6]}")
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _put(model: nn.Module, layer: find.MoELayer, plan: LayerPlan, tensors: dict[str, torch.Tensor]) -> None:
    """Build the compact layer without the experts, whose memory has never been touched, and give it its slots."""
    compact = CompactExperts(layer.experts.to("meta"), plan)
    compact.place = torch.empty(0)
    slots = [*((expert,) for expert in plan.tuned), *plan.groups]
    compact.slot_of = torch.tensor([next(i for i, s in enumerate(slots) if e in s) for e in range(layer.num_experts)])
    for kind, stacks in (("tuned", compact.tuned_stacks()), ("merged", compact.merged_stacks())):
        for name, expected in stacks.items():
            found = tensors.pop(f"{layer.name}.{kind}_{name}", None)
            if found is None or found.shape != expected.shape:
                shape = None if found is None else tuple(found.shape)
                raise ValueError(f"{layer.name}.{kind}_{name}: expected {tuple(expected.shape)}, got {shape}")
            value = nn.Parameter(found, requires_grad=False) if kind == "tuned" else found
            setattr(compact, f"{kind}_{name}", value)
    replace(model, layer, compact)


def _stored(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    value = tensor.detach().to("cpu")
    return (value.to(dtype) if dtype is not None and value.is_floating_point() else value).contiguous().clone()


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
