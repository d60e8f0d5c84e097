"""Speed-ups and the claims table on tables by hand: verdicts, intervals, misses, absent tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pages
import pandas as pd
import pytest
from matplotlib.figure import Figure

from fluxlib import figures, records
from fluxlib.analysis import claims, speedups, studies
from fluxlib.analysis.claims import Claim, Reading, Tables
from fluxlib.analysis.claims.table import row as row_of
from fluxlib.analysis.claims.tables import values
from fluxlib.analysis.speedups import against_all, describe, speed_ups
from fluxlib.analysis.statistics import geometric
from fluxlib.analysis.wording import shown, shown_interval
from fluxlib.app import cli
from fluxlib.io import ConfigError

SCORES = {"fmd": (0.2, 0.6, 1.0, 1.0, 1.0), "flux": (0.2, 0.6, 1.0, 1.0, 1.0), "fmq": (0.2, 0.4, 0.3, 0.4, 0.3)}
SECONDS = {"fmd": 40.0, "flux": 10.0, "fmq": 10.0}


def run(method: str, seed: int, scores: tuple[float, ...] = (), seconds: float = 0.0, **more: object) -> pd.DataFrame:
    """Rounds of one run: a score each, ``seconds`` apart."""
    scores, seconds = scores or SCORES[method], seconds or SECONDS[method]
    number = np.arange(len(scores))
    frame = pd.DataFrame({"round": number, "metric": scores, "device_s": number * seconds, "wall_s": number * 1.0})
    fixed = {"method": method, "model": "mini-llama-moe", "task": "mini-dolly", "seed": seed, "variant": ""}
    fixed |= {"metric_name": "rouge_l", "clock_model": "llama-moe-3.5b", "link": "1gbps", "num_participants": 8} | more
    name = f"{method}{fixed['variant']}-{fixed['model']}-{fixed['task']}-{seed}"
    return frame.assign(round_device_s=np.where(number, seconds, 0.0), run_id=name, **fixed)


def tables(*runs: pd.DataFrame, **more: object) -> Tables:
    return Tables(rounds=pd.concat(runs, ignore_index=True), **more)  # type: ignore[arg-type]


def claim(slug: str) -> Claim:
    return next(one for one in claims.CLAIMS if one.slug == slug)


def read(slug: str, found: Tables) -> Reading:
    (reading,) = claims.read(claim(slug), found)
    return reading


def grid(flux: dict[int, float]) -> list[pd.DataFrame]:
    """FMD and FLUX, one pair per seed; FLUX's seconds per round by seed."""
    return [one for seed, seconds in flux.items() for one in (run("fmd", seed), run("flux", seed, seconds=seconds))]


def rows(study: str, setting: str, *values: float, **more: object) -> list[dict]:
    """One value per seed."""
    return [studies.row(study, setting, value, model="m", task="t", seed=seed, **more)  # type: ignore[arg-type]
            for seed, value in enumerate(values)]  # fmt: skip


def measurements(stem: str, *parts: list[dict]) -> Tables:
    return Tables(measurements={stem: {"m": studies.measurements([r for part in parts for r in part], f"{stem}-m")}})


def test_a_speed_up_is_a_geometric_mean_of_paired_seeds_with_its_interval() -> None:
    table = speed_ups(against_all(pd.concat(grid({0: 20.0, 1: 10.0, 2: 5.0}))))
    (row,) = table.to_dict("records")
    assert (row["seeds"], row["num_both"], row["ahead"], row["behind"]) == (3, 3, 3, 0)
    assert row["speedup"] == pytest.approx(4.0)
    half = 4.302652730 * np.log(2) / np.sqrt(3)  # t(0.975, 2 degrees of freedom) times the standard error of the logs
    assert (row["low"], row["high"]) == pytest.approx((4 * np.exp(-half), 4 * np.exp(half)))
    assert row["rounds_ratio"] == pytest.approx(1.0) and row["final_ratio"] == pytest.approx(1.0)


def test_the_target_is_that_of_the_seed_and_of_the_last_three_scores() -> None:
    low = tuple(score / 2 for score in SCORES["fmd"])
    found = against_all(pd.concat([run("fmd", 0), run("flux", 0), run("fmd", 1, low), run("flux", 1, low)]))
    assert found.groupby("seed")["target"].first().tolist() == pytest.approx([0.95, 0.475])
    falling = against_all(pd.concat([run("fmd", 0, (0.2, 0.9, 0.9, 0.6)), run("flux", 0)]))
    assert falling["target"].iloc[0] == pytest.approx(0.95 * 0.8)


