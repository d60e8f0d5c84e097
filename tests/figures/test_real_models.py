"""The public models on the catalogue's devices: typical rounds, the account of offloading, and the pictures."""

from __future__ import annotations

import pytest
import torch

from fluxlib.analysis import studies
from fluxlib.analysis.studies import real_models as real
from fluxlib.devices import clock
from fluxlib.devices import step as training_step
from fluxlib.devices.catalogue import DEVICES
from fluxlib.figures import real_models
from fluxlib.moe.offloaded import DeviceSet

MODEL = "llama-moe-3.5b"


def test_a_typical_round_of_each_method():
    works = real.works(512, participants=2, samples=32, tokens_per_sample=10)
    assert {name: work.num_uploaded for name, work in works.items()} == {
        "flux": 128, "fmd": 512, "fmq": 512, "fmes": 128,
    }  # fmt: skip
    # Of two who choose a quarter each, independently, 7/16 of the experts have changed.
    assert [works[name].num_downloaded for name in ("flux", "fmes")] == [224, 224]
    assert [works[name].offloaded for name in real.METHODS] == [False, True, True, False]
    assert {work.train_tokens for work in works.values()} == {320}
    assert (works["fmq"].upload_bits, works["flux"].upload_bits) == (4.25, 16.0)
    few = real.works(512, wire_bits=4.25)
    assert {(work.download_bits, work.upload_bits) for work in few.values()} == {(4.25, 4.25)}


@pytest.mark.parametrize("capacity", [3, 10, 25])
def test_the_share_of_resident_experts_is_the_hit_rate_of_the_device_set(capacity):
    host = {expert: {"down_proj": torch.zeros(1)} for expert in range(30)}
    on_device = DeviceSet(capacity)

    def step() -> None:
        for expert in [*range(30), *reversed(range(30))]:
            on_device.get((0, expert), host[expert], torch.device("cpu"))

    step()
    before = on_device.traffic.hits
    step()
    assert (on_device.traffic.hits - before) / 60 == pytest.approx(capacity / 30)


def test_placement_shares_add_up_and_follow_the_memory():
    shapes = clock.shapes(MODEL)
    found = {row["setting"]: row["value"] for row in real.resident(MODEL, ["l20", "rtx-3060", "jetson-agx-orin"])}
    assert all(0 <= share <= 1 for share in found.values())
    assert found["l20"] >= found["rtx-3060"]
    work = real.works(shapes.num_experts)["fmd"]
    placed = training_step.placed(training_step.Load(work, shapes, 256), DEVICES["l20"])
    assert placed.trained + placed.resident + placed.away == pytest.approx(
        shapes.num_experts * shapes.expert_parameters
    )


def test_phases_and_rounds_become_pictures():
    rows = list(real.rounds(MODEL, ["l20", "rtx-4090"], samples=16, tokens_per_sample=16))
    rows += [
        studies.row("real_memory", f"{method}, {kind}", 2**30, model=MODEL)
        for method in real.METHODS
        for kind in ("tuned experts", "attention", "optimizer state")
    ]
    table = studies.measurements(rows, "x")
    by_round = table[table["study"] == "real_round"].set_index("setting")["value"]
    # One round at 1 Gb/s: FMD moves all experts up and nearly as many down as FLUX does.
    assert by_round["fmd, l20, 1gbps, 16 bit"] > by_round["flux, l20, 1gbps, 16 bit"]
    assert by_round["fmq, l20, lte, 16 bit"] == by_round["fmq, l20, lte, 4 bit"]
    assert len(real_models.phases(table, "1gbps").axes) == 2
    assert len(real_models.links(table).axes) == 4
    labels = [text.get_text() for text in real_models.memory(table).axes[0].texts]
    assert labels[:4] == ["3"] * 4
