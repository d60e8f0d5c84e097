"""One participant's point of view: a model, its own batches, and what it measures as rows of a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fluxlib import models, profiling, seeding, tasks
from fluxlib.io import ConfigError
from fluxlib.methods.base import Work
from fluxlib.models.loading import torch_device
from fluxlib.moe import find
from fluxlib.tasks.batches import make_batch, to_device
from fluxlib.tasks.partition import partition

Row = dict[str, Any]
BATCH = 16
"""Samples per batch."""


@dataclass(frozen=True)
class Bench:
    """A model and the samples of one participant of a federation."""

    model: nn.Module
    tokenizer: Any
    model_name: str
    task: str
    seed: int
    parts: Sequence[Sequence[tasks.Example]]
    """Training samples of each participant."""
    held_out: Sequence[dict[str, Tensor]]
    """``[B, T]`` batches of the first's samples that nothing else here has seen; errors are measured on them."""
    max_tokens: int = 128

    def local(self, num_samples: int, participant: int = 0) -> list[dict[str, Tensor]]:
        """The participant's first samples in batches; the same samples whatever their number."""
        device = next(self.model.parameters()).device
        return batches(self.parts[participant][:num_samples], self.tokenizer, self.max_tokens, device)

    def profile(self, num_samples: int, bits: int = 4) -> profiling.Profile:
        """Profile of the first participant's first samples."""
        return profiling.profile(self.model, self.local(num_samples), bits)

    def row(self, study: str, setting: str, value: float, **more: Any) -> Row:
        """One observation; see :func:`row`."""
        return row(study, setting, value, model=self.model_name, task=self.task, seed=self.seed, **more)

    @property
    def num_experts(self) -> int:
        """Routed experts over all layers."""
        return sum(layer.num_experts for layer in find.layers(self.model))


def benches(
    model: str,
    task_names: Iterable[str],
    seeds: Iterable[int],
    held_out: int = 32,
    data_path: str | None = None,
    device: str = "cpu",
    max_tokens: int = 128,
) -> Iterator[Bench]:
    """One bench per task and seed, of eight participants with a Dirichlet (0.5) mix of labels; one model is loaded.

    ``data_path``: files of the public data sets; None: the hub's. ``device``: see
    :func:`~fluxlib.models.loading.torch_device`. A prompt with its response is cut to ``max_tokens``. ConfigError: an
    unknown task, no seed, or no such device, before anything is loaded.
    """
    names, seeds = list(task_names), list(seeds)
    unknown = [name for name in names if name not in tasks.TASKS]
    if unknown or not names:
        raise ConfigError(f"tasks: unknown {unknown}; allowed are {', '.join(tasks.TASKS)}, at least one")
    if not seeds:
        raise ConfigError("seeds: at least one is needed, got none")
    try:
        where = torch_device(device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    loaded, tokenizer = models.load(model, device=where)
    start = {name: tensor.to("cpu", copy=True) for name, tensor in loaded.state_dict().items()}
    for name in names:
        for seed in seeds:
            loaded.load_state_dict(start)
            task = tasks.load(name, seed, path=data_path)
            shares = partition(task.train, 8, seeding.generator(seed, "partition"), "dirichlet", 0.5)
            shares[0] = [shares[0][i] for i in seeding.order(len(shares[0]), seed, "bench")]
            parts = [[task.train[i] for i in share] for share in shares]
            apart = parts[0][-held_out:]
            # Generated tasks repeat themselves: a sample whose copy is held out is held back too.
            copies = {(example.prompt, example.response) for example in apart}
            parts[0] = [e for e in parts[0] if (e.prompt, e.response) not in copies]
            scored = batches(apart, tokenizer, max_tokens, where)
            yield Bench(loaded, tokenizer, Path(model).name, name, seed, parts, scored, max_tokens)


def batches(
    examples: Sequence[tasks.Example], tokenizer: Any, max_tokens: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Samples in batches of :data:`BATCH`, in the given order, on ``device``."""
    parts = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    return [to_device(make_batch(part, tokenizer, max_tokens), device) for part in parts]


def row(
    study: str, setting: str, value: float, *, model: str, task: str = "", seed: int = 0, unit: str = "", **place: Any
) -> Row:
    """One observation, with the columns of ``measurements`` except ``run_id``; ``place`` as far as there is one."""
    fixed = {"study": study, "model": model, "task": task, "seed": seed, "setting": setting}
    return fixed | {"x": None, "layer": None, "expert": None} | place | {"value": float(value), "unit": unit}


def measurements(rows: Iterable[Row], run_id: str) -> pd.DataFrame:
    """Rows as a ``measurements`` table."""
    frame = pd.DataFrame(list(rows))
    frame.insert(0, "run_id", run_id)
    return frame.astype({"x": "float64", "layer": "Int64", "expert": "Int64"})


def interleaved(works: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each work, in turns after one warm-up, so that a busy moment of the machine hits all of them.

    Processor time of this process: on one thread that of an idle machine, whatever else runs beside it.
    """
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    return times


def tuned_experts(known: profiling.Profile, fraction: float, chance: torch.Generator | None = None) -> Tensor:
    """bool ``[L, E]``: the most used experts, FLUX's first choice; with ``chance`` as many drawn at random."""
    uses = known.frequency.flatten()
    count = max(1, round(fraction * len(uses)))
    chosen = uses.topk(count).indices if chance is None else torch.randperm(len(uses), generator=chance)[:count]
    return torch.zeros(len(uses), dtype=torch.bool).index_fill(0, chosen, True).view_as(known.frequency)


def typical_round(num_experts: int, samples: int, tokens_per_sample: int, profiled: int) -> Work:
    """One participant's round of FLUX: a quarter tuned and uploaded, as much changed elsewhere and downloaded.

    Trained in batches of 16; an eighth of the experts probed on 16 samples, on two sides, each half a forward pass.
    """
    quarter, probes = num_experts // 4, num_experts // 8
    return Work(
        num_experts=num_experts, num_tuned=quarter, num_updated=quarter, num_frozen=quarter,
        num_merge_sources=num_experts - quarter, hidden_profile=True,
        train_steps=max(1, samples // BATCH), train_samples=samples, train_tokens=samples * tokens_per_sample,
        profile_samples=profiled, profile_tokens=profiled * tokens_per_sample, profile_bits=4,
        num_quantized=num_experts, probe_samples=BATCH, probe_tokens=BATCH * tokens_per_sample,
        expert_probe_samples=BATCH * probes, expert_probe_tokens=BATCH * probes * tokens_per_sample,
        num_downloaded=quarter, num_uploaded=quarter,
    )  # fmt: skip