def test_misses_are_counted_on_both_sides() -> None:
    never = (0.2, 0.3, 0.3, 0.3, 0.3)
    runs = [*grid({0: 10.0}), run("fmd", 1), run("flux", 1, never), run("fmq", 0), run("fmq", 1)]
    by_name = {row["baseline"]: row for row in speed_ups(against_all(pd.concat(runs))).to_dict("records")}
    fmd, fmq = by_name["fmd"], by_name["fmq"]
    assert (fmd["ours_missed"], fmd["ahead"], fmd["behind"]) == (1, 1, 1) and np.isnan(fmd["at_least"])
    assert "never (1 of 2), 4× otherwise" in describe(fmd)
    assert (fmq["baseline_missed"], fmq["ours_missed"], fmq["ahead"], fmq["behind"]) == (2, 1, 1, 0)


def test_a_baseline_that_never_arrives_gives_a_lower_bound() -> None:
    runs = [*grid(dict.fromkeys(range(3), 10.0)), *(run("fmq", seed) for seed in range(3))]
    row = speed_ups(against_all(pd.concat(runs))).set_index("baseline").loc["fmq"]
    # 0.95 lies seven eighths between the first and the second round: 18.75 s; FMQ runs for 40 s.
    assert row["at_least"] == pytest.approx(40 / 18.75) and np.isnan(row["speedup"])
    assert read("ahead_of_fmq", tables(*runs)).verdict == "agrees"


def test_other_variants_do_not_race_and_a_race_that_ended_early_is_open() -> None:
    late = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    runs = [run("fmd", 0), run("flux", 0, late), run("flux", 0, variant="short"), run("fmq", 0)]
    by_name = speed_ups(against_all(pd.concat(runs))).set_index("baseline")
    assert by_name.loc["fmd", ["seeds", "ahead"]].tolist() == [1, 1]
    # FMQ's run of 40 seconds was over before FLUX reached the target: nobody can say who would have been sooner.
    assert by_name.loc["fmq", ["ahead", "behind", "baseline_missed"]].tolist() == [0, 0, 1]
    assert by_name.loc["fmq", "at_least"] < 1


def test_a_race_that_was_cut_short_is_left_open() -> None:
    late = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    runs = [run("fmd", 0), run("flux", 0, late), run("fmq", 0)]
    other = [run(method, seed, task="mini-mmlu") for method in SCORES for seed in range(3)]
    for found, verdict, reached in ((other, "agrees", True), ([*runs, *other], "agrees in direction", False)):
        reading = read("ahead_of_fmq", tables(*found))
        assert (reading.verdict, reading.reached) == (verdict, reached)
    assert "FMQ never (1 of 1), its run over before FLUX arrived in 1" in reading.ours
    assert "1 of 4 left open" in reading.reason
    most_open = read("ahead_of_fmq", tables(*runs, *[one for one in other if one["seed"].iloc[0] == 0]))
    assert most_open.verdict == "does not"  # one race decided, one open


def test_scores_of_all_methods_stand_side_by_side() -> None:
    plain = pd.concat([*grid({0: 10.0, 1: 20.0}), run("fmq", 0), run("fmq", 1)])
    (line,) = pages.scores_to_markdown(against_all(plain), plain).splitlines()[2:]
    assert "| 2 | 0.200 | 1.000 / 1.000 / 0.333 | 28 / 75 / never | 15 / 40 / 10 |" in line


def test_a_baseline_that_ends_at_nothing_has_no_share() -> None:
    nothing = (0.2, 0.0, 0.0, 0.0, 0.0)
    runs = [*grid({0: 10.0, 1: 10.0}), run("fmq", 0, nothing), run("fmq", 1, (0.2, *[0.5] * 4))]
    row = speed_ups(against_all(pd.concat(runs))).set_index("baseline").loc["fmq"]
    assert (row["final_ratio"], row["baseline_missed"]) == (pytest.approx(2.0), 2)


