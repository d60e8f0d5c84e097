"""What a round costs, from tables made by hand: 1 s and 10 s phases, links of known rates."""

from __future__ import annotations

import pandas as pd
import pytest

from fluxlib.analysis import runs, studies
from fluxlib.analysis.studies import merging, scale
from fluxlib.figures import overhead
from fluxlib.records import PHASES


def tables(**seconds: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two methods, two rounds, two participants; the second is slower by what ``seconds`` says of FLUX's phases."""
    rounds, participants = [], []
    for method, slow in (("flux", 1.0), ("fmd", 2.0)):
        for number in (0, 1, 2):
            each = {phase: slow * (seconds.get(phase, 0.0)) for phase in PHASES}
            total = sum(each[phase] for phase in runs.SERIAL) + 0.5 if number else 0.0
            rounds.append({
                "run_id": method, "method": method, "model": "m", "task": "t", "seed": 0, "round": number,
                "link": "1gbps", "clock_model": "m", "metric": number / 2, "metric_name": "accuracy",
                "round_device_s": total,
                "server_device_s": 0.5 if number else 0.0, "device_s": number * total, "wall_s": number,
                "device_memory_bytes": 2**30,
            })  # fmt: skip
            for who in range(2) if number else ():
                share = {f"{phase}_device_s": value * (who + 1) / 2 for phase, value in each.items()}
                participants.append({"run_id": method, "round": number, "participant": who, "rejected": "", **share})
    return pd.DataFrame(rounds), pd.DataFrame(participants)


def test_phases_are_the_slowest_participants_and_shares_of_the_round():
    found = runs.breakdown(*tables(train=2.0, upload=6.0, profile=1.0)).set_index(["method", "phase"])
    assert found.loc[("flux", "train"), "seconds"] == 2.0
    assert found.loc[("fmd", "upload"), "seconds"] == 12.0
    assert found.loc[("flux", "upload"), "share"] == pytest.approx(6.0 / 8.5)
    assert found.loc[("flux", "server"), "seconds"] == 0.5


def test_pictures_have_a_bar_per_method():
    rounds, participants = tables(train=2.0, upload=6.0)
    found = runs.breakdown(rounds, participants)
    texts = [text.get_text() for text in overhead.round_phases(found, rounds).axes[0].texts]
    assert texts == ["8", "16"]  # 8.5 and 16.5, to even
    assert [text.get_text() for text in overhead.round_memory(rounds).axes[0].texts] == ["1", "1"]


def test_the_clock_is_held_against_this_machine():
    bench = next(iter(studies.benches("mini-llama-moe", ["mini-mmlu"], [0], held_out=4)))
    (case,) = merging.cases([bench], 16, "frequency", 0.25, 0.25)
    device = scale.this_machine(size=64, repeats=1)
    assert device.peak_flops > 0 and device.memory_rate == device.memory_bytes_per_s
    table = studies.measurements(scale.check_clock([case], 1, device), "x")
    assert (table["value"] > 0).all() and len(table) == 8
    assert len(overhead.clock_check(table).axes) == 1
    assert overhead.clock_table(table)["block"].tolist() == [*scale.BLOCKS, "together"]


def test_the_clocks_error_is_a_factor_per_block_and_a_difference_of_shares():
    rows = [
        studies.row("clock_check", f"{block}, {kind}", seconds, model="m", task="t", seed=seed)
        for seed in (0, 1)
        for block, predicted, measured in (("train", 3.0, 6.0 + seed), ("merge", 1.0, 1.0))
        for kind, seconds in (("predicted", predicted), ("measured", measured))
    ]
    found = overhead.clock_table(studies.measurements(rows, "x")).set_index("block")
    train = found.loc["train"]
    assert (train["predicted_s"], train["measured_s"], train["num_seeds"]) == (3.0, 6.5, 2)
    assert (train["low"], train["high"]) == (2.0, 7 / 3)
    assert train["predicted_share"] == 0.75 and train["measured_share"] == pytest.approx(13 / 15)
    assert found.loc["together", "factor"] == pytest.approx((7 / 4 + 8 / 4) / 2)
