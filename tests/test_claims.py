"""The claims table on tables by hand: verdicts, intervals, misses, absent tables; and the README's section."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from fluxlib import claims, cli, figures, pages, records, studies
from fluxlib.claims import base, federated, measured
from fluxlib.claims.base import Claim, Tables
from fluxlib.claims.numbers import geometric, shown, shown_interval
from fluxlib.claims.races import describe
from fluxlib.claims.table import _row
from fluxlib.config import REPO_ROOT

README = REPO_ROOT / "README.md"
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


def read(slug: str, found: Tables) -> base.Reading:
    (reading,) = claim(slug).read(claim(slug), found)
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
    table = claims.speed_ups(claims.races(pd.concat(grid({0: 20.0, 1: 10.0, 2: 5.0}))))
    (row,) = table.to_dict("records")
    assert (row["seeds"], row["num_both"], row["ahead"], row["behind"]) == (3, 3, 3, 0)
    assert row["speedup"] == pytest.approx(4.0)
    half = 4.302652730 * np.log(2) / np.sqrt(3)  # t(0.975, 2 degrees of freedom) times the standard error of the logs
    assert (row["low"], row["high"]) == pytest.approx((4 * np.exp(-half), 4 * np.exp(half)))
    assert row["rounds_ratio"] == pytest.approx(1.0) and row["final_ratio"] == pytest.approx(1.0)


def test_the_target_is_that_of_the_seed_and_of_the_last_three_scores() -> None:
    low = tuple(score / 2 for score in SCORES["fmd"])
    found = claims.races(pd.concat([run("fmd", 0), run("flux", 0), run("fmd", 1, low), run("flux", 1, low)]))
    assert found.groupby("seed")["target"].first().tolist() == pytest.approx([0.95, 0.475])
    falling = claims.races(pd.concat([run("fmd", 0, (0.2, 0.9, 0.9, 0.6)), run("flux", 0)]))
    assert falling["target"].iloc[0] == pytest.approx(0.95 * 0.8)


def test_misses_are_counted_on_both_sides() -> None:
    never = (0.2, 0.3, 0.3, 0.3, 0.3)
    runs = [*grid({0: 10.0}), run("fmd", 1), run("flux", 1, never), run("fmq", 0), run("fmq", 1)]
    by_name = {row["baseline"]: row for row in claims.speed_ups(claims.races(pd.concat(runs))).to_dict("records")}
    fmd, fmq = by_name["fmd"], by_name["fmq"]
    assert (fmd["ours_missed"], fmd["ahead"], fmd["behind"]) == (1, 1, 1) and np.isnan(fmd["at_least"])
    assert "never (1 of 2), 4× otherwise" in describe(fmd)
    assert (fmq["baseline_missed"], fmq["ours_missed"], fmq["ahead"], fmq["behind"]) == (2, 1, 1, 0)


def test_a_baseline_that_never_arrives_gives_a_lower_bound() -> None:
    runs = [*grid({0: 10.0}), run("fmq", 0)]
    row = claims.speed_ups(claims.races(pd.concat(runs))).set_index("baseline").loc["fmq"]
    # 0.95 lies seven eighths between the first and the second round: 18.75 s; FMQ runs for 40 s.
    assert row["at_least"] == pytest.approx(40 / 18.75) and np.isnan(row["speedup"])
    assert read("ahead_of_fmq", tables(*runs)).verdict == "agrees"


def test_a_run_that_went_on_stands_for_the_plain_one_and_other_variants_do_not_race() -> None:
    late = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    longer, other = run("flux", 0, late, variant="long"), run("flux", 0, variant="short")
    raced = claims.timed(pd.concat([run("fmd", 0), run("flux", 0, late[:3]), longer, other, run("fmq", 0)]))
    assert raced.groupby("method")["round"].max().to_dict() == {"flux": 5, "fmd": 4, "fmq": 4}
    by_name = claims.speed_ups(claims.races(raced)).set_index("baseline")
    assert by_name.loc["fmd", "variant"] == "" and by_name.loc["fmd", "ahead"] == 1
    # FMQ's run of 40 seconds was over before FLUX reached the target: nobody can say who would have been sooner.
    assert by_name.loc["fmq", ["ahead", "behind", "baseline_missed"]].tolist() == [0, 0, 1]
    assert by_name.loc["fmq", "at_least"] < 1


def test_a_race_that_was_cut_short_is_left_open() -> None:
    late = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    runs = [run("fmd", 0), run("flux", 0, late[:3]), run("flux", 0, late, variant="long"), run("fmq", 0)]
    other = [run(method, 0, task="mini-mmlu") for method in SCORES]
    for found, verdict, reached in ((other, "agrees", True), ([*runs, *other], "agrees in direction", False)):
        reading = read("ahead_of_fmq", tables(*found))
        assert (reading.verdict, reading.reached) == (verdict, reached)
    assert "FMQ never (1 of 1), its run over before FLUX arrived in 1" in reading.ours
    assert "1 of 2 left open" in reading.reason


def test_what_goes_beyond_the_paper_is_no_evidence_for_its_claims() -> None:
    better = [run(m, 0, seconds=s, variant="improved") for m, s in (("fmd", 40.0), ("flux", 1.0))]
    plain = [*grid({0: 20.0}), run("fmq", 0)]
    assert (read("speed_up", tables(*plain, *better)).value, len(tables(*plain).timed_races)) == (2.0, 3)
    assert read("ahead_of_fmd", tables(*plain, *better)).ours == "`mini-dolly` 2×"
    alone = claims.speed_up_markdown(claims.speed_ups(claims.races(pd.concat([*plain, better[1]]))))
    assert "(improved) | `mini-dolly` | 1 | 40× (unchanged) |" in alone
    both = claims.speed_ups(claims.races(pd.concat([*plain, *better]))).set_index(["variant", "baseline"])["as_it_is"]
    assert both.to_dict() == {
        ("", "fmd"): False,
        ("", "fmq"): False,
        ("improved", "fmd"): False,
        ("improved", "fmq"): True,
    }


def test_scores_of_all_methods_stand_side_by_side() -> None:
    plain = pd.concat([*grid({0: 10.0, 1: 20.0}), run("fmq", 0), run("fmq", 1)])
    table = claims.scores(claims.races(plain), plain)
    by_name = table.set_index("method")
    assert by_name["final"].to_dict() == pytest.approx({"flux": 1.0, "fmd": 1.0, "fmq": 1 / 3})
    assert by_name["reached"].to_dict() == {"flux": 2, "fmd": 2, "fmq": 0}
    assert by_name["base"].to_dict() == pytest.approx({"flux": 0.2, "fmd": 0.2, "fmq": 0.2})
    (line,) = claims.scores_markdown(table).splitlines()[2:]
    assert "| 1.000 / 1.000 / 0.333 | 28 / 75 / never | 15 / 40 / 10 |" in line
    assert "No FLUX and FMD runs" in claims.scores_markdown(claims.scores(claims.races(None), plain))


def test_a_base_model_at_the_target_is_no_race() -> None:
    flat = (1.0, 1.0, 1.0)
    (row,) = claims.speed_ups(claims.races(pd.concat([run("fmd", 0, flat), run("flux", 0, flat)]))).to_dict("records")
    assert (row["trivial"], row["ahead"], row["behind"]) == (1, 0, 0)
    assert read("ahead_of_fmd", tables(run("fmd", 0, flat), run("flux", 0, flat))).verdict == "does not"


def test_a_variant_meets_its_own_baseline_and_else_the_plain_one_of_the_same_size() -> None:
    runs = [*grid({0: 10.0}), run("flux", 0, seconds=5.0, variant="small", num_participants=4)]
    runs += [run("flux", 0, seconds=8.0, variant="wire"), run("fmd", 0, seconds=16.0, variant="wire")]
    runs += [run("flux", 0, seconds=4.0, variant="joint")]
    found = claims.speed_ups(claims.races(pd.concat(runs))).set_index("variant")["speedup"].to_dict()
    assert found == pytest.approx({"": 4.0, "joint": 10.0, "wire": 2.0})


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [({0: 8.0, 1: 8.0}, "agrees"), ({0: 20.0, 1: 10.0}, "agrees in direction"), ({0: 20.0, 1: 80.0}, "does not")],
)
def test_up_to_needs_every_seed_of_one_task(seconds: dict[int, float], verdict: str) -> None:
    slow = [run(m, seed, seconds=40.0, task="mini-mmlu") for m in ("fmd", "flux") for seed in (0, 1)]
    assert read("speed_up", tables(*grid(seconds), *slow)).verdict == verdict


def test_up_to_tells_of_an_interval_that_reaches_below_the_papers() -> None:
    reading = read("speed_up", tables(*grid({0: 5.0, 1: 10.0})))
    assert (reading.verdict, reading.reason) == ("agrees", "the interval includes less than the paper's")
    assert read("speed_up", tables(*grid({0: 5.0, 1: 6.0}))).reason == ""


def test_every_task_means_every_task() -> None:
    other = [run("fmd", 0, task="mini-mmlu"), run("flux", 0, seconds=80.0, task="mini-mmlu")]
    whole, partly = (
        read("ahead_of_fmd", tables(*grid({0: 10.0}))),
        read("ahead_of_fmd", tables(*grid({0: 10.0}), *other)),
    )
    assert (whole.verdict, whole.reached, partly.verdict, partly.reached) == ("agrees", True, "does not", False)
    assert "sooner in 1 of 2 races" in partly.reason


@pytest.mark.parametrize(("last", "verdict"), [(1.0, "agrees"), (0.96, "agrees in direction"), (0.9, "does not")])
def test_final_quality_is_a_share_of_fmd(last: float, verdict: str) -> None:
    reading = read("quality_dolly", tables(run("fmd", 0), run("flux", 0, (0.2, last, last, last))))
    assert (reading.value, reading.verdict) == (pytest.approx(last), verdict)


def test_participants_are_compared_between_runs_that_differ_in_nothing_else() -> None:
    runs, parameters = [], {}
    for count in (10, 20, 30):
        for method in ("fmd", "flux"):
            one = run(method, 0, variant="" if count == 10 else f"p{count}", num_participants=count)
            parameters[one["run_id"].iloc[0]] = {"participants": count, "rounds": 4, "method": method}
            runs.append(one)
    twin = run("flux", 0, variant="twin", num_participants=10)
    parameters[twin["run_id"].iloc[0]] = parameters[runs[1]["run_id"].iloc[0]]
    assert read("participants", tables(*runs, twin, parameters=parameters)).verdict == "agrees"
    assert read("participants", tables(*runs[:4], parameters=parameters)).verdict == "agrees in direction"
    parameters[runs[2]["run_id"].iloc[0]]["rounds"] = 5
    assert federated.participants(claim("participants"), tables(*runs[:4], parameters=parameters)) == []


@pytest.mark.parametrize(
    ("slug", "values", "verdict"),
    [
        ("four_bit", (0.05, 0.15, 0.10), "agrees"),
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
    assert reading.low <= reading.value <= reading.high and bool(reading.reason) == (verdict != "agrees")


def test_an_interval_with_no_difference_in_it_is_told() -> None:
    parts = rows("error", "adaptive", 0.99, 0.5, 0.99), rows("error", "discarded", 1.0, 1.0, 1.0)
    reading = read("dropping", measurements("02_merging", *parts))
    assert reading.verdict == "agrees" and "the interval includes 0 %" in reading.reason


def test_epsilon_and_memory_have_rules_of_their_own() -> None:
    name = "epsilon_device_s_at_least"
    times = [rows(name, "dynamic", 10, 10), rows(name, "0.3", 20, 9), rows(name, "0.7", 12, 12)]
    times += [rows("epsilon_round_at_least", s, 1, 1) for s in ("dynamic", "0.3", "0.7")]
    assert read("epsilon", measurements("03_role_assignment", *times)).verdict == "agrees in direction"
    peaks = [rows("real_peak", method, gib * 2**30) for method, gib in (("flux", 30), ("fmd", 80))]
    assert read("memory", measurements("07_real_models", *peaks)).verdict == "agrees"


def test_without_tables_every_claim_says_what_to_run(tmp_path: Path) -> None:
    table = claims.claims(tmp_path / "nothing", None)
    assert set(table["verdict"]) == {"not attempted"} and len(table) == len(claims.CLAIMS)
    assert table["reason"].str.contains("run ").all()
    assert claims.readings(Tables()).empty and claims.speed_ups(claims.races(None)).empty
    assert "No race" in claims.speed_up_markdown(claims.speed_ups(claims.races(None)))
    assert set(claims.goals(tmp_path)["verdict"]) == {"not attempted"}


def test_the_weakest_model_decides_but_for_up_to() -> None:
    found = Tables(measurements={"01_profiling": {
        "a": studies.measurements(rows("profile_error", "frequency error", 0.01, x=4), "x"),
        "b": studies.measurements(rows("profile_error", "frequency error", 0.5, x=4), "x"),
    }})  # fmt: skip
    row = _row(claim("four_bit"), claim("four_bit").read(claim("four_bit"), found))
    assert row["verdict"] == "does not" and "`a`: agrees" in row["reason"] and row["to reach"] == "≤ 8 %: by `a`"
    deep = [r.assign(model="mini-deepseek-moe") for r in grid({0: 80.0})]
    both = tables(*grid({0: 8.0}), *deep)
    assert _row(claim("speed_up"), federated.up_to(claim("speed_up"), both))["verdict"] == "agrees"


def test_numbers_in_words() -> None:
    assert (shown(0.1101, "%"), shown(-0.02, "%"), shown(4.75, "x")) == ("11 %", "−2 %", "4.75×")
    assert shown_interval(0.5, 0.4, 0.6) == "0.5 (0.4 to 0.6)" and shown_interval(0.5, 0.5, 0.5) == "0.5"
    assert geometric([2.0, 8.0])[0] == pytest.approx(4.0) and geometric([2.0, 0.0]) == (0.0, 0.0, 2.0)
    assert measured.clock_check(studies.measurements(
        rows("clock_check", "train, measured", 3.0) + rows("clock_check", "train, predicted", 2.0), "x"
    )) == {"train": 1.5}  # fmt: skip


def test_pictures_of_something_and_of_nothing(tmp_path: Path) -> None:
    found = tables(*grid({0: 10.0, 1: 10.0}), run("fmq", 0), run("fmq", 1))
    table, readings = claims.claims(tmp_path), claims.readings(found)
    assert isinstance(figures.draw_claims(table, readings), Figure)
    assert isinstance(figures.draw_claims(table, claims.readings(Tables())), Figure)
    assert isinstance(figures.draw_speed_ups(claims.speed_ups(found.plain_races)), Figure)
    assert isinstance(figures.draw_speed_ups(claims.speed_ups(claims.races(None))), Figure)


def test_the_command_prints_writes_and_refuses(tmp_path: Path, monkeypatch, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in ("races", "claims")))
    monkeypatch.setattr("sys.argv", ["fluxlib", "claims", "--out", str(tmp_path), "--readme", str(page), "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and len(json.loads(capsys.readouterr().out)) == len(claims.CLAIMS)
    assert "not attempted" in pages.section(page, "claims") and "No race" in pages.section(page, "races")
    monkeypatch.setattr("sys.argv", ["fluxlib", "claims", "--profile", "nope"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "allowed are full, mini" in capsys.readouterr().err
    before = page.read_text()
    monkeypatch.setattr("sys.argv", ["fluxlib", "claims", "--out", str(tmp_path / "typo"), "--readme", str(page)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "no folder" in capsys.readouterr().err and page.read_text() == before


def test_the_readme_says_what_the_tracked_tables_say() -> None:
    folder = REPO_ROOT / "data" / "results" / "full"
    for name, text in claims.page_sections(folder).items():
        assert pages.section(README, name) == text.strip(), (
            f"the README's {name} are not those of data/results/full: fluxlib claims --profile full --readme README.md"
        )


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "rounds").mkdir()
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "rounds" / "a.parquet")
    with pytest.raises(records.TableError, match=r"a\.parquet"):
        claims.claims(tmp_path)
