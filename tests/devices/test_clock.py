"""The clock on a model and a device whose numbers are round: every expected value is worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fluxlib import models
from fluxlib.devices import clock, memory, step
from fluxlib.devices.catalogue import DEVICES, LINKS, Device, Link
from fluxlib.devices.clock import ParticipantSeconds, Shapes, phase_seconds, round_seconds
from fluxlib.methods.base import Work
from fluxlib.records import PHASES

SHAPES = Shapes(
    num_layers=1,
    num_experts=10,
    top_k_sum=2,
    hidden_size=0,
    expert_parameters=1_000,
    other_parameters=3_000,
    embedding_parameters=1_000,
)
DEVICE = Device(
    name="round",
    title="1 GFLOP/s, 1 GB/s everywhere",
    memory_bytes=10**9,
    unified=False,
    peak_flops=1e9,
    memory_bytes_per_s=1e9,
    bus_bytes_per_s=1e9,
    host_bytes_per_s=1e9,
    compute_frac=1.0,
    bandwidth_frac=1.0,
)
LINK = Link("round", "1 kB/s up, 2 kB/s down", 1e3, 2e3, 0.0)
WORK = Work(num_experts=100, train_steps=2, train_samples=20, train_tokens=200_000)


def tuning(work: Work, count: int, **more) -> Work:
    """With ``count`` experts tuned, each of which got a token."""
    return replace(work, num_tuned=count, num_updated=count, **more)


def seconds(work: Work, device: Device = DEVICE, link: Link = LINK, **more) -> dict[str, float]:
    return phase_seconds(work, SHAPES, device, link, **more)


def test_every_phase_is_named_and_nothing_done_takes_no_time():
    assert seconds(Work(num_experts=100)) == dict.fromkeys(PHASES, 0.0)


def test_a_transfer_is_bytes_over_rate_and_half_as_long_on_twice_the_link():
    # A tenth of the run's experts is one expert here: 1,000 parameters of 2 bytes.
    work = replace(WORK, num_uploaded=10, num_downloaded=30)
    found = seconds(work)
    assert found["upload"] == pytest.approx(2.0)
    assert found["download"] == pytest.approx(3.0)
    faster = replace(LINK, up_bytes_per_s=2e3, down_bytes_per_s=4e3)
    assert seconds(work, link=faster)["upload"] == pytest.approx(1.0)
    assert seconds(replace(work, upload_bits=4))["upload"] == pytest.approx(0.5)
    assert seconds(work, link=replace(LINK, latency_s=5.0))["upload"] == pytest.approx(7.0)


def test_a_compute_bound_forward_pass_is_flops_over_peak():
    work = replace(WORK, profile_samples=10, profile_tokens=100_000)
    # 2 x (2,000 dense + 2 experts of 1,000) FLOPs per token.
    assert seconds(work)["profile"] == pytest.approx(100_000 * 8_000 / 1e9)
    assert seconds(work, replace(DEVICE, compute_frac=0.5))["profile"] == pytest.approx(1.6)


def test_a_memory_bound_forward_pass_is_weights_over_bandwidth():
    work = replace(WORK, profile_samples=10, profile_tokens=10)
    slow = replace(DEVICE, memory_bytes_per_s=1e3)
    # One batch of ten: 3,000 others and 10 experts of 1,000, 2 bytes each.
    assert seconds(work, slow)["profile"] == pytest.approx(26.0)
    # In 4 bits an expert is read (0.5 bytes a weight), written and read again in 16 bits.
    assert seconds(replace(work, profile_bits=4), slow)["profile"] == pytest.approx(6.0 + 10 * 4.5)
    # Twenty samples are two batches.
    assert seconds(replace(work, profile_samples=20), slow)["profile"] == pytest.approx(52.0)


def test_training_arithmetic_is_two_passes_and_the_weight_gradients_of_the_tuned_share():
    fast_memory = replace(DEVICE, memory_bytes_per_s=1e15)
    tokens = 200_000
    frozen = seconds(replace(WORK, num_frozen=100), fast_memory)["train"]
    half = seconds(tuning(replace(WORK, num_frozen=50), 50), fast_memory)["train"]
    full = seconds(tuning(WORK, 100), fast_memory)["train"]
    assert frozen == pytest.approx(tokens * 16_000 / 1e9)
    assert half == pytest.approx(tokens * 18_000 / 1e9)
    assert full == pytest.approx(tokens * 20_000 / 1e9)


def test_training_arithmetic_counts_tokens_where_they_were_counted():
    fast_memory = replace(DEVICE, memory_bytes_per_s=1e15)
    tokens = 200_000
    work = tuning(WORK, 50, num_frozen=50, routed_tokens=40, slot_tokens=40, tuned_tokens=40)
    # 8,000 FLOPs forward (2,000 dense, 2 experts of 1,000), as many backward, 4,000 for all weight gradients.
    assert seconds(work, fast_memory)["train"] == pytest.approx(tokens * 20_000 / 1e9)
    rare = replace(work, tuned_tokens=10)
    assert seconds(rare, fast_memory)["train"] == pytest.approx(tokens * 17_000 / 1e9)
    joined = replace(rare, slot_tokens=30)
    assert seconds(joined, fast_memory)["train"] == pytest.approx(tokens * 15_000 / 1e9)


def test_training_traffic_is_kept_weights_twice_then_gradients_then_the_optimizer():
    slow = replace(DEVICE, memory_bytes_per_s=1e3)
    work = tuning(WORK, 20, num_frozen=30)
    # Kept: 3,000 others and 3 merged experts, 2 bytes; 2 tuned ones, read in 4, written and read again in 2; all that
    # twice. Then the gradients of 2 experts; weight and two moments read and written, the gradient read.
    step = 2 * (6_000 + 3 * 2_000 + 2 * 8_000) + 2 * 4_000 + 2_000 * 28
    assert seconds(work, slow)["train"] == pytest.approx(2 * step / 1e3)
    # In 4 bits: unpacked like the others; gradients in 2 bytes; half a byte of codes, written back.
    few = replace(work, weight_bits=4)
    step = 2 * (6_000 + 5 * 4_500) + 2 * 2_000 + 2_000 * 19
    assert seconds(few, slow)["train"] == pytest.approx(2 * step / 1e3)


def test_fewer_kept_experts_never_take_longer():
    device, link = DEVICES["l20"], LINKS["1gbps"]
    shapes = clock.shapes("llama-moe-3.5b")
    times = [
        sum(phase_seconds(tuning(WORK, n, num_uploaded=n), shapes, device, link).values()) for n in (10, 25, 50, 100)
    ]
    assert times == sorted(times)


def test_tokens_are_counted_or_assumed_per_sample():
    work = replace(WORK, profile_samples=10, profile_tokens=100_000)
    assert seconds(work, tokens_per_sample=20_000)["profile"] == pytest.approx(2 * seconds(work)["profile"])


def test_offloading_costs_nothing_where_everything_fits():
    work = tuning(WORK, 100, offloaded=True)
    assert seconds(work)["pcie"] == 0.0
    assert seconds(work) == seconds(replace(work, offloaded=False))


def test_what_does_not_fit_crosses_the_bus_in_the_best_placement():
    # 90 % of the memory, less 6,000 bytes of others, holds 5 of the 10 experts with 16 bytes per parameter.
    small = replace(DEVICE, memory_bytes=(6_000 + 5 * 16_000) / 0.9, memory_bytes_per_s=1e15)
    work = tuning(WORK, 100, offloaded=True)
    slow_host = replace(small, bus_bytes_per_s=1e15, host_bytes_per_s=1e3)
    # The other 5 are updated on the host: 28 bytes a parameter. One layer: there is nothing to overlap with.
    assert seconds(work, slow_host, offloading="on_demand")["pcie"] == pytest.approx(2 * 5_000 * 28 / 1e3)
    assert seconds(work, slow_host)["pcie"] == pytest.approx(2 * 5_000 * 28 / 1e3)
    slow_bus = replace(small, bus_bytes_per_s=1e3, host_bytes_per_s=1e15)
    # Parts are sixteenths. 7 of them trained leave room for the weights of 5 experts: 5.625 come and go back, 0.625
    # come again, in 2 bytes. (8 parts: 5 come, come again and go back; 6 parts: 6.25 come and go back.)
    crossing = 2 * (5_625 + 625 + 5_625) / 1e3
    assert seconds(work, slow_bus, offloading="on_demand")["pcie"] == pytest.approx(2 * crossing)
    # Two layers: half of what comes lies behind half of the other stages. Computing takes 0.8 s and 1.2 s.
    two = replace(SHAPES, num_layers=2)
    passes = (0.8 + 11.25) / 2 + 11.25 / 2 + (1.2 + 1.25 + 11.25) / 2 + 11.25 / 2
    found = phase_seconds(work, two, slow_bus, LINK)
    assert found["pcie"] == pytest.approx(2 * (passes - 2.0))
    assert phase_seconds(work, two, slow_bus, LINK, offloading="on_demand")["pcie"] == pytest.approx(2 * crossing)
    # In 4 bits codes come and gradients of 2 bytes go; half of the experts get no token and do neither.
    few = replace(work, weight_bits=4)
    assert seconds(few, slow_bus)["pcie"] < seconds(work, slow_bus)["pcie"]
    assert seconds(replace(work, num_updated=50), slow_bus)["pcie"] == 0.0


def test_what_stays_on_the_device_is_what_the_planner_says():
    """Weights alone, in 16 bit. The planner also sees the cast copy and the gradient of the expert at work;
    activations are each module's own estimate, so the batch is tiny."""
    config = models.LlamaMoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=4,
        num_experts=8, num_selects=2, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    device = replace(DEVICE, memory_bytes=4_000_000)
    plan = memory.plan_memory(config, "fmd", device.memory_bytes, step=memory.Step(1, 4))
    with torch.device("meta"):
        shapes = clock.shapes_of(models.LlamaMoeForCausalLM(config))
    work = tuning(Work(num_experts=100, train_steps=1, train_samples=1, train_tokens=4, offloaded=True), 100)
    found = step.placements(step.Load(work, shapes, None), device)[0]
    assert 2 < plan.num_resident < plan.num_experts
    assert found.resident / shapes.expert_parameters == pytest.approx(plan.num_resident, abs=2)
    resident_bytes = step.WEIGHT_BYTES * shapes.expert_parameters * plan.num_resident
    assert resident_bytes == next(row.num_bytes for row in plan.rows if row.kind == "tuned experts")