def test_a_base_model_at_the_target_is_no_race() -> None:
    flat = (1.0, 1.0, 1.0)
    (row,) = speed_ups(against_all(pd.concat([run("fmd", 0, flat), run("flux", 0, flat)]))).to_dict("records")
    assert (row["trivial"], row["ahead"], row["behind"]) == (1, 0, 0)
    assert read("ahead_of_fmd", tables(run("fmd", 0, flat), run("flux", 0, flat))).verdict == "does not"


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [
        ({0: 8.0, 1: 8.0, 2: 8.0}, "agrees"),
        ({0: 8.0, 1: 8.0}, "agrees in direction"),  # two seeds have a range, no interval
        ({0: 20.0, 1: 10.0, 2: 10.0}, "agrees in direction"),
        ({0: 20.0, 1: 80.0}, "does not"),
    ],
)
def test_up_to_needs_every_seed_of_one_task(seconds: dict[int, float], verdict: str) -> None:
    slow = [run(m, seed, seconds=40.0, task="mini-mmlu") for m in ("fmd", "flux") for seed in (0, 1)]
    assert read("speed_up", tables(*grid(seconds), *slow)).verdict == verdict


def test_up_to_prefers_enough_seeds_to_a_larger_factor_and_one_seed_agrees_in_direction_at_most() -> None:
    lucky = [run("fmd", 0, task="mini-mmlu"), run("flux", 0, seconds=1.0, task="mini-mmlu")]
    alone, both = read("speed_up", tables(*lucky)), read("speed_up", tables(*grid({0: 8.0, 1: 8.0, 2: 8.0}), *lucky))
    assert (alone.value, alone.verdict) == (pytest.approx(40.0), "agrees in direction")
    assert "1 seed of 3 needed" in alone.reason
    assert (both.value, both.verdict, both.seeds) == (pytest.approx(5.0), "agrees", 3) and "the best of 2" in both.ours
    more = [run(method, seed, task="mini-mmlu") for method in ("fmd", "flux") for seed in (1, 2, 3)]
    fast = grid({0: 2.0, 1: 2.0, 2: 2.0})
    assert "3 seeds, another task has 4" in read("speed_up", tables(*fast, *lucky, *more)).reason


def test_a_seed_that_begins_at_the_target_is_no_race_for_up_to_as_for_the_others() -> None:
    flat = [run(method, 3, (1.0, 1.0, 1.0)) for method in ("fmd", "flux")]
    found = tables(*grid({0: 8.0, 1: 8.0, 2: 8.0}), *flat)
    assert {read(slug, found).verdict for slug in ("speed_up", "ahead_of_fmd")} == {"agrees"}
    assert "no race in 1 of 4" in read("speed_up", found).reason
    assert read("speed_up", tables(*flat)).verdict == "does not"


def test_a_number_that_is_just_reached_is_reached() -> None:
    assert read("ahead_of_fmd", tables(*grid({0: 20.0}))).value == 2.0
    assert read("ahead_of_fmd", tables(*grid({0: 20.0}))).reached  # the table says "≥ 2×"


def test_up_to_tells_of_an_interval_that_reaches_below_the_papers() -> None:
    reading = read("speed_up", tables(*grid({0: 5.0, 1: 8.0, 2: 8.0})))
    assert (reading.verdict, reading.reason) == ("agrees", "the interval includes less than the paper's")
    assert read("speed_up", tables(*grid({0: 5.0, 1: 6.0, 2: 5.0}))).reason == ""


def test_every_task_means_every_task() -> None:
    other = [run("fmd", 0, task="mini-mmlu"), run("flux", 0, seconds=80.0, task="mini-mmlu")]
    whole, partly = (
        read("ahead_of_fmd", tables(*grid({0: 10.0, 1: 10.0, 2: 10.0}))),
        read("ahead_of_fmd", tables(*grid({0: 10.0, 1: 10.0, 2: 10.0}), *other)),
    )
    assert (whole.verdict, whole.reached, partly.verdict, partly.reached) == ("agrees", True, "does not", False)
    assert "sooner in 3 of 4 seeds and tasks" in partly.reason


def test_a_wide_interval_makes_it_a_direction() -> None:
    reading = read("ahead_of_fmd", tables(*grid({0: 39.0, 1: 5.0, 2: 39.0})))
    assert reading.verdict == "agrees in direction" and "the interval includes 1× on `mini-dolly`" in reading.reason


