"""The experts' core on this machine: time and memory of compact, full and quantized experts.

    python benchmarks/experts.py                 everything (minutes; `make bench` runs it)
    python benchmarks/experts.py --quick         tiny shapes, to see that it runs

Sections: a training step of a whole model (hidden 512, width 384, 4 layers, 64 experts, top-6, 1,024 tokens; 8 tuned
and 8 merged slots) against the full model on each experts backend of transformers; the time against the arithmetic
floor; one expert layer of LLaMA-MoE and DeepSeek-MoE; memory of a step; rates and errors of quantization. All timings
of a section are taken in turns in one process.

"Full" trains all experts of transformers' own module, everything else frozen in both. A step is forward, backward and
AdamW (PyTorch's default); the parts are reported separately. What is frozen is multiplied by oneDNN in a customised
model where that is faster (fluxlib.moe.product); "full, grouped_mm, linears too" is the full model with the same.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from _measure import Row, interleaved, machine, options_of, seconds, summary, table, use_clock, write
from torch import Tensor, nn

from fluxlib.devices import memory
from fluxlib.devices.memory_tracker import MemoryTracker
from fluxlib.moe import compact, find, product
from fluxlib.moe.capture import capture
from fluxlib.moe.compact import CompactExperts, LayerPlan
from fluxlib.moe.dispatch import sort_pairs
from fluxlib.moe.packing import BITS, Packed, PackedNF4
from fluxlib.moe.quantized import quantize

CPU = torch.device("cpu")
STEP_TARGET, MEMORY_TARGET, FORWARD_TARGET = 4.0, 0.25, 1.1
HELPED = "full, grouped_mm, linears too"


@dataclass(frozen=True)
class Shape:
    """A model, or one layer of it, and the budget of a customised layer."""

    hidden: int
    width: int
    num_layers: int
    num_experts: int
    top_k: int
    tokens: int
    num_tuned: int
    num_merged: int
    vocabulary: int = 1000


MODEL = Shape(512, 384, 4, 64, 6, 1024, 8, 8)
REAL = {
    "llama-moe-3.5b (4/16)": Shape(4096, 688, 1, 16, 4, 512, 4, 2),
    "deepseek-moe-16b": Shape(2048, 1408, 1, 64, 6, 512, 8, 8),
}
QUICK = Shape(32, 16, 2, 8, 2, 64, 2, 2, 50)


def build(shape: Shape) -> Any:
    """A random OLMoE of the shape; the same weights every time."""
    config = tf.OlmoeConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.width,
        num_hidden_layers=shape.num_layers, num_attention_heads=8, num_key_value_heads=8,
        num_experts=shape.num_experts, num_experts_per_tok=shape.top_k, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.02, generator=generator)
    return model


def plan(shape: Shape, seed: int) -> LayerPlan:
    """Random experts tuned, the others merged in groups of equal size."""
    order = torch.randperm(shape.num_experts, generator=torch.Generator().manual_seed(seed)).tolist()
    rest = order[shape.num_tuned :]
    groups = tuple(tuple(rest[i :: shape.num_merged]) for i in range(shape.num_merged))
    return LayerPlan(tuple(order[: shape.num_tuned]), groups)


def train_experts_only(model: Any) -> Any:
    """What FMD trains: every expert, nothing else."""
    model.requires_grad_(False)
    for layer in find.layers(model):
        layer.experts.requires_grad_(True)
    return model


class Step:
    """A training step in its three parts."""

    def __init__(self, model: Any, batch: dict[str, Tensor], fused: bool = False) -> None:
        self.model, self.batch = model, batch
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, fused=fused)
        self.parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}

    def __call__(self) -> None:
        loss: list[Tensor] = []
        self.parts["forward"].append(seconds(lambda: loss.append(self.model(**self.batch).loss), CPU))
        self.parts["backward"].append(seconds(loss[0].backward, CPU))
        self.parts["optimizer"].append(seconds(self._update, CPU))

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Gradients and AdamW's two moments."""
        return sum(3 * p.numel() * p.element_size() for p in self.trainable)


