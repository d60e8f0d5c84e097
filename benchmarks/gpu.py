"""All five methods at the full shapes of LLaMA-MoE and DeepSeek-MoE: step time, peak memory, bytes moved.

    python benchmarks/gpu.py                                  both models, all methods, batch 16 of 512 tokens
    python benchmarks/gpu.py --models llama-moe-3.5b --batch 4 --checkpointing
    python benchmarks/gpu.py --rank 8                         with low-rank adapters, all methods that have them
    python benchmarks/gpu.py --device cpu --quick             tiny shapes, to see that it runs

Weights are random, so routing is nearly even; nothing is downloaded. A layer's experts are made on the device, turned
into what the method holds, and let go: a model larger than the device's memory can be measured as long as what the
method holds fits. A method that runs out of memory is reported so. "full" has no adapters.

What is timed is one local step: forward, backward, update. FLUX and FMES train a share of the experts (``--tuned``);
FLUX merges the others into ``--merged`` slots, FMES drops them; FLUX+ watches four experts in the place of every eighth
tuned one. FMQ holds every expert in 4 bits, trains straight through and quantizes again. FMD keeps all experts in
pinned host memory, ``--resident`` of them on the device, and updates on the host, in both forms of offloading; "full"
is the model on the device, trained with transformers' grouped_mm, where it fits.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import transformers as tf
from _measure import Row, machine, options_of, peak_rss_bytes, seconds, table, write
from torch import Tensor, nn

from fluxlib import models
from fluxlib.config import Offloading
from fluxlib.methods import flux_plus
from fluxlib.methods.base import Budget
from fluxlib.methods.flux_plus import WATCHED
from fluxlib.models import DeepseekMoeConfig, LlamaMoeConfig
from fluxlib.moe import find, mask
from fluxlib.moe.adapter import Adapter
from fluxlib.moe.compact import CompactExperts, LayerPlan
from fluxlib.moe.find import MoELayer
from fluxlib.moe.offloaded import DeviceSet, OffloadedExperts
from fluxlib.moe.quantized import QuantizedExperts

METHODS = ("flux", "flux_plus", "fmd", "fmd_on_demand", "fmq", "fmes", "full")
ADAPTED = METHODS[:-1]
"""Those that have adapters."""


def configs(quick: bool) -> dict[str, Any]:
    """The two models of the paper, or the same in tiny."""
    if not quick:
        return {name: models.config(name) for name in ("llama-moe-3.5b", "deepseek-moe-16b")}
    tiny = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    routed = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return {
        "tiny-llama-moe": LlamaMoeConfig(
            **tiny, num_hidden_layers=2, intermediate_size=128, num_experts=8, num_selects=2, size_experts=None
        ),
        "tiny-deepseek-moe": DeepseekMoeConfig(**tiny, **routed, num_hidden_layers=3, intermediate_size=64),
    }


def skeleton(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with everything but its experts, which stay without memory."""
    with torch.device("meta"):
        model: Any = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    inside = {id(p) for layer in find.layers(model) for p in layer.experts.parameters()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in inside:
                module._parameters[name] = nn.Parameter(_random(parameter, device), requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.config.use_cache = False
    return model.train()


def _random(like: Tensor, device: torch.device) -> Tensor:
    made = torch.empty(like.shape, dtype=like.dtype, device=device)
    return made.normal_(std=0.02) if like.dim() > 1 else made.fill_(1.0)


class Trial:
    """One method on one model: what it holds, and a step of it.

    Args:
        method: One of METHODS.
        model: From :func:`skeleton`.
        options: The command line's.
        device: Where it computes.
    """

    def __init__(self, method: str, model: Any, options: argparse.Namespace, device: torch.device) -> None:
        self.method, self.model, self.options, self.device = method, model, options, device
        found = find.layers(model)
        total = sum(layer.num_experts for layer in found)
        self.adapter = Adapter(options.rank, 2.0 * options.rank, seed=0) if options.rank else None
        form: Offloading = "on_demand" if method == "fmd_on_demand" else "overlapped"
        self.device_set = DeviceSet(max(2, round(total * options.resident)), form)
        make: dict[str, Callable[..., Any]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        self.make_optimizer, self.worker = partial(make[options.optimizer], lr=1e-5), ThreadPoolExecutor(1)
        self.experts: list[Any] = []
        for layer in found:
            for name, stack in list(layer.experts.named_parameters()):
                layer.experts._parameters[name] = nn.Parameter(_random(stack, device), requires_grad=method == "full")
            self.experts.append(self._hold(layer))
        if options.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self.make_optimizer(trainable) if trainable and not self._updates_itself else None

    @property
    def _updates_itself(self) -> bool:
        """FMD's better form steps layer by layer, behind the backward pass."""
        return self.method == "fmd" and self.adapter is None

    def _hold(self, layer: MoELayer) -> Any:
        """Turn a layer's experts into what the method holds."""
        if self.method == "full":
            self.model.set_experts_implementation("grouped_mm")
            return layer.experts
        if self.method.startswith("fmd"):
            how = (self.make_optimizer, self.worker) if self._updates_itself else (None, None)
            held: Any = OffloadedExperts(layer.experts, self.device_set, layer.index, *how, adapter=self.adapter)
        elif self.method == "fmq":
            held = QuantizedExperts(layer.experts, 4, self.adapter, layer.index)
            held.collects_gradients = self.adapter is None
        else:
            plan, watched = self._plan(layer)
            if plan.dropped:
                mask.drop(layer, plan.dropped)
            held = CompactExperts(layer.experts, plan, adapter=self.adapter, layer=layer.index)
            held.watch(watched)
            held.method = self.options.kernel
        setattr(layer.block, layer.name.rpartition(".")[2], held)
        if not self.method.startswith("fmd"):
            held.original.to("meta")
        return held

    def _plan(self, layer: MoELayer) -> tuple[LayerPlan, int]:
        """Who is tuned, merged or dropped, and how many of those that are alone in a slot are watched."""
        tuned, watched = max(layer.top_k, round(layer.num_experts * self.options.tuned)), 0
        slots = max(1, round(layer.num_experts * self.options.merged))
        if self.method == "flux_plus":
            tuned, watched = flux_plus.split(Budget(tuned, slots), layer.num_experts, 1, 1 if self.adapter else WATCHED)
        rest = range(tuned, layer.num_experts)
        if self.method == "fmes":
            return LayerPlan(tuple(range(tuned)), dropped=tuple(rest)), 0
        alone, merged = [(expert,) for expert in rest[:watched]], rest[watched:]
        groups = [*alone, *(tuple(merged[i::slots]) for i in range(min(slots, len(merged))))]
        return LayerPlan(tuple(range(tuned)), tuple(groups)), watched

    def step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Seconds of a step's parts."""
        loss: list[Tensor] = []
        return {
            "forward_s": seconds(lambda: loss.append(self.model(**batch).loss), self.device),
            "backward_s": seconds(lambda: loss[0].backward(), self.device),
            "update_s": seconds(self._update, self.device),
        }

    def _update(self) -> None:
        if self.method == "fmq" and self.adapter is None:
            for experts in self.experts:
                for expert in range(experts.num_experts):
                    _requantize(experts, expert)
                experts.zero_grad()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def _requantize(experts: QuantizedExperts, expert: int) -> None:
    """A plain gradient step on one dequantized expert, quantized again; nothing if it saw no token."""
    if expert in experts._gradients:
        tensors, gradients = experts.expert_tensors(expert), experts.grads(expert)
        experts.requantize(expert, {n: t.add_(gradients[n], alpha=-1e-3) for n, t in tensors.items()})


def measure(method: str, config: Any, options: argparse.Namespace, device: torch.device) -> Row:
    """One row: times, peak memory and traffic of a method on a model."""
    _clean(device)
    try:
        model = skeleton(config, device, options.dtype)
        trial = Trial(method, model, options, device)
        shape = (options.batch, options.tokens)
        ids = torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
        batch = {"input_ids": ids, "labels": ids}
        trial.step(batch)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before = vars(trial.device_set.traffic).copy()
        parts = [trial.step(batch) for _ in range(options.repeats)]
    except torch.OutOfMemoryError as error:
        return {"method": method, "result": f"out of memory: {str(error).splitlines()[0][:120]}"}
    row: Row = {"method": method, "step_s": statistics.median(sum(part.values()) for part in parts)}
    row |= {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    row["tokens_per_s"] = options.batch * options.tokens / row["step_s"]
    row["peak_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()
    moved = {name: (value - before[name]) / len(parts) for name, value in vars(trial.device_set.traffic).items()}
    row |= {f"{name}_per_step": round(value) for name, value in moved.items()}
    row["result"] = "measured"
    return row


def profile_row(config: Any, options: argparse.Namespace, device: torch.device) -> Row:
    """FLUX's profile: quantizing every expert to 4 bits, and a forward pass of the quantized model."""
    _clean(device)
    try:
        model = skeleton(config, device, options.dtype)
        trials: list[Trial] = []
        quantize_s = seconds(lambda: trials.append(Trial("fmq", model, options, device)), device)
        ids = torch.randint(3, config.vocab_size, (options.batch, options.tokens)).to(device)
        with torch.no_grad():
            forward_s = min(seconds(lambda: model(input_ids=ids), device) for _ in range(3))
    except torch.OutOfMemoryError as error:
        return {"what": "profile", "result": f"out of memory: {str(error).splitlines()[0][:120]}"}
    at_rest = sum(experts.num_bytes for experts in trials[0].experts)
    values = sum(p.numel() for experts in trials[0].experts for p in experts.original.parameters())
    return {
        "what": "profile, 4 bits", "make_and_quantize_s": quantize_s, "forward_s": forward_s,
        "experts_bytes": at_rest, "bits_per_value": 8 * at_rest / values, "result": "measured",
    }  # fmt: skip


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def main(arguments: Sequence[str] | None = None) -> Row:
    """Measure and write ``gpu.json`` and ``gpu.md``."""
    parser = options_of(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=None, help="names, default both")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default all, with --rank all that have adapters")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--tuned", type=float, default=0.25, help="share of the experts that FLUX and FMES tune")
    parser.add_argument("--merged", type=float, default=0.125, help="merged slots per expert, FLUX")
    parser.add_argument("--resident", type=float, default=0.25, help="share of the experts on the device, FMD")
    parser.add_argument("--rank", type=int, default=0, help="of adapters; 0: whole experts are tuned")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "sgd"), help="of all but FMQ (plain steps)")
    parser.add_argument("--kernel", default="auto", choices=("auto", "slots", "grouped"), help="of FLUX and FMES")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    allowed = ADAPTED if options.rank else METHODS
    options.methods = options.methods or allowed
    if without := sorted(set(options.methods) - set(allowed)):
        parser.error(f"--rank: {', '.join(without)} have no adapters; allowed are {', '.join(allowed)}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu: no CUDA device here, nothing measured (--device cpu --quick runs it in tiny)")
        return {}
    options.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.quick:
        options.batch, options.tokens, options.repeats = 2, 16, 1
    tf.logging.set_verbosity_error()
    known = configs(options.quick)
    unknown = set(options.models or known) - set(known)
    if unknown:
        parser.error(f"--models: expected among {list(known)}, got {sorted(unknown)}")
    result: Row = {"machine": machine(device), "options": {k: str(v) for k, v in vars(options).items()}, "models": {}}
    for name in options.models or known:
        rows = [measure(method, known[name], options, device) for method in options.methods]
        base = next((row.get("step_s") for row in rows if row["method"] == "fmd"), None)
        for row in rows:
            if base and "step_s" in row:
                row["times_faster_than_fmd"] = base / row["step_s"]
        result["models"][name] = {"steps": rows, "profile": profile_row(known[name], options, device)}
    write(options.out, "gpu", result, report(result))
    return result


def report(result: Row) -> str:
    """The result as Markdown."""
    parts = ["# Five methods at full size", ", ".join(f"{k} {v}" for k, v in result["machine"].items())]
    for name, model in result["models"].items():
        columns = list(dict.fromkeys(column for row in model["steps"] for column in row))
        parts += [f"## {name}", table(model["steps"], columns), table([model["profile"]], list(model["profile"]))]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
