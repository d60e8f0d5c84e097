"""A better device or link never makes any method slower: held over a grid around every device of the catalogue."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest

from fluxlib.analysis.studies.real_models import METHODS, works
from fluxlib.devices import clock
from fluxlib.devices.catalogue import DEVICES, LINKS, Device, Link

MODELS = ("llama-moe-3.5b", "deepseek-moe-16b")
FORMS = ("overlapped", "on_demand")
TOKENS = 256
TIMES = (0.1, 0.25, 0.5, 0.8, 1.0, 1.1, 1.5, 2.0, 3.0, 5.0, 10.0, 40.0)
RATES = {
    "memory": ("memory_bytes",),
    "bus": ("bus_bytes_per_s",),
    "host": ("host_bytes_per_s",),
    "bandwidth": ("memory_bytes_per_s",),
    "arithmetic": ("peak_flops",),
}


def round_s(model: str, method: str, device: Device, link: Link, form: str) -> float:
    shapes = clock.shapes(model)
    work = works(shapes.num_experts, tokens_per_sample=TOKENS)[method]
    seconds = clock.participant_seconds(work, None, shapes, device, link, TOKENS, form)  # type: ignore[arg-type]
    return clock.round_seconds([seconds], clock.server_seconds([work] * 10, shapes))


@pytest.mark.parametrize("what", RATES)
@pytest.mark.parametrize("method", METHODS)
def test_more_of_anything_never_makes_a_round_longer(method: str, what: str) -> None:
    for model, device, form in product(MODELS, DEVICES.values(), FORMS):
        grid = [replace(device, **{name: getattr(device, name) * times for name in RATES[what]}) for times in TIMES]
        found = [round_s(model, method, each, LINKS["1gbps"], form) for each in grid]
        wrong = [(a, b) for a, b in pairwise(found) if b > a * (1 + 1e-12)]
        assert not wrong, (model, device.name, form, wrong)


@pytest.mark.parametrize("method", METHODS)
def test_a_faster_link_never_makes_a_round_longer(method: str) -> None:
    for model, device, link in product(MODELS, DEVICES.values(), LINKS.values()):
        for changed in ("up_bytes_per_s", "down_bytes_per_s"):
            grid = [replace(link, **{changed: getattr(link, changed) * times}) for times in TIMES]
            found = [round_s(model, method, device, each, "overlapped") for each in grid]
            wrong = [(a, b) for a, b in pairwise(found) if b > a * (1 + 1e-12)]
            assert not wrong, (model, device.name, link.name, changed, wrong)


@pytest.mark.parametrize(("model", "method", "form"), [*product(MODELS, ("fmd", "fmq"), FORMS)])
def test_overlapping_is_never_slower_than_on_demand_and_never_free(model: str, method: str, form: str) -> None:
    for device in DEVICES.values():
        small, large = (replace(device, memory_bytes=size) for size in (0.1 * device.memory_bytes, 1e15))
        tight, roomy = (round_s(model, method, each, LINKS["1gbps"], form) for each in (small, large))
        assert tight >= roomy
        assert round_s(model, method, small, LINKS["1gbps"], "overlapped") <= tight
        shapes = clock.shapes(model)
        work = works(shapes.num_experts, tokens_per_sample=TOKENS)[method]
        assert clock.phase_seconds(work, shapes, small, LINKS["1gbps"], TOKENS, form)["pcie"] > 0  # type: ignore[arg-type]
