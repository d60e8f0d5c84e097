"""What FLUX adds to a round on this machine, and the server's assignment: how fast.

    python benchmarks/merging.py                 minutes; `make bench` runs it
    python benchmarks/merging.py --quick         few repeats, to see that it runs

A merge, a profile and a round's probes against one training step; clustering of all layers at once and layer by layer;
assignment for 1,000 participants. How good they are is measured in notebooks 01 to 03. All timings of a section are
taken in turns in one process, on one thread unless told otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers as tf
from _measure import Row, interleaved, machine, options_of, summary, table, use_clock, write
from torch import Tensor, nn

from fluxlib import gradients, merging, models, profiling, roles, tasks
from fluxlib.analysis.studies.merging import SHAPES, synthetic
from fluxlib.config import MergingConfig
from fluxlib.moe import compact, find
from fluxlib.tasks.batches import make_batch

CPU = torch.device("cpu")
MODELS = ("mini-llama-moe", "mini-deepseek-moe")
TASK = "mini-gsm8k"
TUNED, MERGED = 0.25, 0.25


class Work:
    """A mini model, one task's batches, and what a participant would do with them."""

    def __init__(self, name: str, task: str, seed: int, num_samples: int = 16) -> None:
        self.model, self.tokenizer = models.load(name)
        examples = tasks.load(task, seed=0).train
        start = 4 * num_samples * seed
        parts = [examples[start + i * num_samples : start + (i + 1) * num_samples] for i in range(3)]
        self.first, self.second, self.held_out = (make_batch(part, self.tokenizer, 96) for part in parts)
        self.probed = make_batch(parts[0][:8], self.tokenizer, 96)
        self.layers = find.layers(self.model)
        self.experts = [(layer.index, e) for layer in self.layers for e in range(layer.num_experts)]
        self.generator = torch.Generator().manual_seed(seed)

    def profile(self, bits: int = 4) -> profiling.Profile:
        """Of two batches."""
        return profiling.profile(self.model, [self.first, self.second], bits=bits)

    def tuned(self) -> Tensor:
        """A quarter of the experts, drawn at random: who is tuned is not what is measured here."""
        mask = torch.zeros(len(self.experts), dtype=torch.bool)
        mask[torch.randperm(len(mask), generator=self.generator)[: round(TUNED * len(mask))]] = True
        return mask.view(len(self.layers), -1)

    @property
    def num_merged(self) -> int:
        """Slots for merged experts."""
        return round(MERGED * len(self.experts))


def merge(work: Work, known: profiling.Profile, tuned: Tensor, **rules: Any) -> nn.Module:
    """Plan and carry out; the model is restored by the caller."""
    plans = merging.plan(work.model, known, tuned, work.num_merged, MergingConfig(**rules))
    return compact.customize(work.model, plans)


def train_step(work: Work, plans: Sequence[compact.LayerPlan]) -> Callable[[], None]:
    """One step of the customised model, as in a round; the model stays customised between calls."""
    model = compact.customize(work.model, plans)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)

    def step() -> None:
        model(**work.first).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def round_parts(name: str, repeats: int) -> list[Row]:
    """What a round of FLUX does besides training, in training steps of 16 samples."""
    work = Work(name, TASK, seed=0)
    known, tuned = work.profile(), work.tuned()
    step = train_step(work, merging.plan(work.model, known, tuned, work.num_merged))
    times = {"one training step": interleaved({"": step}, repeats, CPU)[""]}
    compact.restore(work.model, write=False)
    eight = [work.experts[i] for i in torch.randperm(len(work.experts), generator=work.generator)[:8].tolist()]

    def whole(**options: Any) -> None:
        compact.restore(merge(work, known, tuned, **options), write=False)

    plans = merging.plan(work.model, known, tuned, work.num_merged)

    def again() -> None:
        compact.restore(compact.customize(work.model, plans), write=False)

    works: dict[str, Callable[[], Any]] = {
        "merge: plan and customise": whole,
        "customise alone": again,
        "merge, budgets and clusters at once": partial(whole, budgets="joint", weights="gate"),
        "merge, neurons aligned": partial(whole, align_neurons=True),
        "profile of 16 samples, 4 bits": lambda: profiling.profile(work.model, [work.first], bits=4),
        "the same without attention": lambda: profiling.profile(work.model, [work.first], bits=4, attention=False),
        "probes of 8 experts on 8 samples": lambda: gradients.probe_norms(work.model, work.probed, eight),
        "these 8 by backpropagation": lambda: gradients.true_norms(work.model, work.probed, eight),
        "all experts by backpropagation": lambda: gradients.true_norms(work.model, work.probed, work.experts),
    }
    times |= interleaved(works, repeats, CPU)
    reference = statistics.median(times["one training step"])
    return [
        {"model": name, "what": label, **summary(taken), "steps": statistics.median(taken) / reference}
        for label, taken in times.items()
    ]


def clustering(repeats: int) -> list[Row]:
    """All layers at once, against the same code and scikit-learn's layer by layer: how much of it is batching."""
    rows = []
    for name, (num_layers, num_experts, k) in SHAPES.items():
        points = [merging.features(experts) for experts in synthetic(num_layers, num_experts, seed=0)]
        budgets = [k] * num_layers
        works: dict[str, Callable[[], Any]] = {
            "all layers at once": partial(merging.cluster, points, budgets, "fused"),
            "the same code, layer by layer": lambda points=points, k=k: [merging.cluster([p], [k]) for p in points],
            "scikit-learn, layer by layer": partial(merging.cluster, points, budgets, "per_layer"),
        }
        times = interleaved(works, repeats, CPU, warmup=2)
        for what, taken in times.items():
            ratio = statistics.median(a / b for a, b in zip(taken, times["all layers at once"], strict=True))
            rows.append({"experts": name, "what": what, **summary(taken), "times as long": ratio})
    return rows


def assignment(repeats: int) -> list[Row]:
    """1,000 participants, 27 x 64 experts, 128 of them each."""
    utilities, budgets = torch.rand(1000, 27, 64), torch.full((1000,), 128)
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "rotation": {"ages": torch.randint(0, 9, utilities.shape)},
    }
    works = {
        name: partial(roles.assign, utilities, budgets, 0.5, torch.Generator().manual_seed(0), **given)
        for name, given in options.items()
    }
    return [{"what": name, **summary(taken)} for name, taken in interleaved(works, repeats, CPU).items()]


SECTIONS = {
    "round_parts": "Parts of a round, in training steps",
    "clustering": "Clustering",
    "assignment": "Assignment: 1,000 participants, 27 x 64 experts, 128 each",
}


def main(arguments: Sequence[str] | None = None) -> Row:
    """Run every section and write ``merging.json`` and ``merging.md``."""
    parser = options_of(__doc__)
    parser.add_argument("--repeats", type=int, default=11, help="timings of each case (default 11)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    use_clock(options.clock)
    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    repeats = 3 if options.quick else options.repeats
    result: Row = {"machine": machine(CPU)}
    result["round_parts"] = [row for name in MODELS for row in round_parts(name, repeats)]
    result["clustering"] = clustering(repeats)
    result["assignment"] = assignment(repeats)
    write(options.out, "merging", result, report(result))
    return result


def report(result: Row) -> str:
    """The result as Markdown."""
    parts = ["# Merging", ", ".join(f"{key} {value}" for key, value in result["machine"].items())]
    for key, title in SECTIONS.items():
        columns = list(dict.fromkeys(column for row in result[key] for column in row))
        parts += [f"## {title}", table(result[key], columns)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
