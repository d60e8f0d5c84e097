"""A tuned model on disk, in the format of its public checkpoint: for its own code and for other engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fluxlib.models import checkpoints
from fluxlib.models.decoder import original_rope

# The class names of the models' own code, which the exported config.json names.
ORIGINAL_ARCHITECTURE = {"llama_moe": "LlamaMoEForCausalLM", "deepseek": "DeepseekForCausalLM"}


def export(
    model: Any,
    path: str | Path,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write ``model``, its own experts in place, to an empty or new folder, in the keys of its public checkpoint.

    One shard of at most ``max_shard_bytes`` is in memory at a time, besides the model.

    Args:
        dtype: type of the stored tensors; None keeps the model's.

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
    tensors = dict(checkpoints.original_tensors(model))
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.numel() * (dtype or tensor.dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for name, keys in split.filename_to_tensors.items():
        contents = {key: tensors[key].detach().to("cpu", dtype).contiguous() for key in keys}
        save_file(contents, path / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