def test_memory_is_weights_state_and_activations_and_offloading_stays_within_the_device():
    shapes = replace(SHAPES, hidden_size=1)
    work = tuning(WORK, 20, num_frozen=30)
    # 3,000 others, 2 tuned experts with 16 bytes a parameter, 3 frozen ones; 100,000 tokens a step, 34 bytes each.
    expected = 6_000 + 2 * 16_000 + 3 * 2_000 + 3_400_000
    assert clock.device_bytes(work, shapes, DEVICE) == expected
    assert clock.device_bytes(work, shapes, DEVICE, tokens_per_sample=20_000) == expected + 3_400_000
    all_tuned = tuning(WORK, 100)
    quantised = replace(all_tuned, weight_bits=4)
    assert clock.device_bytes(all_tuned, SHAPES, DEVICE) == 6_000 + 10 * 16_000
    assert clock.device_bytes(quantised, SHAPES, DEVICE) == 6_000 + 10 * 10_500
    small = replace(DEVICE, memory_bytes=100_000)
    assert clock.device_bytes(replace(all_tuned, offloaded=True), SHAPES, small) == 90_000
    assert clock.device_bytes(all_tuned, SHAPES, small) == 166_000


def test_merging_reads_its_sources_from_where_the_full_model_lies():
    work = replace(WORK, num_merge_sources=50)
    assert seconds(work, replace(DEVICE, bus_bytes_per_s=1e3))["merge"] == pytest.approx(5 * 2_000 / 1e3)
    unified = replace(DEVICE, unified=True, bus_bytes_per_s=1e3)
    assert seconds(work, unified)["merge"] == pytest.approx(3 * 5 * 2_000 / 1e9)
    too_small = replace(unified, memory_bytes=20_000)
    assert seconds(work, too_small)["merge"] == pytest.approx(5 * 2_000 / 1e3)


