"""Models by name: the embedded mini models, the public ones, and any folder or hub id."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.initialization import no_init_weights

from fluxlib.config import data_dir
from fluxlib.io import reading
from fluxlib.models import checkpoints
from fluxlib.models.deepseek_moe import DeepseekMoeConfig
from fluxlib.models.llama_moe import LlamaMoeConfig
from fluxlib.moe.product import takes_grouped

MINI = ("mini-llama-moe", "mini-deepseek-moe")
_LLAMA = partial(LlamaMoeConfig, max_position_embeddings=4096, rms_norm_eps=1e-5)
_DEEPSEEK = partial(DeepseekMoeConfig, max_position_embeddings=4096)
# Short name -> (hub id, configuration). They are those of the hub, so that planning needs no network.
PUBLIC: dict[str, tuple[str, Any]] = {
    "llama-moe-3.0b": ("llama-moe/LLaMA-MoE-v1-3_0B-2_16", partial(_LLAMA, num_selects=2, score_scale_factor=8.0)),
    "llama-moe-3.5b": ("llama-moe/LLaMA-MoE-v1-3_5B-4_16", partial(_LLAMA, score_scale_factor=4.0)),
    "llama-moe-3.5b-2-8": (
        "llama-moe/LLaMA-MoE-v1-3_5B-2_8",
        partial(_LLAMA, num_experts=8, num_selects=2, score_scale_factor=4.0),
    ),
    "deepseek-moe-16b": ("deepseek-ai/deepseek-moe-16b-base", _DEEPSEEK),
    "deepseek-moe-16b-chat": ("deepseek-ai/deepseek-moe-16b-chat", _DEEPSEEK),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def known() -> list[str]:
    """Return the names that :func:`load` understands besides folders and hub ids."""
    return [*MINI, *PUBLIC]


def config(name_or_path: str | Path) -> Any:
    """Return the configuration of a model without its weights; the public models' without a network.

    ``name_or_path`` is a name of :func:`known`, a folder or its ``config.json``, or a hub id.

    Raises:
        OSError: an unknown name, or a folder without a readable ``config.json``.
        ValueError: a model type that needs code from the hub, which is never run.
    """
    name = str(name_or_path).removesuffix("/config.json")
    for short, (hub_id, make) in PUBLIC.items():
        if name in (short, hub_id):
            return make()
    if name in MINI or Path(name).exists():
        return _read_config(_local_folder(name))
    return _from_hub(
        name, lambda offline: AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=offline)
    )


def resolve(name_or_path: str | Path) -> Path:
    """Return the local folder of a model: embedded, given, or fetched from the hub (never any code); else OSError."""
    name = str(name_or_path)
    if name in MINI or Path(name).exists():
        return _local_folder(name)
    hub_id = PUBLIC[name][0] if name in PUBLIC else name
    return _from_hub(name, lambda offline: _download(hub_id, offline))


def load(
    name_or_path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)``; the model in evaluation mode, all its parameters of type ``dtype``, on ``device``.

    The tokenizer comes first. A checkpoint in one of the public formats is then compared with its configuration
    before a weight is read, and copied into the fused experts tensor by tensor, so that host memory stays near the
    size of the model in ``dtype`` (and near nothing where ``device`` is a GPU). No code from the hub is run and no
    file is unpickled into anything but tensors. Where transformers' grouped products do not take ``dtype`` or the
    widths of the experts, it computes expert by expert (``eager``), with a warning.

    Raises:
        OSError: missing, unreadable or corrupted files, missing shards, by name.
        ValueError: missing, extra or misshapen keys, values that are not finite, by name.
    """
    folder = resolve(name_or_path)
    settings = _read_config(folder)
    tokenizer = load_tokenizer(folder)
    checkpoints.verify_checksums(folder)
    if settings.model_type in checkpoints.FORMATS:
        model = _load_public_format(folder, settings, dtype, device)
        checkpoints.check_finite(folder, checkpoints.original_tensors(model))
    else:
        if not hasattr(settings, "quantization_config"):
            stored = checkpoints.stored_tensors(folder).items()
            narrow = [f"{key} is {tensor.dtype}" for key, tensor in stored if checkpoints.NARROW.match(tensor.dtype)]
            checkpoints.refuse(folder, {"fewer than 16 bit": narrow})
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=settings, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        # transformers only warns of these.
        lists = {"missing keys": "missing_keys", "extra keys": "unexpected_keys", "misshapen": "mismatched_keys"}
        lists |= {"errors": "error_msgs"}
        checkpoints.refuse(folder, {kind: sorted(map(str, info.get(name, ()))) for kind, name in lists.items()})
        checkpoints.check_finite(folder, model.state_dict().items())
        model.to(device)
    _choose_products(model)
    return model.eval(), tokenizer


