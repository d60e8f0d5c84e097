"""The public checkpoint formats of the two models: their keys, and what a folder on disk holds.

A public checkpoint has one tensor per expert and matrix; the models hold two fused stacks per layer. The table
``FORMATS`` is the only place that knows the names. A folder is compared with its configuration (:func:`check`) before a
weight is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from fluxlib.io import brief, checked, reading

GATE_UP = "mlp.experts.gate_up_proj"
DOWN = "mlp.experts.down_proj"
# Present in older LLaMA-MoE checkpoints: recomputed from the config, and compared with it.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
# Of the noisy training: nothing is computed with it, so a checkpoint may come without it.
OPTIONAL = re.compile(r"mlp\.gate\.weight_noise\.weight$")
# In the order in which transformers looks for them.
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
CHECKSUMS = "checksums.json"
# The cache of the hub names a large file by its SHA-256.
SHA256 = re.compile(r"[0-9a-f]{64}")
# A float of fewer bits: without its scale it is another number.
NARROW = re.compile(r"(F|torch\.float)[468](_|$)")
FLOATS = ("F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")


FORMATS = {
    "llama_moe": tuple(f"mlp.calculator.experts.weight_{matrix}.*" for matrix in ("gate", "up", "down")),
    "deepseek": tuple(f"mlp.experts.*.{matrix}_proj.weight" for matrix in ("gate", "up", "down")),
}
"""By model type: names of one expert's gate, up and down matrix within a layer; ``*`` is the expert's number."""


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of one tensor."""

    shape: tuple[int, ...]
    file: str
    dtype: str
    """As safetensors names it, or as torch does."""


def original_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of one of the project's two models, with its own experts in place, under its public key.

    Experts are views into the stacks, [I, H] (gate, up) and [H, I] (down): nothing is copied.
    """
    keys = FORMATS[model.config.model_type]
    for name, tensor in model.state_dict().items():
        stack = next((stack for stack in (GATE_UP, DOWN) if name.endswith(stack)), None)
        if stack is not None:
            layer, names = name.removesuffix(stack), keys[:2] if stack == GATE_UP else keys[2:]
            for expert, matrix in enumerate(tensor):
                for key, part in zip(names, matrix.chunk(len(names), dim=0), strict=True):
                    yield layer + key.replace("*", str(expert)), part
        elif not (model.config.tie_word_embeddings and name == "lm_head.weight"):
            yield name, tensor


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold ``folder``'s weights, an index's shards in order.

    Raises:
        OSError: no weights at all, an unreadable index, or shards that the index lists and the folder lacks.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise OSError(f"no weights in {folder}: expected one of {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return [found]
    named = read_json(found)
    with reading(f"{found} is not a readable weight index", OSError):
        shards = sorted({str(Path(name)) for name in checked("weight_map", named["weight_map"], dict).values()})
    if outside := [shard for shard in shards if Path(shard).is_absolute() or ".." in Path(shard).parts]:
        raise OSError(f"{found} names files outside its folder: {brief(', '.join(outside))}")
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        listed = f"{len(absent)} of the {len(shards)} shards that {found.name} lists"
        raise OSError(f"{folder} lacks {listed}: {', '.join(absent)}")
    return [folder / shard for shard in shards]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; OSError by name: it holds something else, or cannot be read."""
    with reading(f"{path} holds no JSON object, fetch it again", OSError):
        return checked("it", json.loads(path.read_text()), dict)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return what ``folder``'s weight files hold, read from their headers alone.

    Raises:
        OSError: as :func:`weight_files`, or a file that cannot be read, by name.
        ValueError: a tensor that two files hold, by name.
    """
    stored: dict[str, StoredTensor] = {}
    twice: list[str] = []
    for file in weight_files(folder):
        found = _headers(file)
        twice += [f"{key} in {stored[key].file} and {file.name}" for key in found if key in stored]
        stored |= found
    refuse(folder, {"stored twice": [entry for entry in twice if not IGNORED.search(entry.split()[0])]})
    return stored


def _headers(file: Path) -> dict[str, StoredTensor]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {key: opened.get_slice(key) for key in list(opened.keys())}
                return {k: StoredTensor(tuple(s.get_shape()), file.name, s.get_dtype()) for k, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise OSError(f"{file} cannot be read ({error}): it is cut short or damaged") from error
    try:
        tensors = _read_bin(file, "meta")
        return {key: StoredTensor(tuple(t.shape), file.name, str(t.dtype)) for key, t in tensors.items()}
    except Exception as error:
        # Besides a damaged archive: weights_only refuses whatever is not a tensor with an error of its own.
        raise OSError(f"{file} cannot be read as a file of plain tensors: {error}") from error


def _read_bin(file: Path, device: str) -> dict[str, torch.Tensor]:
    """Tensors of a ``.bin`` file and nothing else; one of before PyTorch 1.6, which is no archive, is read whole."""
    with file.open("rb") as opened:
        is_archive = opened.read(4) == b"PK\x03\x04"
    read: dict[str, torch.Tensor] = torch.load(file, map_location=device, weights_only=True, mmap=is_archive)
    return read


def _read(folder: Path, keys: Set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those tensors of ``folder`` that ``keys`` names, one at a time."""
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for key in set(opened.keys()) & keys:
                    yield key, opened.get_tensor(key)
        else:
            tensors = _read_bin(file, "cpu")
            for key in tensors.keys() & keys:
                yield key, tensors.pop(key)