def phases(**named: float) -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0) | named


def test_a_round_waits_for_the_slowest_participant_then_for_the_server():
    times = [ParticipantSeconds(phases(train=3.0, upload=1.0)), ParticipantSeconds(phases(train=1.0, upload=2.5))]
    assert round_seconds(times, server_s=0.5) == 4.5


def test_only_a_profile_for_the_next_round_runs_beside_the_upload():
    times = phases(train=3.0, quantize=0.5, profile=1.0, upload=1.0)
    assert round_seconds([ParticipantSeconds(times, hidden_profile=True)], 1.0) == 5.0
    assert round_seconds([ParticipantSeconds(times)], 1.0) == 6.5
    assert round_seconds([ParticipantSeconds(times, {"quantize": 0.5, "profile": 0.5}, True)], 1.0) == 6.0
    long_profile = times | {"profile": 5.0}
    assert round_seconds([ParticipantSeconds(long_profile, hidden_profile=True)], 1.0) == 8.5


def test_probes_are_made_for_a_share_of_the_experts():
    work = replace(WORK, probe_samples=10, probe_tokens=100_000, expert_probe_samples=40, expert_probe_tokens=400_000)
    # 8,000 FLOPs per token, once; 4 passes for the probed ones of 100 experts are 0.4 for those of 10.
    assert seconds(work)["probe"] == pytest.approx((100_000 + 40_000) * 8_000 / 1e9)
    larger = phase_seconds(work, replace(SHAPES, num_experts=200), DEVICE, LINK)
    assert larger["probe"] == pytest.approx((100_000 + 800_000) * 8_000 / 1e9)


def test_a_round_without_participants_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        round_seconds([], 0.0)


def test_the_server_reads_every_upload_and_writes_the_mean():
    works = [Work(num_experts=100, num_uploaded=n) for n in (10, 20)]
    # (3 experts read + 2 experts read and written) x 1,000 x 2 bytes.
    assert clock.server_seconds(works, SHAPES, DEVICE) == pytest.approx((3 + 4) * 2_000 / 1e9)