@pytest.mark.parametrize(("last", "verdict"), [(1.0, "agrees"), (0.96, "agrees in direction"), (0.9, "does not")])
def test_final_quality_is_a_share_of_fmd(last: float, verdict: str) -> None:
    runs = [one for seed in range(3) for one in (run("fmd", seed), run("flux", seed, (0.2, last, last, last, last)))]
    reading = read("quality_dolly", tables(*runs))
    assert (reading.value, reading.verdict) == (pytest.approx(last), verdict)


def test_the_worst_task_decides_on_quality() -> None:
    half = tuple(score / 2 for score in SCORES["flux"])
    other = [run(m, seed, s, task="mini-mmlu") for seed in (0, 1) for m, s in (("fmd", ()), ("flux", half))]
    reading = read("quality", tables(*grid({0: 10.0, 1: 10.0}), *other))
    assert (reading.value, reading.verdict, reading.reached) == (pytest.approx(0.5), "does not", False)
    assert "mean over tasks 75 %" in reading.reason


def test_quality_at_equal_seconds_needs_runs_as_long_as_fmds() -> None:
    short = grid({0: 10.0, 1: 10.0, 2: 10.0})
    early = read("quality_in_time", tables(*short))
    assert early.verdict == "not attempted" and "at 25 % of FMD's run" in early.ours
    assert early.reached is None and row_of(claim("quality_in_time"), [early])["to reach"] == "≥ 99 %"
    longer = [one for seed in range(3) for one in (run("fmd", seed), run("flux", seed, (0.2, 0.6, *[1.0] * 15)))]
    assert read("quality_in_time", tables(*longer)).verdict == "agrees"
    partly = [
        one for seed in (0, 1) for one in (run("fmd", seed, task="mini-mmlu"), run("flux", seed, task="mini-mmlu"))
    ]
    assert read("quality_in_time", tables(*longer, *partly)).verdict == "agrees in direction"


def test_a_model_that_fails_is_not_hidden_by_one_that_was_not_attempted() -> None:
    low = (0.2, *[0.5] * 16)
    other = [one.assign(model="mini-deepseek-moe") for one in (run("fmd", 0), run("flux", 0, low))]
    found = claims.read(claim("quality_in_time"), tables(*grid({0: 10.0}), *other))
    assert [one.verdict for one in found] == ["not attempted", "does not"]
    row = row_of(claim("quality_in_time"), found)
    assert (row["verdict"], row["to reach"]) == ("does not", "≥ 99 %: not reached")
    assert claims.VERDICTS == ("agrees", "agrees in direction", "not attempted", "does not")


def test_the_lead_must_hold_at_every_number_of_participants() -> None:
    runs = [
        run(method, seed, variant=f"participants-{count}", num_participants=count)
        for count in (10, 20, 30)
        for method in ("fmd", "flux")
        for seed in range(3)
    ]
    assert read("participants", tables(*runs, *grid({0: 80.0}))).verdict == "agrees"
    assert read("participants", tables(*runs[:12], *grid({0: 80.0}))).verdict == "agrees in direction"
    alone = [one for one in runs if one["seed"].iloc[0] == 0]
    assert read("participants", tables(*alone, *grid({0: 10.0}))).verdict == "agrees in direction"
    slow = [one.assign(device_s=one["device_s"] * 9) if one["method"].iloc[0] == "flux" else one for one in runs[:6]]
    assert read("participants", tables(*slow, *runs[6:], *grid({0: 10.0}))).verdict == "does not"
    assert claims.read(claim("participants"), tables(*runs[:6], *grid({0: 10.0}))) == []


def test_falls_are_added_up_over_what_both_methods_have() -> None:
    down, less = (0.5, 0.1, 0.5, 0.1), (0.5, 0.4, 0.5, 0.4)
    runs = [run(m, seed, s) for seed in range(3) for m, s in (("fmq", down), ("fmd", less))]
    more = run("fmq", 0, down, task="mini-mmlu")
    for found in (runs, [*runs, more]):
        reading = read("fmq_oscillates", tables(*found))
        assert (reading.value, reading.verdict) == (pytest.approx(4.0), "agrees")