def model_steps(shape: Shape, repeats: int, backends: Sequence[str]) -> tuple[list[Row], dict[str, Step]]:
    """Full model on each backend against the customised one: a training step, and its parts."""
    rows_of = shape.tokens // 4
    ids = torch.randint(3, shape.vocabulary, (4, rows_of), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    small = build(shape)
    compact.customize(small, [plan(shape, layer) for layer in range(shape.num_layers)])
    steps = {"compact": Step(small, batch)}
    for backend in backends:
        full = build(shape)
        full.set_experts_implementation(backend)
        steps[f"full, {backend}"] = Step(train_experts_only(full), batch)
    helped = build(shape)
    helped.set_experts_implementation("grouped_mm")
    product.freeze_linears(helped, wider_than=shape.num_experts)
    steps[HELPED] = Step(train_experts_only(helped), batch)
    slow = {name for name in steps if "eager" in name or "batched" in name}
    times = interleaved({n: s for n, s in steps.items() if n not in slow}, repeats, CPU)
    for name in slow:
        times |= interleaved({name: steps[name]}, max(1, repeats // 5), CPU, warmup=0)
    rows = []
    reference = times["full, grouped_mm"]
    for name, step in steps.items():
        row: Row = {"what": name, **summary(times[name], reference)}
        for part, values in step.parts.items():
            row[f"{part}_s"] = statistics.median(values[-len(times[name]) :])
        row["grad_and_state_bytes"] = step.state_bytes()
        rows.append(row)
    rows[0]["speedup_of_helped"] = summary(times["compact"], times[HELPED])["speedup"]
    without = [
        [sum(both) for both in zip(step.parts["forward"][-repeats:], step.parts["backward"][-repeats:], strict=True)]
        for step in (steps["compact"], steps["full, grouped_mm"])
    ]
    rows[0]["speedup_without_optimizer"] = summary(*without)["speedup"]
    return rows, steps


def forward_all_kept(shape: Shape, full: Any, batch: dict[str, Tensor], repeats: int) -> list[Row]:
    """Forward pass with every expert in a slot of its own, against the same model on its own backend."""
    kept = build(shape)
    compact.customize(kept, [LayerPlan(tuple(range(shape.num_experts)))] * shape.num_layers)

    def forward(model: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                model(**batch)

        return run

    times = interleaved({"full, grouped_mm": forward(full), "compact, all kept": forward(kept)}, repeats, CPU)
    reference = times["full, grouped_mm"]
    return [{"what": name, **summary(values, reference)} for name, values in times.items()]


def all_operations(step: Step) -> int:
    """Operations of a customised model's forward and backward pass, by PyTorch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    modules = [layer.experts for layer in find.layers(step.model)]
    smallest, product.SMALLEST = product.SMALLEST, 1 << 62  # it counts neither oneDNN's nor grouped products
    linear, product.SMALLEST_LINEAR = product.SMALLEST_LINEAR, 1 << 62
    for experts in modules:
        experts.method = "slots"
    with FlopCounterMode(display=False) as counter:
        step.model(**step.batch).loss.backward()
    product.SMALLEST, product.SMALLEST_LINEAR = smallest, linear
    for experts in modules:
        experts.method = "auto"
    step.optimizer.zero_grad()
    return counter.get_total_flops()


def floor(shape: Shape, step: Step) -> list[Row]:
    """Arithmetic of the customised model's forward and backward pass, and its time at the measured matmul rates.

    A pair's projections are 6HI operations: once forward; once backward for the input, except in the lowest layer,
    below which nothing learns (there a tuned slot needs a third of it); once more for tuned weights. What is padded
    counts as overhead, as do the softmax and products of attention.
    """
    found = find.layers(step.model)
    with capture(step.model) as seen, torch.no_grad():
        step.model(**step.batch)
    pairs, unit = [], 6 * shape.hidden * shape.width
    for layer, record in zip(found, seen.layers, strict=True):
        slot = layer.experts.slot_of[record.top_k_index[0]]
        pairs.append(sort_pairs(slot, record.top_k_weights[0], shape.num_tuned + shape.num_merged, joins=True).counts)
    tuned = [sum(counts[: shape.num_tuned]) for counts in pairs]
    total = sum(sum(counts) for counts in pairs)
    experts = unit * (2 * total - sum(pairs[0]) + tuned[0] // 3 + sum(tuned))
    others = all_operations(step) - experts
    rows = max(1, total // (shape.num_layers * (shape.num_tuned + shape.num_merged)))
    rates = matmul_rates(rows, shape.hidden, 2 * shape.width)
    seconds_ = (experts + others) / max(rates.values())
    measured = statistics.median(step.parts["forward"]) + statistics.median(step.parts["backward"])
    return [
        {"what": "pairs computed, share of the router's choices",
         "value": total / (shape.num_layers * shape.tokens * shape.top_k)},
        {"what": "operations, experts", "value": float(experts)},
        {"what": "operations, everything else", "value": float(others)},
        *({"what": f"operations per second, {name}, {rows} rows", "value": rate} for name, rate in rates.items()),
        {"what": "floor of forward and backward, seconds", "value": seconds_},
        {"what": "measured, seconds", "value": measured},
        {"what": "share of the floor reached", "value": seconds_ / measured},
    ]  # fmt: skip


def matmul_rates(rows: int, inner: int, columns: int) -> dict[str, float]:
    """Operations per second of one product, by PyTorch's usual library and by the one the passes choose."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    works = {"MKL": lambda: a @ b, "chosen": lambda: product.matmul(a, b)}
    times = interleaved(works, 30, CPU, warmup=5)
    return {name: 2 * rows * inner * columns / min(values) for name, values in times.items()}


KINDS = {
    "attention": ("attention",),
    "matrix products": ("mm", "addmm", "bmm", "matmul", "linear"),
    "gathers and scatters": ("index", "gather", "scatter", "sort", "bincount", "embedding"),
    "gate": ("silu", "mul"),
}


def where_time_goes(step: Step) -> list[Row]:
    """Shares of a customised step's own CPU time, by kind of operation."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        step.model(**step.batch).loss.backward()
    step.optimizer.zero_grad()
    shares = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in seen.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "other")
        shares[kind] += event.self_cpu_time_total
    total = sum(shares.values())
    return [{"what": kind, "share": value / total} for kind, value in shares.items()]


def real_layer(name: str, shape: Shape, repeats: int) -> list[Row]:
    """One layer's experts of a real model: forward, and forward with backward, in float32."""
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    config = tf.OlmoeConfig(
        hidden_size=shape.hidden, intermediate_size=shape.width, num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    full = OlmoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in full.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    modules = {
        "full, grouped_mm": full,
        "compact": CompactExperts(full, plan(shape, 0)),
        "compact, all kept": CompactExperts(full, LayerPlan((), tuple((e,) for e in range(shape.num_experts)))),
    }
    hidden = torch.randn(shape.tokens, shape.hidden, generator=generator).requires_grad_()
    weights, index = torch.rand(shape.tokens, shape.num_experts, generator=generator).topk(shape.top_k)

    def forward(module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                module(hidden, index, weights)

        return run

    def both(module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            module(hidden, index, weights).sum().backward()
            module.zero_grad()

        return run

    forwards = interleaved({n: forward(m) for n, m in modules.items()}, repeats, CPU)
    trained = {n: both(m) for n, m in modules.items() if n != "compact, all kept"}
    steps = interleaved(trained, repeats, CPU)
    rows = []
    for label in modules:
        row = {"layer": name, "what": label, "forward_s": statistics.median(forwards[label])}
        row["forward_ratio"] = summary(forwards[label], forwards["full, grouped_mm"])["speedup"]
        if label in steps:
            row["forward_backward_s"] = statistics.median(steps[label])
            row["speedup"] = summary(steps[label], steps["full, grouped_mm"])["speedup"]
            row["gradient_bytes"] = sum(p.numel() * 4 for p in modules[label].parameters() if p.requires_grad)
        rows.append(row)
    return rows


def quantization(hidden: int, width: int, repeats: int) -> list[Row]:
    """Rates in values per second, memory and error per width; bitsandbytes' NF4 beside 4 bits."""
    stack = torch.randn(1, 2 * width, hidden, generator=torch.Generator().manual_seed(0)) * 0.02
    num, rows = stack.numel(), []
    kinds = [(f"{bits} bits", Packed, bits) for bits in BITS]
    if importlib.util.find_spec("bitsandbytes") is not None:
        kinds.append(("bitsandbytes NF4", PackedNF4, 4))
    for what, kind, bits in kinds:
        packed = kind(stack, bits)
        works = {"write": lambda p=packed: p.write(0, stack[0]), "read": lambda p=packed: p.read(0, torch.bfloat16)}
        times = interleaved(works, repeats, CPU)
        error = (packed.read(0) - stack[0]).norm() / stack.norm()
        rows.append({
            "what": what, "bits_per_value": packed.num_bytes * 8 / num, "relative_error": float(error),
            "quantize_values_per_s": num / min(times["write"]), "dequantize_values_per_s": num / min(times["read"]),
        })  # fmt: skip
    return rows


def peak_memory(shape: Shape, full: Step) -> list[Row]:
    """Largest memory alive in a step of each method: measured, and predicted from the configuration alone.

    Offloading needs a second memory: its peak is measured in tests/devices/test_memory.py and by benchmarks/gpu.py.
    """
    rows = [{"what": "full, grouped_mm", "measured_bytes": _measured_peak(full.model, full.batch)}]
    total = shape.num_layers * shape.num_experts
    tuned, merged = shape.num_layers * shape.num_tuned, shape.num_layers * shape.num_merged
    for method, num_tuned, num_merged in (("flux", tuned, merged), ("fmes", tuned, 0), ("fmq", total, 0)):
        model = build(shape)
        step = memory.Step(4, shape.tokens // 4, torch.float32, kernel="slots")
        planned = memory.plan_memory(model.config, method, None, num_tuned, num_merged, step)
        if method == "fmq":
            _drop_originals(quantize(model))
            for layer in find.layers(model):
                layer.experts.collects_gradients = True
        else:
            plans = [plan(shape, layer) for layer in range(shape.num_layers)]
            if method == "fmes":
                plans = [LayerPlan(p.tuned, dropped=tuple(e for group in p.groups for e in group)) for p in plans]
            compact.customize(model, plans)
            for layer in find.layers(model):
                layer.experts.method = "slots"
        states = total * planned_state(shape) if method == "fmq" else 0
        rows.append(_compared(method, _measured_peak(model, full.batch) + states, planned.peak_bytes))
        if planned.profile_bytes:
            model = _drop_originals(quantize(build(shape)))
            measured = _measured_peak(model, full.batch, trains=False)
            rows.append(_compared("4-bit profile of flux", measured, planned.profile_bytes))
    return rows


def planned_state(shape: Shape) -> int:
    """AdamW's moments of one expert, bytes."""
    return 8 * 3 * shape.hidden * shape.width


def _drop_originals(model: Any) -> Any:
    """Let go of the experts that quantized ones stand for."""
    for layer in find.layers(model):
        layer.experts.original.to("meta")
    return model


def _compared(what: str, measured: int, predicted: int) -> Row:
    return {"what": what, "measured_bytes": measured, "predicted_bytes": predicted, "ratio": predicted / measured}


def _measured_peak(model: Any, batch: dict[str, Tensor], trains: bool = True) -> int:
    """Bytes alive at the peak of a step, AdamW's moments of what has parameters included."""
    live = MemoryTracker()
    for tensor in [*model.parameters(), *model.buffers()]:
        live.mark(tensor, "weights")
    with live:
        if trains:
            model(**batch, use_cache=False).loss.backward()
        else:
            with torch.no_grad():
                model(input_ids=batch["input_ids"], use_cache=False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return live.peak_bytes + sum(2 * p.numel() * p.element_size() for p in trainable)


def verdict(steps: Sequence[Row], kept: Sequence[Row]) -> list[Row]:
    """The numbers to reach, and what was measured."""
    small, full = steps[0], next(row for row in steps if row["what"] == "full, grouped_mm")
    memory = small["grad_and_state_bytes"] / full["grad_and_state_bytes"]
    forward = 1 / kept[1]["speedup"]
    return [
        {"number": "training step, times faster than full on grouped_mm", "to reach": f">= {STEP_TARGET}",
         "measured": small["speedup"], "reached": small["speedup"] >= STEP_TARGET},
        {"number": "the same with the full model's frozen layers by oneDNN too", "to reach": "",
         "measured": small["speedup_of_helped"]},
        {"number": "the same without the optimizer", "to reach": "", "measured": small["speedup_without_optimizer"]},
        {"number": "gradient and optimizer memory, share of the full model's", "to reach": f"<= {MEMORY_TARGET}",
         "measured": memory, "reached": memory <= MEMORY_TARGET},
        {"number": "forward with all experts kept, times the backend's", "to reach": f"<= {FORWARD_TARGET}",
         "measured": forward, "reached": forward <= FORWARD_TARGET},
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Row:
    """Run every section and write ``experts.json`` and ``experts.md``."""
    parser = options_of(__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="timings of each case (default 9)")
    parser.add_argument("--threads", type=int, default=None, help="of torch (default: as it is)")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: one thread on a busy machine")
    parser.add_argument("--backends", nargs="+", default=["grouped_mm", "eager"], help="batched_mm takes 10 GB more")
    options = parser.parse_args(arguments)
    use_clock(options.clock)
    if options.threads:
        torch.set_num_threads(options.threads)
    tf.logging.set_verbosity_error()
    shape = QUICK if options.quick else MODEL
    real = {"tiny": QUICK} if options.quick else REAL
    result: Row = {"machine": machine(CPU), "shape": vars(shape)}
    result["step"], steps = model_steps(shape, options.repeats, options.backends)
    full, small = steps["full, grouped_mm"], steps["compact"]
    result["forward_all_kept"] = forward_all_kept(shape, full.model, full.batch, options.repeats)
    result["floor"] = floor(shape, small)
    result["where_time_goes"] = where_time_goes(small)
    result["memory"] = peak_memory(shape, full)
    del steps, full, small
    result["real_layers"] = [r for n, s in real.items() for r in real_layer(n, s, max(3, options.repeats // 2))]
    first = next(iter(real.values()))
    result["quantization"] = quantization(first.hidden, first.width, options.repeats)
    result["verdict"] = verdict(result["step"], result["forward_all_kept"])
    write(options.out, "experts", result, report(result))
    return result


SECTIONS = {
    "verdict": "Numbers to reach",
    "step": "Training step, whole model",
    "forward_all_kept": "Forward, every expert in a slot of its own",
    "floor": "Arithmetic floor of the compact step",
    "where_time_goes": "Where the compact step's time goes (own CPU time, forward and backward)",
    "memory": "Peak memory of a step, weights and optimizer state included",
    "real_layers": "One layer's experts of the real models, float32",
    "quantization": "Quantization of one expert's first matrix",
}


def report(result: Row) -> str:
    """The result as Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    parts = ["# Experts", facts, "shape: " + ", ".join(f"{k} {v}" for k, v in result["shape"].items())]
    for key, title in SECTIONS.items():
        columns = list(dict.fromkeys(column for row in result[key] for column in row))
        parts += [f"## {title}", table(result[key], columns)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
