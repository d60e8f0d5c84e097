"""What leaves a run for others to use: the tuned global model with its card, and what adapters learned, for PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fluxlib import federation, models, records
from fluxlib.config import RunConfig, make_config
from fluxlib.io import ConfigError, reading
from fluxlib.moe import find
from fluxlib.moe.adapter import Adapter

RUN = "run.json"
CARD = Path(__file__).with_name("card.md")
"""Of a model, with names for what is filled in."""
ROUNDING = 1e-5
"""Of a weight in 32 bit, relative to the largest, and some."""


def save_tuned(result: federation.RunResult, config: RunConfig, path: Path) -> Path:
    """Write the tuned model of ``result`` to a new folder, in its public format, with card; else ConfigError."""
    tokenizer = models.load_tokenizer(models.resolve(config.model))
    try:
        models.export(result.model, path, tokenizer)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    versions = {name: records.metadata.version(name) for name in ("fluxlib", "torch", "transformers")}
    (path / RUN).write_text(json.dumps({"config": config.model_dump(mode="json"), "versions": versions}) + "\n")
    changed, rounds = config.settings(changed_only=True).items(), result.rounds
    up, down = (rounds[f"{way}_bytes"].sum() / 1e6 for way in ("uplink", "downlink"))
    card = CARD.read_text().format(
        config=config,
        first=rounds.iloc[0],
        last=rounds.iloc[-1],
        clock=Path(config.sized_as).name,
        up=up,
        down=down,
        settings="\n".join(f"| `{setting}` | `{value}` |" for setting, value in changed),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )
    (path / "README.md").write_text(card)
    return path


def save_adapter(source: Path, path: Path) -> None:
    """Write what a run with ``adapter.kind: lora`` learned as an adapter of its base, in PEFT's format.

    A is drawn anew from the run's seed, and B solves ``B A = W_tuned - W_base``, which has an exact solution. PEFT puts
    the product on the stacks of experts (``target_parameters``); an expert that nobody tuned has zeros for B.

    ConfigError: no folder of :func:`save_tuned`, a run that tuned whole experts, weights that are not the base's with a
    product on them, or experts that PEFT would read the wrong way round.
    """
    config = _config(source)
    adapter = Adapter.of(config)
    if adapter is None:
        raise ConfigError(f"{source} is of a run with adapter.kind 'none', allowed is 'lora': it tuned whole experts")
    (base, _), (tuned, _) = _load(config.model), _load(source)
    tensors: dict[str, torch.Tensor] = {}
    targets: dict[str, None] = {}
    for before, after in zip(find.layers(base), find.layers(tuned), strict=True):
        layout = find.read_layout(before.experts)
        if layout.is_transposed != getattr(before.experts, "is_transposed", False):
            kind = type(before.experts).__name__
            raise ConfigError(f"{kind} does not say that its stacks are [in, out]: PEFT would take them for [out, in]")
        fixed = adapter.fixed_stacks(before.index, before.experts, range(before.num_experts))
        names = [name for name, _ in before.experts.named_parameters(recurse=False) if name in fixed]
        for depth, name in enumerate(reversed(names)):  # PEFT wraps one parameter around the other, the last outermost
            old, new = (getattr(layer.experts, name).detach().double() for layer in (before, after))
            change, down = new - old, fixed[name].double()
            change = change.mT if layout.is_transposed else change
            up = torch.linalg.lstsq(down.mT, change.mT).solution.mT
            if (up @ down - change).abs().max() > ROUNDING * old.abs().max():
                raise ConfigError(f"{source}: {before.name}.{name} is not that of {config.model} with a product on it")
            prefix = f"base_model.model.{before.name}.{'base_layer.' * depth}"
            tensors[f"{prefix}lora_A.weight"] = (down / (adapter.alpha / adapter.rank)).flatten(0, 1).float()
            tensors[f"{prefix}lora_B.weight"] = up.permute(1, 2, 0).flatten(1).float()
            targets[".".join((*before.name.split(".")[-2:], name))] = None
    about = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": config.model, "inference_mode": True,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": [], "target_parameters": list(targets),
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")


def _load(folder: Path | str) -> tuple[Any, Any]:
    with reading(f"{folder} holds no model that can be loaded"):
        return models.load(folder)


def _config(source: Path) -> RunConfig:
    if not (source / RUN).is_file():
        raise ConfigError(f"{source} has no {RUN}: give a folder that `fluxlib run --save` wrote")
    with reading(f"{source / RUN} does not hold the settings of a run"):
        return make_config(json.loads((source / RUN).read_text())["config"])