def check(folder: Path, config: Any) -> None:
    """Compare a folder in a public format with what ``config`` asks for, before any weight is read.

    Raises:
        OSError: missing or unreadable files, by name.
        ValueError: missing, extra, misshapen and doubled keys, weights that are no floating-point numbers of 16 bit or
            more, and frequencies of RoPE that are not those of the config, by name.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    expected = {key: tuple(tensor.shape) for key, tensor in original_tensors(model)}
    found = stored_tensors(folder)
    stored = {key: tensor for key, tensor in found.items() if not IGNORED.search(key)}
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    missing = [key for key in expected if key not in stored]
    extra = [key for key in stored if key not in expected]
    misshapen, other = [], []
    for key, tensor in ((key, stored[key]) for key in expected if key in stored):
        if tensor.shape != expected[key]:
            misshapen.append(f"{key} is {list(tensor.shape)} instead of {list(expected[key])} in {tensor.file}")
        if tensor.dtype not in FLOATS:
            other.append(f"{key} is {tensor.dtype} in {tensor.file}")
    problems = {"missing keys": missing, "extra keys": extra, "misshapen": misshapen}
    problems["no floating-point numbers of 16 bit or more"] = other
    problems["not the frequencies of rope_theta"] = _other_frequencies(folder, found.keys() - stored.keys(), config)
    refuse(folder, problems)


def _other_frequencies(folder: Path, keys: Set[str], config: Any) -> list[str]:
    """Stored frequencies that are not the config's, beyond 16-bit rounding; the original computes with them beyond the
    window, dynamic RoPE excepted."""
    rope, keys = config.rope_parameters, {key for key in keys if IGNORED.search(key)}
    if rope["rope_type"] == "dynamic" or not keys:
        return []
    own = 1 / rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    same = {k for k, v in _read(folder, keys) if v.shape == own.shape and torch.allclose(v.float(), own, 1e-2, 1e-6)}
    return sorted(keys - same)


@torch.no_grad()
def fill(model: Any, folder: Path) -> None:
    """Copy a folder in a public format into ``model``, one tensor at a time, casting to the model's type.

    The target of every tensor is a view into the model (:func:`original_tensors`), so beside the model itself no
    more than the pages of one open file are in memory. Call :func:`check` before.
    """
    targets = dict(original_tensors(model))
    for key in [key for key in targets if OPTIONAL.search(key)]:
        targets[key].zero_()
    for key, tensor in _read(folder, targets.keys()):
        targets[key].copy_(tensor)


def check_finite(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """ValueError, naming the tensors, where NaN or infinity is in what was loaded from ``folder``."""
    floats = ((key, t) for key, t in tensors if t.is_floating_point() and t.numel() and not t.is_meta)
    refuse(folder, {"NaN or infinite": [key for key, t in floats if not all(end.isfinite() for end in t.aminmax())]})


def refuse(folder: Path, problems: dict[str, list[str]]) -> None:
    """Raise a ValueError that names each kind's first problems; do nothing where there is none."""
    lines = []
    for kind, found in problems.items():
        found = [entry for entry in found if not OPTIONAL.search(entry)]
        if found:
            rest = f" and {len(found) - 6} more" if len(found) > 6 else ""
            lines.append(f"{kind}: {', '.join(found[:6])}{rest}")
    if lines:
        raise ValueError(f"{folder} does not hold the weights its config.json describes. {'; '.join(lines)}")


def write_checksums(folder: Path) -> Path:
    """Write the SHA-256 of every weight file of ``folder`` to ``checksums.json``; return its path."""
    path = folder / CHECKSUMS
    sums = {file.name: _sha256(file.resolve(), file.stat().st_mtime_ns) for file in weight_files(folder)}
    path.write_text(json.dumps(sums, indent=2) + "\n")
    return path


def verify_checksums(folder: Path) -> None:
    """Compare the weight files with ``checksums.json``, or with the hub's sums, where there are such; else OSError."""
    path = folder / CHECKSUMS
    blobs = {file.name: file.resolve().name for file in weight_files(folder)}
    sums = {name: blob for name, blob in blobs.items() if SHA256.fullmatch(blob)}
    for name, expected in (sums | (read_json(path) if path.is_file() else {})).items():
        file = folder / name
        if not file.is_file():
            raise OSError(f"{folder} lacks {name}, which its {CHECKSUMS} lists")
        if _sha256(file.resolve(), file.stat().st_mtime_ns) != expected:
            where = "the hub's" if name in sums else f"the one in {CHECKSUMS}"
            raise OSError(f"{file} is corrupted: its SHA-256 is not {where}")


@functools.cache
def _sha256(path: Path, _changed: int) -> str:
    """Once per process for a file as it is: the participants of a run all load the same one."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
