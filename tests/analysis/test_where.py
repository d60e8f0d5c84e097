"""Where FLUX pays, on times made by hand: everybody takes the fastest of the runs that fit."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from fluxlib.analysis import where
from fluxlib.config import make_config
from fluxlib.devices import memory
from fluxlib.devices.catalogue import DEVICES


def times(*rows: tuple[str, str, float, float]) -> pd.DataFrame:
    """Runs by method, id, seconds to the target (NaN: never) and seconds of the whole run."""
    names = ["method", "run_id", "device_s_to_target", "end"]
    table = pd.DataFrame(rows, columns=names)
    return table.assign(device_s_at_least=table["device_s_to_target"].fillna(table["end"]))


def duel(raced: pd.DataFrame) -> dict[str, object]:
    """Of one race."""
    (row,) = where.duels(raced.assign(model="m", task="t", seed=0, device="l20", link="lte")).to_dict("records")
    return row


def test_the_fastest_run_of_flux_meets_the_fastest_baseline() -> None:
    found = duel(times(
        ("flux", "slow", 40.0, 90.0), ("flux", "fast", 20.0, 90.0), ("fmd", "d", 60.0, 90.0), ("fmes", "e", 50.0, 90.0)
    ))  # fmt: skip
    assert (found["factor"], found["sign"], found["baseline"], found["our_run"]) == (2.5, "", "fmes", "fast")


def test_who_never_arrives_gives_a_bound_and_stands_behind_who_does() -> None:
    never = math.nan
    lower = duel(times(("flux", "f", 20.0, 90.0), ("fmd", "d", never, 60.0), ("fmq", "q", never, 50.0)))
    assert (lower["factor"], lower["sign"]) == (2.5, where.LATER)
    upper = duel(times(("flux", "f", never, 90.0), ("fmd", "d", 45.0, 60.0), ("fmq", "q", never, 5.0)))
    assert (upper["factor"], upper["sign"], upper["baseline"]) == (0.5, where.NEVER, "fmd")
    neither = duel(times(("flux", "f", never, 90.0), ("fmd", "d", never, 60.0)))
    assert neither["sign"] == where.ABSENT and math.isnan(neither["factor"])
    assert duel(times(("fmd", "d", 45.0, 60.0)))["sign"] == where.ABSENT


def test_bounds_of_one_kind_make_a_bound_and_of_both_nothing() -> None:
    place = {"model": "m", "device": "l20", "link": "1gbps", "baseline": "fmd"}
    kinds = {"": 2.0, where.LATER: 8.0, where.NEVER: 0.5}

    def mean(*signs: str) -> tuple[str, float]:
        (row,) = where.over_tasks(pd.DataFrame([place | {"sign": s, "factor": kinds[s]} for s in signs])).to_dict(
            "records"
        )
        return row["sign"], row["factor"]

    assert mean("", "") == ("", pytest.approx(2.0)) and mean("", where.LATER) == (where.LATER, pytest.approx(4.0))
    assert mean("", where.NEVER)[0] == where.NEVER and mean(where.LATER, where.NEVER)[0] == where.ABSENT


def test_a_run_fits_where_its_share_of_tuned_experts_does_and_what_offloads_where_the_rest_does() -> None:
    def config(method: str):
        return make_config({"method": method, "clock.model": "llama-moe-3.5b", "clock.tokens_per_sample": 128})

    def fits(method: str, tuned_frac: float, device: str) -> bool:
        found = memory.fits(config(method), tuned_frac, DEVICES[device].memory_bytes)
        assert found == (tuned_frac <= largest(method, device)), "as the search for the largest share has it"
        return found

    def largest(method: str, device: str) -> float:
        try:
            return memory.share_that_fits(config(method), DEVICES[device].memory_bytes)[0]
        except ValueError:
            return 0.0

    assert fits("flux", 0.125, "rtx-4090") and not fits("flux", 0.25, "rtx-4090")
    assert fits("flux", 0.25, "l20")
    assert fits("fmd", 1.0, "rtx-3060") and not fits("fmq", 1.0, "rtx-3060")
    assert not fits("fmes", 0.25, "rtx-4090")


def test_a_budget_is_what_is_tuned_and_what_flux_explores() -> None:
    """Whom FMES does not tune it calls explored: it is asked for their frequencies and keeps none of them."""
    table = pd.DataFrame({"run_id": ["a", "a", "b"], "num_tuned": [3, 1, 5], "num_explored": [1, 3, 9]})
    runs = {"a": make_config({"method": "flux"}), "b": make_config({"method": "fmes"})}
    assert where.budgets(table, runs).to_dict() == {"a": 4, "b": 5}


def test_first_is_who_arrives_in_every_race_of_both_kinds_with_adapters_or_without() -> None:
    def arrival(method: str, rank: int, seconds: float, seed: int = 0, device: str = "l20") -> dict[str, object]:
        place = {"model": "m", "task": "t", "seed": seed, "device": device, "link": "lte"}
        return place | {"method": method, "rank": rank, "kind": f"{method} {rank}", "device_s_to_target": seconds}

    rows = [arrival("fmd", 0, 40.0), arrival("fmd", 0, 30.0), arrival("flux_plus", 0, 20.0), arrival("fmd", 8, 10.0)]
    rows += [arrival("fmd", 0, 1.0, seed=1)]  # nobody has adapters there
    rows += [arrival("fmd", 0, math.nan, device="rtx-3060")]
    found = where.first(pd.DataFrame(rows)).set_index("device")
    assert found.loc["l20", ["method", "rank", "seconds", "num_races", "lead"]].tolist() == ["fmd", 8, 10.0, 1, 2.0]
    assert found.loc["rtx-3060", ["seconds", "lead"]].isna().all()
    rows += [arrival("fmd", 8, math.nan, seed=1), arrival("flux_plus", 0, 5.0, seed=1)]
    (l20, _) = where.first(pd.DataFrame(rows)).to_dict("records")
    assert (l20["method"], l20["rank"], l20["seconds"], l20["num_races"], l20["lead"]) == (
        "flux_plus",
        0,
        12.5,
        2,
        1.24,
    )
    rows += [arrival("fmq", 8, 9.0)]  # with adapters it ran one seed: the other race would be without it
    (l20, _) = where.first(pd.DataFrame(rows)).to_dict("records")
    assert (l20["method"], l20["rank"], l20["seconds"], l20["num_races"]) == ("fmq", 8, 9.0, 1)
    without = where.first(pd.DataFrame(rows[:3]))
    assert without["method"].tolist() == ["flux_plus"]
