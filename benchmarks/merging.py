"""Profiling, merging, utilities and assignment on this machine: how fast, and how good.

    python benchmarks/merging.py                 everything (minutes; `make bench` runs it)
    python benchmarks/merging.py --quick         one task, few repeats, to see that it runs

Sections: clustering of 32 x 16 and 27 x 64 experts, fused against scikit-learn layer by layer; a whole merge, a
profile and a round's probes against one training step; assignment for 1,000 participants; error of the profile by
bits; error of the merged model by budgets, weights and alignment; forward-only utilities against backpropagation.
All timings of a section are taken in turns in one process, on one thread unless told otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import transformers as tf
from _measure import Row, interleaved, machine, options_of, summary, table, use_clock, write
from torch import Tensor, nn

from fluxlib import gradients, merging, models, profiling, roles, tasks
from fluxlib.config import MergingConfig
from fluxlib.merging.features import from_gram
from fluxlib.moe import compact, find
from fluxlib.moe.capture import capture
from fluxlib.tasks.batches import make_batch

CPU = torch.device("cpu")
MODELS = ("mini-llama-moe", "mini-deepseek-moe")
TASKS = ("mini-gsm8k", "mini-mmlu", "mini-piqa", "mini-dolly")
SHAPES = {"32 x 16, 4 clusters each": (32, 16, 4), "27 x 64, 16 clusters each": (27, 64, 16)}
TUNED, MERGED = 0.25, 0.25


def experts_of(num_layers: int, num_experts: int, seed: int = 0) -> list[Tensor]:
    """Random experts ``[n, 512]`` per layer, around a quarter as many centres, as far from them as they are apart."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_layers, max(2, num_experts // 4), 512, generator=generator)
    nearest = torch.randint(0, centres.shape[1], (num_layers, num_experts), generator=generator)
    noise = torch.randn(num_layers, num_experts, 512, generator=generator)
    return list(centres.gather(1, nearest[:, :, None].expand(-1, -1, 512)) + noise)


def clustering(repeats: int) -> list[Row]:
    """Time and inertia of both methods, and of budgets and clusters at once."""
    rows = []
    for name, (num_layers, num_experts, k) in SHAPES.items():
        experts = experts_of(num_layers, num_experts)
        points, budgets = [merging.features(layer) for layer in experts], [k] * num_layers
        grams, ones = [layer @ layer.T for layer in experts], [torch.ones(num_experts)] * num_layers
        works: dict[str, Callable[[], Any]] = {
            "scikit-learn, layer by layer": partial(merging.cluster, points, budgets, "per_layer"),
            "fused": partial(merging.cluster, points, budgets, "fused"),
            "budgets and clusters at once": partial(merging.joint_clusters, grams, ones, k * num_layers),
            "(features, by Gram matrices)": lambda grams=grams: [from_gram(gram, 32) for gram in grams],
        }
        times = interleaved(works, repeats, CPU, warmup=2)
        for label, taken in times.items():
            rows.append({"experts": name, "what": label, **summary(taken, times["scikit-learn, layer by layer"])})
        for row, method in zip(rows[-4:-2], ("per_layer", "fused"), strict=True):
            found = [merging.inertia(points, merging.cluster(points, budgets, method, seed)) for seed in range(repeats)]
            row["inertia"] = statistics.mean(found)
    return rows


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
    work = Work(name, TASKS[0], seed=0)
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


def cases(names: Sequence[str], seeds: int) -> Iterator[tuple[str, Work]]:
    """Both models, all tasks, some seeds."""
    for name in MODELS:
        for task in names:
            for seed in range(seeds):
                yield name, Work(name, task, seed)


def profile_errors(names: Sequence[str], seeds: int) -> list[Row]:
    """Against 16 bits: error of the frequency, rank correlation, overlap of the top quarter."""
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for name, work in cases(names, seeds):
        truth = work.profile(16)
        for bits in (2, 3, 4, 8):
            seen = work.profile(bits)
            errors = profiling.frequency_error(seen, truth), profiling.rank_correlation(seen, truth)
            found.setdefault((name, bits), []).append((*errors, profiling.top_overlap(seen, truth, work.num_merged)))
    columns = ("frequency_error", "rank_correlation", "top_overlap")
    return [
        {"model": name, "bits": bits, **dict(zip(columns, map(statistics.mean, zip(*rows, strict=True)), strict=True))}
        for (name, bits), rows in found.items()
    ]


