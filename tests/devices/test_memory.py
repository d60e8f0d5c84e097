"""The planner: counts that add up, peaks within 10 % of measured ones, budgets that fit, wrong input by name."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    SwitchTransformersConfig,
)

from fluxlib import models
from fluxlib.config import make_config
from fluxlib.devices import dry_run, memory
from fluxlib.devices.dry_run import Slots, Step
from fluxlib.devices.memory_tracker import MemoryTracker
from fluxlib.models.parameters import count_parameters
from fluxlib.moe import find, offloaded
from fluxlib.moe.adapter import Adapter
from fluxlib.moe.compact import LayerPlan, customize
from fluxlib.moe.quantized import QuantizedExperts, quantize

SHAPE = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": None}
SHAPE |= {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 128}
CONFIGS = {
    "llama": models.LlamaMoeConfig(**SHAPE, intermediate_size=384, num_experts=12, num_selects=3),
    "deepseek": models.DeepseekMoeConfig(
        **SHAPE, intermediate_size=128, moe_intermediate_size=32, n_routed_experts=16, num_experts_per_tok=4
    ),
    "mixtral": MixtralConfig(
        **SHAPE, intermediate_size=64, num_local_experts=6, num_experts_per_tok=2, num_key_value_heads=2
    ),
    "olmoe": OlmoeConfig(**SHAPE, intermediate_size=32, num_experts=12, num_experts_per_tok=3),
    "qwen2": Qwen2MoeConfig(
        **SHAPE, moe_intermediate_size=32, shared_expert_intermediate_size=64, num_experts=12, num_key_value_heads=2
    ),
}
REAL = [("llama-moe-3.5b", 6.74, 8.454144, 512), ("deepseek-moe-16b", 16.38, 8.650752, 1728)]


def plans(model, num_tuned, num_merged):
    """The planner's even spread, as layer plans."""
    found = find.layers(model)
    out = []
    for i, layer in enumerate(found):
        tuned, merged = ((n + len(found) - 1 - i) // len(found) for n in (num_tuned, num_merged))
        rest = list(range(tuned, layer.num_experts))
        groups = tuple(tuple(rest[g::merged]) for g in range(merged))
        out.append(LayerPlan(tuple(range(tuned)), groups, dropped=() if merged else tuple(rest)))
    return out


def counted(config):
    return count_parameters(dry_run.meta_model(config, torch.bfloat16))


def batch_of(config, batch, tokens):
    ids = torch.randint(3, config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, tokens * 3 // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def measured_step(config, plan, dtype=torch.float32, kernel="slots", rank=0):
    """Peak of the second of two real training steps, bytes."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    adapter = Adapter(rank, 1.0, 0) if rank else None
    model = customize(model, plans(model, plan.num_tuned, plan.num_merged), torch.float32, adapter).train()
    fixed = []
    for layer in find.layers(model):
        layer.experts.method = kernel
        fixed += (layer.experts.tuned_fixed or {}).values()
    live = MemoryTracker()
    for tensor in [*model.parameters(), *model.buffers(), *fixed]:
        live.mark(tensor, "weights")
    parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    with live:
        for _ in range(2):
            model(**batch_of(config, plan.step.batch, plan.step.tokens), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return live.peak_bytes


@pytest.mark.parametrize(
    ("name", "method", "num_tuned", "num_merged", "batch", "tokens", "options"),
    [
        ("llama", "flux", 9, 9, 4, 64, {}),
        ("llama", "fmd", 36, 0, 4, 64, {}),
        ("llama", "fmes", 18, 0, 4, 64, {}),
        ("deepseek", "flux", 8, 12, 8, 96, {}),
        ("deepseek", "fmd", 32, 0, 2, 32, {}),
        ("deepseek", "fmes", 16, 0, 4, 64, {}),
        ("mixtral", "flux", 6, 6, 4, 64, {}),
        ("olmoe", "flux", 9, 9, 4, 64, {}),
        ("qwen2", "flux", 9, 9, 4, 64, {}),
        ("llama", "flux", 9, 9, 8, 64, {"dtype": torch.bfloat16, "kernel": "grouped"}),
        ("deepseek", "flux", 8, 12, 4, 64, {"dtype": torch.bfloat16, "kernel": "grouped"}),
        ("llama", "flux", 9, 9, 8, 64, {"rank": 4}),
        ("deepseek", "fmd", 32, 0, 2, 32, {"dtype": torch.bfloat16, "rank": 8}),
    ],
)
def test_the_peak_of_a_step_is_within_ten_percent(name, method, num_tuned, num_merged, batch, tokens, options):
    config = CONFIGS[name]
    options = {"dtype": torch.float32, "kernel": "slots"} | options
    plan = memory.plan_memory(config, method, None, num_tuned, num_merged, Step(batch, tokens, **options))
    measured = measured_step(config, plan, **options)
    assert plan.peak_bytes == pytest.approx(measured, rel=0.1)
    assert sum(row.num_bytes for row in plan.rows if row.where == "device") == plan.peak_bytes


@pytest.mark.parametrize("num_bytes", [1_200_000, 1_400_000])
def test_the_peak_with_offloading_is_within_ten_percent(monkeypatch, num_bytes):
    """As on a GPU: an expert on the device is a copy, a gradient leaves as soon as it is made."""
    config = CONFIGS["llama"]
    plan = memory.plan_memory(config, "fmd", num_bytes, step=Step(1, 32, torch.float32, kernel="slots"))
    assert plan.fits and 2 < plan.num_resident < plan.num_experts
    plain = offloaded.DeviceSet._load

    def load(self, key, host, device, dtype):
        entry = plain(self, key, host, device, dtype)
        entry.tensors = {name: tensor.clone() for name, tensor in entry.tensors.items()}
        return entry

    monkeypatch.setattr(offloaded.DeviceSet, "_load", load)
    monkeypatch.setattr(offloaded, "_accumulate", lambda parameters, gradients: None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    offloaded.offload(model, plan.num_resident)
    live = MemoryTracker()
    for tensor in [*model.parameters(), *model.buffers()]:
        live.mark(tensor, "weights")
    with live:
        model(**batch_of(config, 1, 32), use_cache=False).loss.backward()
    on_host = 4 * plan.num_experts * counted(config).per_expert
    assert plan.peak_bytes == pytest.approx(live.peak_bytes - on_host, rel=0.1)


@pytest.mark.parametrize(("name", "bits", "rank"), [("llama", 2, 0), ("deepseek", 4, 0), ("llama", 4, 4)])
def test_the_peak_of_quantised_training_is_within_ten_percent(name, bits, rank):
    config = CONFIGS[name]
    plan = memory.plan_memory(config, "fmq", step=Step(4, 64, torch.float32, bits, rank=rank))
    assert plan.num_tuned == plan.num_experts
    plain, adapter = AutoModelForCausalLM.from_config(config, dtype=torch.float32), Adapter(rank, 1.0, 0)
    model = quantize(plain, bits, adapter if rank else None).train()
    live = MemoryTracker()
    for layer in find.layers(model):
        layer.experts.collects_gradients = True
        for tensor in layer.experts.tuned_fixed.values() if rank else ():
            live.mark(tensor, "weights")
    for tensor in [*model.parameters(), *model.buffers()]:
        live.mark(tensor, "weights")
    learned = dry_run.learned_parameters(find.layers(plain)[0], rank) if rank else counted(config).per_expert
    state = torch.empty(8 * plan.num_tuned * learned, dtype=torch.uint8)
    live.mark(state, "optimizer")
    with live:
        model(**batch_of(config, 4, 64), use_cache=False).loss.backward()
    assert plan.peak_bytes == pytest.approx(live.peak_bytes, rel=0.1)


@pytest.mark.parametrize(("name", "bits"), [("llama", 3), ("deepseek", 4)])
def test_the_peak_of_a_quantised_profile_is_within_ten_percent(name, bits, monkeypatch):
    # Small experts are unpacked a few at a time, half a megabyte at most: nothing, but not for a model of one.
    monkeypatch.setattr(QuantizedExperts, "at_once", 1)
    config = CONFIGS[name]
    plan = memory.plan_memory(config, step=Step(4, 64, torch.float32, bits))
    model = quantize(AutoModelForCausalLM.from_config(config, dtype=torch.float32), bits).eval()
    live = MemoryTracker()
    for tensor in [*model.parameters(), *model.buffers()]:
        live.mark(tensor, "weights")
    inputs = batch_of(config, 4, 64)
    with live, torch.no_grad():
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    assert plan.profile_bytes == pytest.approx(live.peak_bytes, rel=0.1)


@pytest.mark.parametrize(("name", "billions", "expert_millions", "num_experts"), REAL)
def test_the_real_models_are_counted_by_kind(name, billions, expert_millions, num_experts):
    found = counted(models.config(name))
    assert found.total / 1e9 == pytest.approx(billions, abs=0.005)
    assert found.per_expert / 1e6 == expert_millions
    assert found.num_experts == num_experts
    assert found.by_kind["routed experts"] == num_experts * found.per_expert
    if "deepseek" in name:
        assert found.by_kind["dense mlp"] == 3 * 2048 * 10944
        assert found.by_kind["shared experts"] == 27 * 3 * 2048 * 2816


@pytest.mark.parametrize(
    ("method", "num_bytes"), [("flux", 3_000_000), ("flux", 3_800_000), ("fmes", 3_000_000), ("fmq", 2_000_000)]
)
def test_a_memory_becomes_budgets_that_fit_and_cannot_grow(method, num_bytes):
    step = Step(2, 32, torch.float32, kernel="slots")
    plan = memory.plan_memory(CONFIGS["llama"], method, num_bytes, step=step)
    assert plan.fits and plan.usable_bytes == int(0.9 * num_bytes)
    assert plan.num_tuned < 36
    beyond = memory.plan_memory(CONFIGS["llama"], method, None, plan.num_tuned + 1, step=step)
    assert beyond.peak_bytes > plan.usable_bytes
    assert memory.plan_memory(CONFIGS["llama"], method, 10**9, step=step).num_tuned == 36


def test_offloading_takes_what_fits_and_leaves_the_rest_on_the_host():
    config = CONFIGS["llama"]
    step = Step(1, 8, torch.float32, kernel="slots")
    whole = memory.plan_memory(config, "fmd", 10**9, step=step)
    assert (whole.num_tuned, whole.num_resident, whole.host_bytes) == (36, 36, 0)
    expert_bytes = 4 * counted(config).per_expert
    plan = memory.plan_memory(config, "fmd", 1_200_000, step=step)
    assert plan.fits and plan.num_tuned == 36 and 2 <= plan.num_resident < 36
    assert plan.peak_bytes + expert_bytes > plan.usable_bytes
    # Weights, gradient and two moments in 32 bits, and the copy in the computing type, here 32 bits too.
    assert plan.host_bytes == 36 * expert_bytes * 5


def test_fewer_bits_need_less():
    config = CONFIGS["deepseek"]
    sizes = [memory.plan_memory(config, "fmq", step=Step(2, 16, bits=bits)).peak_bytes for bits in (2, 4, 8)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("name", ["deepseek", "mixtral"])
@pytest.mark.parametrize("sizes", [{"batch": 4, "tokens": 64}, {"batch": 1, "tokens": 8}])
def test_layers_that_are_counted_again_are_as_if_they_were_run(monkeypatch, name, sizes):
    """With the peak at the end of the forward pass, and late in the backward pass, where gradients have piled up."""
    config = copy.deepcopy(CONFIGS[name])
    config.num_hidden_layers = 6
    model, step = dry_run.meta_model(config, torch.bfloat16), Step(**sizes)
    experts = len(find.layers(model))
    plans = [[Slots(2, 2, 3)] * experts, [Slots(1, 1, 4)] * 2 + [Slots(2, offloaded=True)] * (experts - 2)]
    short = [dry_run.peak(model, slots, step, learns) for slots in plans for learns in (True, False)]
    monkeypatch.setattr(dry_run, "_make", lambda layer: (id(layer),))
    assert short == [dry_run.peak(model, slots, step, learns) for slots in plans for learns in (True, False)]


def test_nothing_is_left_behind_in_the_configuration_or_the_model():
    config = CONFIGS["olmoe"]
    before = config.to_dict()
    model = dry_run.meta_model(config, torch.float32)
    names = {name: type(module) for name, module in model.named_modules()}
    dry_run.peak(model, [Slots(4, 2, 8)] * 3, Step(2, 16))
    assert {name: type(module) for name, module in model.named_modules()} == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    memory.plan_memory(config, step=Step(1, 8))
    assert config.to_dict() == before
    real = AutoModelForCausalLM.from_config(config)
    real.set_attn_implementation(dry_run.DRY_ATTENTION)
    with pytest.raises(ValueError, match="computes nothing"):
        real(torch.zeros(1, 4, dtype=torch.long))


def test_tokens_spread_evenly_and_join_on_merged_slots():
    # 4 tokens, 2 choices of 4 experts: a pair of experts is missed by 1 of 6 choices.
    assert Slots(2, 1, 2).num_pairs(12, top_k=2) == [6, 6, 10]
    assert Slots(4).num_pairs(12, top_k=2) == [6, 6, 6, 6]
    assert Slots(1).num_pairs(12, top_k=2) == [12]


def test_the_tracker_counts_each_storage_once():
    live = MemoryTracker()
    with live:
        one = torch.zeros(1000, dtype=torch.float32)
        view = one.view(10, 100)
        two = one + 1
        live.mark(one, "weights")
        assert live.by_kind == {"weights": 4000, "activations": 4000}
        del one, view, two
        torch.zeros(500)
    assert live.peak_bytes == 8000 and live.at_peak == {"activations": 8000}
    assert sum(live.by_kind.values()) == 0


def test_the_plan_as_text_and_as_json(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    plan = memory.plan(str(tmp_path), "4MiB", batch=1, tokens=16)
    text = plan.table()
    for word in ("B_tune", "tuned experts", "optimizer state", "peak of a step", ": fits"):
        assert word in text
    answer = json.loads(json.dumps(plan.to_dict()))
    assert answer["fits"] and answer["rows"][0]["kind"] == "embedding" and 3 <= answer["num_tuned"] < 36
    unlimited = memory.plan_memory(CONFIGS["llama"], step=Step(1, 8))
    assert unlimited.fits is None and unlimited.num_tuned == unlimited.num_merged == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "flex"}, "method: expected one of flux, flux_plus, fmd, fmq, fmes, got 'flex'"),
        ({"kernel": "magic"}, "kernel: expected one of auto, grouped, slots, got 'magic'"),
        ({"batch": 0}, "batch: expected 1 to 16384, got 0"),
        ({"batch": -3}, "batch: expected 1 to 16384, got -3"),
        ({"tokens": 0}, "tokens: expected 1 to 262144, got 0"),
        ({"bits": 5}, "bits: expected one of 2, 3, 4, 8, got 5"),
        ({"method": "fmq", "bits": 7}, "bits: expected one of 2, 3, 4, 8, got 7"),
        ({"memory_bytes": -5}, "memory: expected at least 1 byte, got -5"),
        ({"num_tuned": 99}, r"num_tuned: expected 1\.\.36 for flux, got 99"),
        ({"num_tuned": 99, "num_merged": 0}, r"num_tuned: expected 1\.\.36 for flux, got 99"),
        ({"num_tuned": 0}, r"num_tuned: expected 1\.\.36 for flux, got 0"),
        ({"method": "fmes", "num_tuned": 5}, r"num_tuned: expected 9\.\.36 for fmes, got 5"),
        ({"num_tuned": 30, "num_merged": 7}, r"num_merged: expected 0\.\.6 beside 30 tuned, got 7"),
        ({"num_tuned": 3, "num_merged": 2}, "num_merged: expected at least 3"),
        ({"memory_bytes": 100_000}, r"memory: 0\.00 GiB usable, but flux needs at least .* smaller batch"),
        ({"memory_bytes": 100_000, "method": "fmd"}, "memory: .* fmd needs at least"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        names = Step.__dataclass_fields__.keys()
        step = Step(**{"batch": 1, "tokens": 8} | {name: arguments[name] for name in arguments.keys() & names})
        memory.plan_memory(CONFIGS["llama"], **{k: v for k, v in arguments.items() if k not in names}, step=step)


def test_wrong_models_and_sizes():
    with pytest.raises(ValueError, match="no MoE layer"):
        memory.plan_memory(LlamaConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2))
    with pytest.raises(ValueError, match="^model: expected a causal language model, got SwitchTransformersConfig"):
        memory.plan_memory(SwitchTransformersConfig())
    with pytest.raises(ValueError, match="expected a size such as 24GiB, 24GB or 512MiB, got 'big'"):
        memory.plan("llama-moe-3.5b", "big")
    with pytest.raises(ValueError, match="slots: expected one per MoE layer, 3, got 1"):
        dry_run.peak(dry_run.meta_model(CONFIGS["llama"], torch.float32), [Slots(1)], Step(1, 8))


@pytest.mark.parametrize("method", ["flux", "fmd", "fmes"])
def test_adapters_need_less_by_the_state_that_they_do_not_have(method):
    config = CONFIGS["llama"]
    whole, low = (memory.plan_memory(config, method, None, 16, step=Step(1, 8, rank=rank)) for rank in (0, 4))
    kinds = [{row.kind: row.num_bytes for row in plan.rows} for plan in (whole, low)]
    size, learned = counted(config).per_expert, 4 * (2 * 32 + 64)  # B of [64, 64] and of [64, 32]
    assert (kinds[0]["optimizer state"], kinds[1]["optimizer state"]) == (16 * 8 * size, 16 * 8 * learned)
    fixed = 4 * (64 + 32)
    assert kinds[1]["tuned experts"] == 16 * (2 * size + 4 * (learned + fixed))
    assert low.peak_bytes < whole.peak_bytes


def test_more_experts_fit_with_adapters():
    run = make_config({"model": "mini-llama-moe", "training.batch_size": 1, "training.max_tokens": 8})
    low = run.updated({"adapter.kind": "lora", "adapter.rank": 4})
    num_bytes = memory.plan("mini-llama-moe", None, "flux", batch=1, tokens=8).peak_bytes
    shares = [memory.share_that_fits(one, num_bytes)[0] for one in (run, low)]
    assert shares[1] > 1.5 * shares[0]