@pytest.mark.parametrize(
    ("slug", "values", "verdict"),
    [
        ("four_bit", (0.05, 0.06, 0.05), "agrees"),
        ("four_bit", (0.05, 0.15, 0.10), "does not"),
        ("four_bit", (0.2, 0.2, 0.2), "does not"),
        ("budgets_uniform", (0.5, 0.5, 0.5), "agrees"),
        ("budgets_uniform", (0.2, 0.3, 0.1), "agrees in direction"),
        ("budgets_uniform", (0.9, 0.9, -0.1), "does not"),
    ],
)
def test_a_size_is_reached_pointed_at_or_missed(slug: str, values: tuple[float, ...], verdict: str) -> None:
    if slug == "four_bit":
        found = measurements("01_profiling", rows("profile_error", "frequency error", *values, x=4))
    else:
        lower = rows("error", "adaptive", *(1 - value for value in values))
        found = measurements("02_merging", lower, rows("error", "uniform", 1.0, 1.0, 1.0))
    reading = read(slug, found)
    assert reading.verdict == verdict and reading.value == pytest.approx(np.mean(values))
    assert reading.low <= reading.value <= reading.high and not (reading.reason and verdict == "agrees")


def test_an_interval_with_no_difference_in_it_is_told() -> None:
    parts = rows("error", "adaptive", 0.99, 0.5, 0.99), rows("error", "discarded", 1.0, 1.0, 1.0)
    reading = read("dropping", measurements("02_merging", *parts))
    assert reading.verdict == "agrees in direction" and "the interval includes 0 %" in reading.reason


def test_epsilon_and_memory_have_rules_of_their_own() -> None:
    name = "epsilon_device_s_at_least"
    times = [rows(name, "dynamic", 10, 10, 10), rows(name, "0.3", 20, 9, 9), rows(name, "0.7", 12, 12, 12)]
    times += [rows("epsilon_round_at_least", s, 1, 1, 1) for s in ("dynamic", "0.3", "0.7")]
    assert read("epsilon", measurements("03_role_assignment", *times)).verdict == "does not"
    times[1] = rows(name, "0.3", 12, 13, 12)
    assert read("epsilon", measurements("03_role_assignment", *times)).verdict == "agrees"
    for own, verdict in ((30, "agrees"), (60, "does not")):  # less than FMD is no direction: it cannot be otherwise
        peaks = [rows("real_peak", method, gib * 2**30) for method, gib in (("flux", own), ("fmd", 80))]
        assert read("memory", measurements("07_real_models", *peaks)).verdict == verdict


def profile(*attended: int) -> Tables:
    """Four experts of one layer, two of them rare; the rare one that receives much attention, seed by seed."""
    found = []
    for seed, expert in enumerate(attended):
        place = [{"model": "m", "task": "t", "seed": seed, "layer": 0, "expert": e} for e in range(4)]
        found.append([studies.row("activation", "", v, **place[e]) for e, v in enumerate((0.5, 0.4, 0.06, 0.04))])
        much = {0: 0.5, 1: 0.5, expert: 0.9}
        found.append([studies.row("attention", "", much.get(e, 0.1), **place[e]) for e in range(4)])
    return measurements("01_profiling", *found)


def test_a_rare_expert_is_attended_if_it_is_so_again_with_another_seed() -> None:
    same = claims.read(claim("attended"), profile(2, 2, 2))[0]
    assert (same.value, same.verdict, same.ours) == (pytest.approx(0.5), "agrees in direction", "50 %")
    assert "seeds are held against each other" in same.reason
    assert claims.read(claim("attended"), profile(2, 3, 2))[0].verdict == "does not"
    assert claims.read(claim("attended"), profile(2)) == []


def test_the_saving_is_that_of_a_typical_round_and_must_reach_the_papers() -> None:
    saved = [rows("round_saving", "1 Gb/s", value, x=x) for x, value in ((64, 0.05), (512, 0.5))]
    reading = read("stale_saving", measurements("01_profiling", *saved))
    assert (reading.value, reading.verdict) == (
        0.05,
        "does not",
    ) and "number of samples: 50 %; at the worst: 5 %" in reading.reason


def test_probes_are_held_against_frequency_alone() -> None:
    kinds = [rows("probe_cosine_distance", "one-sided (paper)", 0.1, 0.2, 0.1, x=1)]
    for alone, verdict in (((0.5, 0.6, 0.5), "agrees"), ((0.05, 0.1, 0.05), "does not")):
        found = measurements(
            "03_role_assignment", *kinds, rows("probe_cosine_distance", "frequency alone", *alone, x=0)
        )
        assert read("forward_only", found).verdict == verdict


