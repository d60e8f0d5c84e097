"""A tuned model on disk.

- :func:`export`: in the format of its public checkpoint, for its own code and for other engines,
- :func:`save_compact` and :func:`load_compact`: a customised model with its tuned and merged slots in the place of all
  experts, for inference on a device: ``config.json`` (of the whole model), ``compact.safetensors`` (everything outside
  the experts, and the slots), ``plan.json`` (which expert is in which slot) and the tokenizer. Nothing is pickled, and
  the whole model is never in memory when it is loaded.
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

from fluxlib.models import checkpoints
from fluxlib.models.decoder import original_rope
from fluxlib.moe import find
from fluxlib.moe.compact import CompactExperts, LayerPlan
from fluxlib.moe.replace import replace

# The class names of the models' own code, which the exported config.json names.
ORIGINAL_ARCHITECTURE = {"llama_moe": "LlamaMoEForCausalLM", "deepseek": "DeepseekForCausalLM"}


def export(
    model: Any,
    path: str | Path,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write ``model`` to the folder ``path`` in the keys of its public checkpoint; return ``path``.

    One shard is in memory at a time, besides the model.

    Args:
        model: a causal language model with its own experts in place (customised ones restored before).
        path: an empty or new folder.
        tokenizer: written too where given.
        dtype: type of the stored tensors; None keeps the model's.
        max_shard_bytes: a file is closed before it grows past this.

    Raises:
        ValueError: experts of another class in the model, or weights in the folder already.
    """
    path = Path(path)
    if any((path / name).exists() for name in checkpoints.WEIGHT_FILES):
        raise ValueError(f"path: {path} holds model weights already; give a new folder")
    _check_own_experts(model)
    path.mkdir(parents=True, exist_ok=True)
    if model.config.model_type in checkpoints.FORMATS:
        _write_shards(model, path, dtype, max_shard_bytes)
        fields = original_config(model.config, dtype or model.dtype)
        _write_json(path / "config.json", fields)
        model.generation_config.save_pretrained(path)
    else:
        state = model.state_dict()
        cast = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
        model.save_pretrained(path, state_dict=cast, max_shard_size=max_shard_bytes)
        fields = json.loads((path / "config.json").read_text())
        rope = fields.get("rope_parameters") or {}
        # Before version 5 transformers knew no rope_parameters, and took a default without a word.
        fields |= original_rope(rope) if "rope_theta" in rope else {}
        _write_json(path / "config.json", fields)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, path)
    return path


def _save_tokenizer(tokenizer: Any, path: Path) -> None:
    """Write a tokenizer in the words of transformers before 5 as well, where those are others."""
    tokenizer.save_pretrained(path)
    file = path / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    _write_json(file, fields)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def original_config(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return ``config.json``'s fields as the models' own code of transformers 4.3x reads them."""
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    for name in ("dtype", "transformers_version", "head_dim", "mlp_bias", "rope_parameters"):
        fields.pop(name, None)
    fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    fields["architectures"] = [ORIGINAL_ARCHITECTURE[config.model_type]]
    return fields


def _check_own_experts(model: Any) -> None:
    with torch.device("meta"):
        expected = set(AutoModelForCausalLM.from_config(model.config).state_dict())
    foreign = sorted(set(model.state_dict()) ^ expected)
    if foreign:
        raise ValueError(
            "model: its tensors are not those of its configuration; put the original experts back first"
            f" (fluxlib.moe.compact.restore). Differing: {', '.join(foreign[:6])}"
        )


def _write_shards(model: Any, path: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled_bytes = total_bytes = 0
    for key, tensor in checkpoints.original_tensors(model):
        num_bytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if filled_bytes + num_bytes > max_shard_bytes and shards[-1]:
            shards.append({})
            filled_bytes = 0
        shards[-1][key] = tensor
        filled_bytes += num_bytes
        total_bytes += num_bytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
        contents = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in shard.items()}
        save_file(contents, path / f"model{part}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, f"model{part}.safetensors"))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


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
        _save_tokenizer(tokenizer, path)
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