VARIANTS: dict[str, dict[str, Any]] = {
    "discard": {},
    "single": {"budgets": "single"},
    "uniform": {"budgets": "uniform"},
    "adaptive (eq. 1)": {},
    "adaptive, mean of experts": {"weights": "uniform"},
    "adaptive, frequency": {"weights": "frequency"},
    "adaptive, gate": {"weights": "gate"},
    "adaptive, aligned": {"align_neurons": True},
    "uniform, gate": {"budgets": "uniform", "weights": "gate"},
    "joint, gate": {"budgets": "joint", "weights": "gate"},
    "joint, gate, aligned": {"budgets": "joint", "weights": "gate", "align_neurons": True},
}
"""Rules of a plan that differ from the paper's."""


def merge_errors(names: Sequence[str], seeds: int) -> list[Row]:
    """Output error on held-out samples: of the model, and of a layer alone (mean)."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name, work in cases(names, seeds):
        known, tuned = work.profile(), work.tuned()
        for label, rules in VARIANTS.items():
            if label == "discard":
                plans = merging.discard(known, enough(known, tuned, work))
            else:
                plans = merging.plan(work.model, known, tuned, work.num_merged, MergingConfig(**rules))
            through = merging.output_error(work.model, plans, [work.held_out], accumulated=True)[-1]
            alone = merging.output_error(work.model, plans, [work.held_out]).mean()
            found.setdefault((name, label), []).append((float(through), float(alone)))
    rows = []
    for (name, label), errors in found.items():
        model_errors, layer_errors = zip(*errors, strict=True)
        rows.append({
            "model": name, "variant": label, "model_error": statistics.mean(model_errors),
            "model_error_sd": statistics.pstdev(model_errors), "layer_error": statistics.mean(layer_errors),
        })  # fmt: skip
    return rows


def enough(known: profiling.Profile, tuned: Tensor, work: Work) -> Tensor:
    """The tuned experts, and the most used others as far as a layer has fewer than top-k: routing needs them."""
    order = (known.frequency + 2 * tuned).argsort(dim=1, descending=True)
    least = torch.zeros_like(tuned).scatter(1, order[:, : work.layers[0].top_k], True)
    return tuned | least


def utilities(names: Sequence[str], seeds: int) -> list[Row]:
    """One probe of two forward passes for each expert, against backpropagation: cosine distance, rank correlation."""
    found: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for name, work in cases(names, seeds):
        tokens = routed(work)
        truth = tokens * gradients.true_norms(work.model, work.probed, work.experts).sqrt()
        for guided in (False, True):
            norms = gradients.probe_norms(work.model, work.probed, work.experts, guided=guided)
            found.setdefault((name, guided), []).append(compare(tokens * norms.sqrt(), truth))
    rows = []
    for (name, guided), values in found.items():
        distances, ranks = zip(*values, strict=True)
        rows.append({
            "model": name, "guided": guided, "cosine_distance": statistics.mean(distances),
            "worst": max(distances), "rank_correlation": statistics.mean(ranks),
        })  # fmt: skip
    return rows


def routed(work: Work) -> Tensor:
    """Tokens of the probed batch routed to each expert."""
    real = work.probed["attention_mask"].bool().flatten()
    with capture(work.model) as seen, torch.no_grad():
        work.model(**work.probed)
    sizes = [layer.num_experts for layer in work.layers]
    counts = [
        torch.bincount(record.top_k_index[0][real].flatten(), minlength=size)
        for record, size in zip(seen.layers, sizes, strict=True)
    ]
    return torch.cat(counts).float()


def compare(estimate: Tensor, truth: Tensor) -> tuple[float, float]:
    """Cosine distance and rank correlation."""
    distance = 1 - float(estimate @ truth / (estimate.norm() * truth.norm()))
    ranks = torch.stack([values.argsort().argsort().float() for values in (estimate, truth)])
    return distance, float(torch.corrcoef(ranks)[0, 1])


def verdict(result: Row) -> list[Row]:
    """The numbers to reach, and what was measured."""
    rows = []
    for fused in (row for row in result["clustering"] if row["what"] == "fused"):
        slow = next(r for r in result["clustering"] if r["experts"] == fused["experts"] and "inertia" in r)
        label = f"fused clustering, {fused['experts']}: times faster"
        rows.append(line(label, ">= 40", fused["speedup"], fused["speedup"] >= 40))
        ratio = fused["inertia"] / slow["inertia"]
        rows.append(line("its inertia, as a share of the reference's", "<= 1.02", ratio, ratio <= 1.02))
    plain = result["assignment"][0]["median_s"]
    rows.append(line("assignment, 1,000 x 1,728, seconds", "< 1", plain, plain < 1))
    for name in MODELS:
        error = next(r for r in result["profile_errors"] if (r["model"], r["bits"]) == (name, 4))["frequency_error"]
        rows.append(line(f"{name}: 4-bit profile error", "< 0.08 [0.1101]", error, error < 0.08))
        error_of = {r["variant"]: r["model_error"] for r in result["merge_errors"] if r["model"] == name}
        for better, worse, least in COMPARISONS:
            gain = 1 - error_of[better] / error_of[worse]
            rows.append(line(f"{name}: error of '{better}' below '{worse}'", f">= {least}", gain, gain >= least))
        for row in (r for r in result["utilities"] if r["model"] == name):
            label = f"{name}: utilities, {'guided' if row['guided'] else 'plain'} probes, cosine distance"
            rows.append(line(label, "<= 0.20 [0.29]", row["cosine_distance"], row["cosine_distance"] <= 0.2))
    return rows


COMPARISONS = (
    ("adaptive (eq. 1)", "single", 0.656),
    ("adaptive (eq. 1)", "uniform", 0.476),
    ("joint, gate", "single", 0.656),
    ("joint, gate", "uniform", 0.476),
    ("joint, gate", "uniform, gate", 0.476),
    ("adaptive (eq. 1)", "adaptive, frequency", 0.192),
    ("adaptive, gate", "adaptive, frequency", 0.192),
)


def line(number: str, reach: str, measured: float, reached: bool) -> Row:
    """One row of the verdict."""
    return {"number": number, "to reach [paper]": reach, "measured": measured, "reached": reached}


SECTIONS = {
    "verdict": "Numbers to reach",
    "clustering": "Clustering",
    "round_parts": "Parts of a round, in training steps",
    "assignment": "Assignment: 1,000 participants, 27 x 64 experts, 128 each",
    "profile_errors": "Profile error by bits",
    "merge_errors": "Output error: a quarter tuned, a quarter merged, tuned ones drawn at random",
    "utilities": "Forward-only utilities of all experts, one probe each",
}


def main(arguments: Sequence[str] | None = None) -> Row:
    """Run every section and write ``merging.json`` and ``merging.md``."""
    parser = options_of(__doc__)
    parser.add_argument("--repeats", type=int, default=11, help="timings of each case (default 11)")
    parser.add_argument("--seeds", type=int, default=3, help="disjoint sets of samples per task (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    use_clock(options.clock)
    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    names, seeds, repeats = (TASKS[:1], 1, 3) if options.quick else (TASKS, options.seeds, options.repeats)
    result: Row = {"machine": machine(CPU)}
    result["clustering"] = clustering(repeats)
    result["round_parts"] = [row for name in MODELS for row in round_parts(name, repeats)]
    result["assignment"] = assignment(repeats)
    result["profile_errors"] = profile_errors(names, seeds)
    result["merge_errors"] = merge_errors(names, seeds)
    result["utilities"] = utilities(names, seeds)
    result["verdict"] = verdict(result)
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