def test_values_meet_by_the_number_of_their_seed_and_not_by_their_place() -> None:
    distance = rows("probe_cosine_distance", "one-sided (paper)", 0.1, 0.2, 0.1, 0.4, x=1)
    alone = rows("probe_cosine_distance", "frequency alone", 0.15, 0.25, 0.15, x=0)
    found = measurements("03_role_assignment", distance[:1] + distance[2:], alone)  # seeds 0, 2, 3 and seeds 0, 1, 2
    reading = read("forward_only", found)
    assert (reading.seeds, reading.value, reading.verdict) == (2, pytest.approx(0.1), "agrees in direction")
    moved = [rows("drift", "a quarter tuned", *values, x=x) for x, values in ((1, (1, 2, 4)), (5, (2, 4, 8)))]
    table = measurements("01_profiling", moved[0][:2], moved[1][1:]).measurements["01_profiling"]["m"]
    assert values(table, claim("drift").ours).to_dict() == {1: 2.0}


def test_a_reason_has_the_ratio_of_its_own_row() -> None:
    grown = [rows("growth", "", *values, layer=3, x=x) for x, values in ((0, (0.2, 0.8)), (3, (1.0, 1.0)))]
    budgets = [rows("error", setting, 1.0, 1.0) for setting in ("adaptive", "single")]
    found = measurements("02_merging", *grown, *budgets)
    assert read("early_errors", found).value == pytest.approx(0.4)
    assert "the first layer's error over the last's is: 40 %" in read("budgets_single", found).reason


def test_models_are_averaged_geometrically_in_a_ratio() -> None:
    names = [f"32 x 16 experts, {kind}" for kind in ("per layer", "fused")]
    by_model = {}
    for model, seconds in (("a", 10.0), ("b", 1000.0)):
        parts = [rows("clustering_seconds", names[0], *[seconds] * 3), rows("clustering_seconds", names[1], 1, 1, 1)]
        parts += [rows("clustering_inertia", name, 1, 1, 1) for name in names]
        by_model |= {model: measurements("02_merging", *parts).measurements["02_merging"]["m"]}
    reading = read("clustering", Tables(measurements={"02_merging": by_model}))
    assert (reading.value, reading.verdict) == (pytest.approx(100.0), "agrees")


def test_without_tables_every_claim_says_what_to_run(tmp_path: Path) -> None:
    table = claims.claims(claims.load(tmp_path / "nothing"))
    assert set(table["verdict"]) == {"not attempted"} and len(table) == len(claims.CLAIMS)
    assert table["reason"].str.contains("run ").all()
    assert claims.readings(Tables()).empty and speed_ups(against_all(run("fmd", 0))).empty
    assert "No FLUX and FMD runs" in speedups.to_markdown(speed_ups(against_all(run("fmd", 0))))


def test_the_weakest_model_decides_but_for_up_to() -> None:
    found = Tables(measurements={"01_profiling": {
        "a": studies.measurements(rows("profile_error", "frequency error", 0.01, x=4), "x"),
        "b": studies.measurements(rows("profile_error", "frequency error", 0.5, x=4), "x"),
    }})  # fmt: skip
    row = row_of(claim("four_bit"), claims.read(claim("four_bit"), found))
    assert row["verdict"] == "does not" and "`a`: agrees" in row["reason"] and row["to reach"] == "≤ 8 %: by `a`"
    deep = [r.assign(model="mini-deepseek-moe") for r in grid({0: 80.0, 1: 80.0})]
    both = tables(*grid({0: 8.0, 1: 8.0, 2: 8.0}), *deep)
    assert row_of(claim("speed_up"), claims.read(claim("speed_up"), both))["verdict"] == "agrees"


def test_numbers_in_words() -> None:
    assert (shown(0.1101, "%"), shown(-0.02, "%"), shown(4.75, "x")) == ("11 %", "−2 %", "4.75×")
    assert shown_interval(0.5, 0.4, 0.6) == "0.5 (0.4 to 0.6)" and shown_interval(0.5, 0.5, 0.5) == "0.5"
    assert geometric([2.0, 8.0])[0] == pytest.approx(4.0) and geometric([2.0, 0.0]) == (0.0, 0.0, 2.0)


