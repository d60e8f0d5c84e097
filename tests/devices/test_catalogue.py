from __future__ import annotations

import pytest

from fluxlib.devices import catalogue


@pytest.mark.parametrize("device", catalogue.DEVICES.values(), ids=lambda device: device.name)
def test_every_number_has_a_source_and_no_rate_exceeds_its_peak(device):
    assert {"memory", "peak_flops", "fractions"} <= set(device.sources)
    assert "bus" in device.sources if device.unified else "host" in device.sources
    assert 0 < device.flops_per_s < device.peak_flops
    assert 0 < device.memory_rate < device.memory_bytes_per_s
    assert device.bus_rate <= device.memory_rate


def test_participants_take_the_devices_of_a_fleet_in_turn():
    names = [device.name for device in catalogue.fleet("mixed", 7)]
    assert names == [*catalogue.FLEETS["mixed"], "l20", "rtx-4090"]
    assert [device.name for device in catalogue.fleet("paper", 3)] == ["l20"] * 3
    assert [device.name for device in catalogue.fleet("rtx-3060", 2)] == ["rtx-3060"] * 2


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="clock.fleet is 'strong', allowed are paper, consumer, edge, mixed, l20"):
        catalogue.fleet("strong", 1)
    for name in ("5g", "0mbps", "-1mbps", "1e3mbps"):
        with pytest.raises(ValueError, match=f"clock.link is '{name}', allowed are none, 10gbps, 1gbps, 100mbps, lte"):
            catalogue.link(name)


@pytest.mark.parametrize(("name", "bytes_per_s"), [("800kbps", 1e5), ("2.5mbps", 312_500), ("4gbps", 5e8)])
def test_a_link_may_be_a_rate(name, bytes_per_s):
    found = catalogue.link(name)
    assert (found.up_bytes_per_s, found.down_bytes_per_s, found.latency_s) == (bytes_per_s, bytes_per_s, 0)
    assert catalogue.link("1gbps").latency_s == 0.001
