"""What leaves a run for others to use: the tuned global model with its card, and a participant's compact model.

- :func:`save_tuned` -- the full model in the keys of its public checkpoint, a model card, ``run.json``
- :func:`save_adapter` -- what adapters learned, for PEFT
- :func:`save_participant` -- merged within a participant's budget by its own data, for inference on its device, with
  its size and speed beside the full model's
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file

from fluxlib import federation, merging, models, profiling, records
from fluxlib.analysis.studies.bench import interleaved
from fluxlib.config import RunConfig, make_config
from fluxlib.federation.checks import make_budgets
from fluxlib.io import ConfigError
from fluxlib.models.saving import WEIGHTS, load_compact, save_compact
from fluxlib.moe import find
from fluxlib.moe.adapter import Adapter
from fluxlib.moe.compact import customize, restore
from fluxlib.tasks.batches import make_batch
from fluxlib.tasks.evaluate import evaluate

RUN = "run.json"
CARDS = Path(__file__).with_name("cards")
"""Model cards, with names for what is filled in."""
PROFILE_SAMPLES, SCORED_SAMPLES = 64, 64
TIMED_SAMPLES, TIMED_TOKENS, TIMED_TURNS = 16, 16, 3
ROUNDING = 1e-5
"""Of a weight in 32 bit, relative to the largest, and some."""


def save_tuned(result: federation.RunResult, config: RunConfig, path: Path | str) -> Path:
    """Write the tuned global model of ``result``, in the keys of its public checkpoint, with tokenizer and card.

    Raises:
        ConfigError: the folder holds a model already, or cannot be written.
    """
    path = Path(path)
    tokenizer = models.load_tokenizer(models.resolve(config.model))
    try:
        models.export(result.model, path, tokenizer)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    versions = {name: records.metadata.version(name) for name in ("fluxlib", "torch", "transformers")}
    (path / RUN).write_text(json.dumps({"config": config.model_dump(mode="json"), "versions": versions}) + "\n")
    (path / "README.md").write_text(model_card(config, result.rounds, versions))
    return path


def model_card(config: RunConfig, rounds: pd.DataFrame, versions: Mapping[str, str]) -> str:
    """A model card in Markdown; every number in it is from ``rounds``."""
    changed = config.settings(changed_only=True).items()
    up, down = (rounds[f"{way}_bytes"].sum() / 1e6 for way in ("uplink", "downlink"))
    card = (CARDS / "tuned.md").read_text()
    return card.format(
        config=config,
        first=rounds.iloc[0],
        last=rounds.iloc[-1],
        clock=Path(config.sized_as).name,
        up=up,
        down=down,
        settings="\n".join(f"| `{setting}` | `{value}` |" for setting, value in changed),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )


@dataclass(frozen=True)
class CompactReport:
    """A participant's compact model beside the full one; both stored in 16 bit, timed in 32 bit here, in turns.

    ``table`` has a row per measure, with its unit, and the columns ``full``, ``compact`` and ``ratio``. Held in memory
    are parameters and buffers; times are processor times; loss and score are on test samples with the participant's
    labels.
    """

    participant: int
    num_slots: int
    num_experts: int
    table: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return vars(self) | {"table": self.table.to_dict(orient="index")}

    def card(self, run_id: str) -> str:
        """A model card in Markdown."""
        rows = "\n".join(f"| {row.Index} | {row.full:.3f} | {row.compact:.3f} | {row.ratio:.2f} |"
                         for row in self.table.itertuples())  # fmt: skip
        return (CARDS / "compact.md").read_text().format(report=self, run_id=run_id, rows=rows)


def save_participant(
    source: Path | str,
    path: Path | str,
    participant: int = 0,
    tune_frac: float | None = None,
    merge_frac: float | None = None,
) -> CompactReport:
    """Compact a tuned model for one participant, write it, and measure it beside the full one.

    The experts that the participant's data uses most keep slots of their own (``B_tune`` of them), the others are
    merged into ``B_non`` slots: sections 4 and 5 of the paper, with nothing left to tune.

    Args:
        source: a folder of :func:`save_tuned`.
        path: an empty or new folder for the compact model.
        participant: of the run, counted from 0.
        tune_frac: share of the experts with a slot of their own; None: the run's.
        merge_frac: merged slots, as a share of the experts; None: the run's.

    Raises:
        ConfigError: not such a folder, no such participant, an impossible budget, or a folder in use.
    """
    source, path = Path(source), Path(path)
    config = _config(source, tune_frac, merge_frac)
    if not 0 <= participant < config.federation.participants:
        raise ConfigError(f"participant is {participant}, allowed is 0 to {config.federation.participants - 1}")
    if (path / WEIGHTS).exists():
        raise ConfigError(f"{path} holds a compact model already; give a new folder")
    model, tokenizer = _load(source)
    task, parts = federation.load_task(config)
    own = [task.train[index] for index in parts[participant]][:PROFILE_SAMPLES]
    batch = make_batch(own, tokenizer, config.training.max_tokens)
    known = profiling.profile(model, [batch], bits=16)
    budget = make_budgets(config, *known.frequency.shape)[participant]
    kept = torch.zeros(known.frequency.numel(), dtype=torch.bool)
    kept[known.frequency.flatten().topk(budget.num_tuned).indices] = True
    kept = kept.view_as(known.frequency)
    plans = merging.plan(model, known, kept, budget.num_merged, config.merging, config.seed)
    held = {example.label for example in own}
    scored = [example for example in task.test if example.label in held][:SCORED_SAMPLES] or task.test[:SCORED_SAMPLES]

    customize(model, plans)
    save_compact(model, path, tokenizer, torch.bfloat16)
    restore(model, write=False)
    small, _ = load_compact(path)
    timed = make_batch(own[:TIMED_SAMPLES], tokenizer, config.training.max_tokens)
    seconds = _seconds({"full": model, "compact": small}, timed)

    measured: dict[str, dict[str, float]] = {}
    for name, candidate in {"full": model, "compact": small}.items():
        score = evaluate(candidate, tokenizer, task.metric, scored, config.training.max_tokens)
        num_bytes = (path / WEIGHTS).stat().st_size if candidate is small else 2 * _parameters(model)
        measured[name] = {
            "stored, 16 bit (MB)": num_bytes / 1e6,
            "parameters (M)": _parameters(candidate) / 1e6,
            "held in memory, 32 bit (MB)": _held_bytes(candidate) / 1e6,
            f"{TIMED_SAMPLES} samples read (ms)": 1e3 * seconds[f"{name} read"],
            "a token written (ms)": 1e3 * seconds[f"{name} write"] / TIMED_TOKENS,
            "loss (nats per token)": score.loss,
            task.metric: score.metric,
        }
    table = pd.DataFrame(measured).assign(ratio=lambda table: table["compact"] / table["full"])
    num_slots = sum(len(plan.tuned) + len(plan.groups) for plan in plans)
    report = CompactReport(participant, num_slots, known.frequency.numel(), table)
    (path / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    (path / "README.md").write_text(report.card(config.run_id))
    return report


def save_adapter(source: Path | str, path: Path | str) -> Path:
    """Write what a run with ``adapter.kind: lora`` learned as an adapter of its base, in PEFT's format.

    A is drawn anew from the run's seed, and B solves ``B A = W_tuned - W_base``, which has an exact solution. PEFT puts
    the product on the stacks of experts (``target_parameters``); an expert that nobody tuned has zeros for B.

    Args:
        source: a folder of :func:`save_tuned`.
        path: an empty or new folder.

    Raises:
        ConfigError: not such a folder, a run that tuned whole experts, weights that are not the base's with a product
            on them, or experts that PEFT would read the wrong way round.
    """
    source, path = Path(source), Path(path)
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
        every = range(before.num_experts)
        fixed = [adapter.fixed((before.index, e), find.expert_tensors(before.experts, e), layout) for e in every]
        names = [name for name, _ in before.experts.named_parameters(recurse=False) if name in fixed[0]]
        for depth, name in enumerate(reversed(names)):  # PEFT wraps one parameter around the other, the last outermost
            old, new = (getattr(layer.experts, name).detach().double() for layer in (before, after))
            change, down = new - old, torch.stack([one[name] for one in fixed]).double()
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
    return path


def _load(folder: Path | str) -> tuple[Any, Any]:
    try:
        return models.load(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no model that can be loaded: {error}") from None


def _config(source: Path, tune_frac: float | None = None, merge_frac: float | None = None) -> RunConfig:
    if not (source / RUN).is_file():
        raise ConfigError(f"{source} has no {RUN}: give a folder that `fluxlib run --save` wrote")
    try:
        found = dict(json.loads((source / RUN).read_text())["config"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{source / RUN} does not hold the settings of a run: was it changed, or cut off?") from None
    given = {"budget.tune_frac": tune_frac, "budget.merge_frac": merge_frac}
    return make_config(found | {name: value for name, value in given.items() if value is not None})


def _parameters(model: Any) -> int:
    """Weights that have to be stored: each once, frozen slots included."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dim() > 1}
    return sum(tensor.numel() for tensor in tensors.values())


def _held_bytes(model: Any) -> int:
    """What the parameters and buffers of a loaded model occupy, whatever shares a storage once."""
    storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.no_grad()
def _seconds(candidates: Mapping[str, Any], batch: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Median seconds of a forward pass (``full read``) and of writing an answer (``full write``), in turns."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    length = int(batch["attention_mask"][0].sum())
    first = {name: tensor[:1, :length] for name, tensor in inputs.items()}
    exact = {"do_sample": False, "min_new_tokens": TIMED_TOKENS, "max_new_tokens": TIMED_TOKENS}
    works: dict[str, Any] = {}
    for name, model in candidates.items():
        works[f"{name} read"] = partial(model, **inputs, use_cache=False)
        works[f"{name} write"] = partial(model.generate, **first, **exact)
    return {work: statistics.median(times) for work, times in interleaved(works, TIMED_TURNS).items()}
