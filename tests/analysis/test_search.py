"""The search for settings: what is compared at which moment, on hand-made trials."""

from __future__ import annotations

import pandas as pd
import pytest

from fluxlib import records
from fluxlib.analysis import search, store
from fluxlib.app import pipeline
from fluxlib.config import REPO_ROOT, RunConfig, make_config


def run(method: str, variant: str, scores: list[float], round_s: float, seed: int = 0) -> pd.DataFrame:
    return pd.DataFrame({
        "run_id": f"{method}-{variant}-{seed}", "model": "m", "task": "t", "method": method, "variant": variant,
        "round": range(len(scores)), "metric": scores, "device_s": [round_s * i for i in range(len(scores))],
    })  # fmt: skip


SETTINGS = {"": (3e-3, 4), "fast": (1e-2, 4), "more": (3e-3, 8)}
ROUNDS = pd.concat(
    [
        run("flux", "", [0.1, 0.2, 0.3], 1.0),
        run("flux", "fast", [0.1, 0.3, 0.25], 1.0),
        run("flux", "more", [0.1, 0.28, 0.9], 2.0),
        run("fmd", "", [0.1, 0.5, 0.5], 5.0),
        run("fmd", "fast", [0.1, 0.5, 0.6], 5.0),
        run("fmd", "more", [0.1, 0.4, 0.7], 5.0),
    ]
)


def runs(rounds: pd.DataFrame) -> dict[str, RunConfig]:
    """Configurations by run id."""
    found = {}
    for name in rounds["run_id"].unique():
        rate, steps = SETTINGS[name.split("-")[1]]
        changes = {"training.learning_rate": rate, "training.local_steps": steps}
        found[name] = make_config(changes)
    return found


def test_trials_are_compared_when_the_quickest_of_the_method_has_ended() -> None:
    found = search.trials(ROUNDS, runs(ROUNDS)).set_index(["method", "variant"])
    assert found.loc["flux", "at_s"].tolist() == [2.0] * 3
    assert found.loc[("flux", "more"), ["final", "score"]].tolist() == [0.9, 0.28]
    assert found[found["is_best"]].index.tolist() == [("flux", ""), ("fmd", "more")]


def test_seeds_are_averaged_and_equals_go_to_the_lower_rate() -> None:
    rounds = pd.concat([
        run("flux", "", [0.2, 0.4], 1.0), run("flux", "", [0.2, 0.6], 1.0, seed=1),
        run("flux", "fast", [0.2, 0.5], 1.0), run("flux", "fast", [0.2, 0.5], 1.0, seed=1),
    ])  # fmt: skip
    found = search.trials(rounds, runs(rounds))
    assert found["score"].tolist() == [0.5, 0.5] and found["num_seeds"].tolist() == [2, 2]
    assert found["is_best"].tolist() == [True, False]


def test_one_setting_per_method_is_chosen_for_all_models() -> None:
    both = pd.concat([ROUNDS, ROUNDS.assign(model="n", metric=ROUNDS["metric"] * (ROUNDS["variant"] == "fast"))])
    both["run_id"] = both["run_id"] + "-" + both["model"]
    found = search.trials(both, runs(both))
    chosen = found[found["is_chosen"]].set_index(["model", "method"])["variant"]
    assert chosen.to_dict() == {(model, method): "fast" for model in "mn" for method in ("flux", "fmd")}


@pytest.mark.parametrize("profile", ["mini", "full"])
def test_a_profile_has_what_the_trials_say(profile: str) -> None:
    folder = REPO_ROOT / "data" / "results" / "tune"
    rounds = records.read_all("rounds", folder)
    found = search.trials(rounds, store.configs(folder, rounds["run_id"].unique()))
    chosen = found[found["is_chosen"]].set_index(["method", "rank"])[["learning_rate", "local_steps"]]
    for run in pipeline.load(REPO_ROOT / "config" / f"{profile}.yaml").runs.values():
        settings = (run.training.learning_rate, run.training.local_steps)
        assert settings == tuple(chosen.loc[(run.method, run.adapter.used_rank)])


def test_the_highest_mean_is_chosen_and_among_equals_the_lowest_rate() -> None:
    for last, expected in ((0.5, "fast"), (0.46, "")):
        rounds = pd.concat([run("flux", "", [0.2, 0.46], 1.0), run("flux", "fast", [0.2, last], 1.0)])
        found = search.trials(rounds, runs(rounds))
        assert found.loc[found["is_chosen"], "variant"].tolist() == [expected]


def test_an_unequal_search_is_refused() -> None:
    less = ROUNDS[ROUNDS["run_id"] != "fmd-more-0"]
    with pytest.raises(ValueError, match="equally many trials on each model and task; there are: flux 3, fmd 2"):
        search.trials(less, runs(less))


def test_adapters_have_a_search_of_their_own() -> None:
    tried = {"fmd-2": [0.1, 0.3, 0.3], "fmd-3": [0.1, 0.2, 0.4], "flux-2": [0.1, 0.3, 0.3], "flux-3": [0.1, 0.2, 0.2]}
    adapted = [run(*name.split("-"), scores, 5.0) for name, scores in tried.items()]
    adapter = {"adapter.kind": "lora", "adapter.rank": 4}
    rates = {name: {"training.learning_rate": 10.0 ** -int(name[-1])} for name in tried}
    known = runs(ROUNDS) | {f"{name}-0": make_config(adapter | rate) for name, rate in rates.items()}
    found = search.trials(pd.concat([ROUNDS, *adapted]), known)
    chosen = found[found["is_chosen"]].set_index(["method", "rank"])["variant"].to_dict()
    assert chosen == {("flux", 0): "", ("flux", 4): "2", ("fmd", 0): "more", ("fmd", 4): "3"}
    with pytest.raises(ValueError, match=r"flux 3, flux \(rank 4\) 2, fmd 3, fmd \(rank 4\) 1"):
        search.trials(pd.concat([ROUNDS, *adapted[1:]]), known)


def test_every_method_has_the_same_trials() -> None:
    runs = pipeline.load(REPO_ROOT / "config" / "tune.yaml").runs.values()
    rates: dict[tuple[str, int], list[float]] = {}
    for one in runs:
        assert one.training.local_steps == 8
        rates.setdefault((one.method, one.adapter.used_rank), []).append(one.training.learning_rate)
    assert set(rates) == {(name, rank) for name in ("flux", "flux_plus", "fmd", "fmq", "fmes") for rank in (0, 8)}
    assert {tuple(sorted(found)) for (_, rank), found in rates.items() if not rank} == {(1e-3, 3e-3, 1e-2)}
    assert {tuple(sorted(found)) for (_, rank), found in rates.items() if rank} == {(3e-3, 1e-2, 3e-2, 1e-1)}
    other = pipeline.load(REPO_ROOT / "config" / "full.yaml").runs.values()
    assert not {one.seed for one in runs} & {one.seed for one in other}