def _choose_products(model: Any) -> None:
    """Let transformers compute expert by expert where its grouped products would raise."""
    if getattr(model.config, "_experts_implementation", None) != "grouped_mm":
        return
    stacks = (stack for name, stack in model.named_parameters() if name.endswith("experts.down_proj"))
    odd = next((stack for stack in stacks if not takes_grouped(stack.dtype, stack.shape[1:])), None)
    if odd is not None:
        what = f"{odd.dtype} and {' x '.join(map(str, odd.shape[1:]))}"
        logging.getLogger(__name__).warning("no grouped products of experts in %s: one by one, which is slower", what)
        model.set_experts_implementation("eager")


def _load_public_format(folder: Path, settings: Any, dtype: torch.dtype, device: str | torch.device) -> Any:
    checkpoints.check(folder, settings)
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    checkpoints.fill(model, folder)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        checkpoints.read_json(folder / "generation_config.json")
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _local_folder(name: str) -> Path:
    folder = data_dir() / "models" / name if name in MINI else Path(name)
    if not folder.is_dir():
        hint = "; FLUXLIB_DATA must name the repository's data folder" if name in MINI else ""
        raise OSError(f"{name}: {folder} is not a folder{hint}")
    return folder


def _from_hub(name: str, fetch: Callable[[bool], Any]) -> Any:
    """Fetch what cannot be anything but a hub id; nothing is waited for where the hub has no address."""
    if name not in PUBLIC and not HUB_ID.fullmatch(name):
        near = difflib.get_close_matches(name, known(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise OSError(f"{name!r} is no folder, no known name ({', '.join(known())}) and no hub id (owner/name){hint}")
    offline = _is_offline()
    try:
        return fetch(offline)
    except OSError as error:
        why = "the hub cannot be reached, and it is not in the cache" if offline else error
        raise OSError(
            f"{name!r} is no folder, no known name ({', '.join(known())}) and could not be fetched from the hub: {why}"
        ) from error


def _is_offline() -> bool:
    """Whether the hub's name cannot be resolved; behind a proxy that says nothing."""
    from huggingface_hub import constants

    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return constants.HF_HUB_OFFLINE
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return True
    return False


def _download(hub_id: str, offline: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError

    weights = "*.safetensors"
    try:
        if offline:
            weights = "*"  # whatever an earlier call chose lies in the cache
        elif not any(name.endswith(".safetensors") for name in HfApi().list_repo_files(hub_id)):
            weights = "pytorch_model*.bin"
    except HFValidationError as error:
        raise OSError(str(error)) from error
    except Exception:
        weights = "*"
    patterns = ["*.json", "tokenizer*", "*.model", weights]
    folder = snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["*.py"], local_files_only=offline)
    return Path(folder)


def _read_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise OSError(f"{folder} has no config.json")
    checkpoints.read_json(folder / "config.json")
    with reading(f"{folder / 'config.json'} cannot be used", ValueError):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model's folder; it pads on the right. OSError: there is none that can be read here."""
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        if importlib.util.find_spec("sentencepiece") is None:
            raise OSError(
                f"{folder} has tokenizer.model and no tokenizer.json: reading it takes the package sentencepiece, which"
                " is not installed (pip install sentencepiece==0.2.1); or add the tokenizer.json of the same model"
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its files are read by several libraries
        raise OSError(f"{folder} has no tokenizer that can be read: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def torch_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first GPU, else Apple's, else the CPU.

    ValueError: this machine has none of that name; the message lists what it has.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    there = [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]  # the best first
    if name == "auto":
        return torch.device(there[0])
    if name not in there and f"{name}:0" not in there:
        raise ValueError(f"torch_device is {name!r}, allowed on this machine are auto, {', '.join(there)}")
    return torch.device(name)