@pytest.mark.parametrize(
    ("name", "billions", "expert_millions", "experts", "top_k_sum"),
    [
        ("llama-moe-3.5b", 6.74, 8.454, 512, 32 * 4),
        ("deepseek-moe-16b", 16.38, 8.651, 27 * 64, 27 * 6),
    ],
)
def test_shapes_of_the_public_models_are_what_their_authors_state(name, billions, expert_millions, experts, top_k_sum):
    found = clock.shapes(name)
    assert found.parameters / 1e9 == pytest.approx(billions, abs=0.005)
    assert found.expert_parameters / 1e6 == pytest.approx(expert_millions, abs=0.001)
    assert (found.num_experts, found.top_k_sum) == (experts, top_k_sum)


LOW = replace(SHAPES, expert_sides=(30, 20))
"""With rank 5 the B of an expert has 100 parameters, a tenth of the expert's."""


def adapted(work: Work, device: Device = DEVICE, **more) -> dict[str, float]:
    return phase_seconds(replace(work, adapter_rank=5), LOW, device, LINK, **more)


def test_an_adapter_travels_and_is_averaged_as_what_is_learned():
    work = replace(WORK, num_uploaded=10, num_downloaded=30)
    assert adapted(work)["upload"] == pytest.approx(100 * 2 / 1e3)
    assert adapted(work)["download"] == pytest.approx(3 * 100 * 2 / 2e3)
    whole, low = (clock.server_seconds([replace(work, adapter_rank=rank)] * 2, LOW) for rank in (0, 5))
    assert low == pytest.approx(whole / 10)


def test_an_adapter_is_charged_for_forming_weights_and_for_the_gradient_of_b():
    fast_memory, slow = replace(DEVICE, memory_bytes_per_s=1e15), replace(DEVICE, memory_bytes_per_s=1e3)
    work = tuning(WORK, 50, num_frozen=50, routed_tokens=40, slot_tokens=40, tuned_tokens=40)
    # As without, but weight gradients take 5 * 50 / 1,000 of 4,000; 5 experts are formed twice a step.
    expected = 200_000 * 17_000 + 2 * 2 * 2 * 5 * 5_000
    assert adapted(work, fast_memory)["train"] == pytest.approx(expected / 1e9)
    # 2 tuned experts, read in 2 bytes, written and read again in 2; gradients and AdamW of 100 parameters each.
    step = 2 * (6_000 + 3 * 2_000 + 2 * 6_000) + 2 * 100 * (4 + 28)
    assert adapted(tuning(WORK, 20, num_frozen=30), slow)["train"] == pytest.approx(2 * step / 1e3)


def test_with_an_adapter_weights_cross_the_bus_where_they_have_no_room_and_no_gradient_of_theirs_goes_back():
    slow = replace(DEVICE, memory_bytes=6_000 / 0.9, bus_bytes_per_s=1e3, host_bytes_per_s=1e15)
    work = tuning(WORK, 100, offloaded=True)
    crossing = (20_000 + 20_000 + 2_000) / 1e3  # come, come again, and B's gradients
    assert adapted(work, slow, offloading="on_demand")["pcie"] == pytest.approx(2 * crossing)
    roomy = replace(slow, memory_bytes=(6_000 + 10 * (2_000 + 100 * 16)) / 0.9)
    assert adapted(work, roomy)["pcie"] == 0.0
    assert clock.device_bytes(replace(work, adapter_rank=5, offloaded=False), LOW, roomy) == 6_000 + 10 * 3_600


def test_under_an_adapter_few_bits_are_read_and_kept_and_what_learns_has_all_of_its():
    slow = replace(DEVICE, memory_bytes_per_s=1e3)
    work = tuning(WORK, 20, num_frozen=30, weight_bits=4)
    # As with 16 bits (above), but a weight is read in half a byte; merged slots too, unpacked first.
    frozen = 3 * 1_000 * (0.5 + 2 * 2)
    step = 2 * (6_000 + frozen + 2 * (500 + 4_000)) + 2 * 100 * (4 + 28)
    assert adapted(work, slow)["train"] == pytest.approx(2 * step / 1e3)
    fewer = replace(work, adapter_rank=5)
    kept = 6_000 + 2 * (500 + 100 * 16) + 3 * 2_000
    assert clock.device_bytes(fewer, LOW, slow) == kept


def test_the_sides_of_an_expert_are_those_of_its_matrices():
    found = clock.shapes("llama-moe-3.5b")  # 4,096 to two times 688, and 688 to 4,096
    assert found.expert_sides == (4096 + 688, 2 * 688 + 4096)
    assert found.learned_parameters(0) == found.expert_parameters == 8_454_144
    assert found.learned_parameters(8) == 8 * 5472