def test_pictures_of_something_and_of_nothing(tmp_path: Path) -> None:
    found = tables(*grid({0: 10.0, 1: 10.0}), run("fmq", 0), run("fmq", 1))
    table, readings = claims.claims(Tables()), claims.readings(found)
    assert isinstance(figures.claims.claims(table, readings), Figure)
    assert isinstance(figures.claims.claims(table, claims.readings(Tables())), Figure)
    assert isinstance(figures.race.speed_ups(speed_ups(found.times)), Figure)
    assert isinstance(figures.race.speed_ups(speed_ups(against_all(run("fmd", 0)))), Figure)


def test_the_command_prints_and_refuses(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["fluxlib", "claims", "--out", str(tmp_path), "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and len(json.loads(capsys.readouterr().out)) == len(claims.CLAIMS)
    assert "not attempted" in pages.claims_page(tmp_path) and "No runs" in pages.races(tmp_path)
    monkeypatch.setattr("sys.argv", ["fluxlib", "claims", "--profile", "nope"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "allowed for --profile are full" in capsys.readouterr().err


def test_a_notebook_tells_its_own_claims_and_what_goes_beyond_them() -> None:
    parts = [
        rows("error", setting, *found) for setting, found in (("aligned", (0.5, 0.6, 0.5)), ("adaptive", (1, 1, 1)))
    ]
    (table,) = measurements("02_merging", *parts).measurements["02_merging"].values()
    told = claims.in_notebook("02_merging", table, "m")
    assert told.startswith("On m:\n\n- neurons aligned before merging (ours): error below that without: ours **46.7 %")
    assert told.endswith("*agrees*")


def write(folder: Path, one: pd.DataFrame, **about: object) -> Path:
    """Store one run as a federation does."""
    defaults = {"string": "x", "int64": 0, "float64": 0.0, "bool": False}
    whole = pd.DataFrame({c.name: [defaults[c.dtype]] * len(one) for c in records.TABLES["rounds"]})
    kept = one[[name for name in one if name in whole]].reset_index(drop=True)
    file = folder / "rounds" / f"{one['run_id'].iloc[0]}.parquet"
    records.write("rounds", whole.assign(**{name: kept[name] for name in kept}), file, {"parameters": {}} | about)
    return file


def test_a_run_that_did_not_finish_is_left_out_and_named(tmp_path: Path) -> None:
    for one, status in zip(grid({0: 8.0, 1: 8.0}), ("complete", "complete", "complete", "failed"), strict=True):
        file = write(tmp_path, one, status=status, failure="no replies" if status == "failed" else "")
    found = claims.load(tmp_path)
    name = "flux-mini-llama-moe-mini-dolly-1"
    assert found.left_out == {name: "failed: no replies"} and name not in set(found.rounds["run_id"])
    assert read("speed_up", found).verdict == "agrees in direction"  # one seed is left
    table = claims.claims(found)
    assert f"Left out: `{name}` (failed: no replies)." in claims.to_markdown(table)
    file.with_suffix(".json").unlink()
    assert claims.load(tmp_path).left_out == {name: f"no {name}.json beside it"}


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "rounds").mkdir()
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "rounds" / "a.parquet")
    with pytest.raises(records.TableError, match=r"a\.parquet"):
        claims.load(tmp_path)


def test_plain_runs_with_a_partner_are_compared_and_all_others_named(monkeypatch):
    every = pd.concat([run("fmd", 0), run("flux", 0), run("flux", 1), run("flux", 0, variant="random")])
    monkeypatch.setattr(speedups.store, "finished", lambda *_: every)
    monkeypatch.setattr(speedups.records, "unfinished", lambda _: {"a": "stopped"})
    rounds, left_out = speedups.raced(Path("r"))
    assert set(rounds["run_id"]) == {"fmd-mini-llama-moe-mini-dolly-0", "flux-mini-llama-moe-mini-dolly-0"}
    alone = "fmd was not run on its model and task with its seed"
    assert left_out == {"a": "stopped", "flux-mini-llama-moe-mini-dolly-1": alone}
    monkeypatch.setattr(speedups.store, "finished", lambda *_: None)
    with pytest.raises(ConfigError, match="r holds no finished run; `make smoke`"):
        speedups.raced(Path("r"))
