"""Five methods as real SuperNodes over links of a given rate: seconds by the wall clock, and what the clock said.

    python benchmarks/race.py              three rates, 37 minutes; an interrupted one goes on
    python benchmarks/race.py --rates 2    the first two

Each participant's SuperNode reaches the SuperLink through a relay that lets bytes through at the link's rate. The rate
is chosen so that sending takes as many times as long as training as it does for FMD with the shapes of LLaMA-MoE-3.5B
on an NVIDIA L20 at 1 Gb/s; then twice and half of it. Two participants: this machine may have no more cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import _race_clock as race_clock
import numpy as np
import pandas as pd
import torch
from _measure import Row, machine, table
from _relay import ShapedFederation

from fluxlib import federation, models, records
from fluxlib.analysis.studies import measurements, scale
from fluxlib.config import REPO_ROOT, RunConfig, make_config
from fluxlib.devices import catalogue, clock
from fluxlib.federation.engines.deployment.processes import CONNECTION

MODEL, TASK, REAL, TOKENS = "mini-llama-moe", "mini-mmlu", "llama-moe-3.5b", 128
COMMON = {
    "engine": "deployment", "model": MODEL, "task": TASK, "federation.participants": 2,
    "training.batch_size": 16, "training.local_steps": 4, "training.learning_rate": 3e-3, "evaluation.samples": 250,
    "wire.uplink": "bfloat16", "wire.downlink": "bfloat16",
}  # fmt: skip
SMALL = {"budget.tune_frac": 0.0625, "budget.merge_frac": 0.0625}
# FMQ's codes do not travel as codes: eight bits a weight are the closest that the wire has.
METHODS: dict[str, dict[str, Any]] = {
    "fmd": {}, "flux": SMALL, "flux_plus": SMALL, "fmes": SMALL,
    "fmq": {"training.learning_rate": 1e-2, "wire.uplink": "int8", "wire.downlink": "int8"},
}  # fmt: skip
RATES = {"as 1 Gb/s": 1.0, "as 2 Gb/s": 2.0, "as 500 Mb/s": 0.5}
UNSHAPED, CALIBRATION_ROUNDS, MAX_ROUNDS = "none", 3, 60

CHUNK = 1 << 19
"""Bytes that Flower sends in one request; two requests are under way. It waits 30 seconds for each, and then sends it
again: two of its 5 MB would never be through a link this slow."""


Found = tuple[str, race_clock.Place, pd.DataFrame, pd.DataFrame]
"""A method, what the clock is told, and the tables of rounds and of participants."""


def over_relays(
    config: RunConfig, on_round: Callable[[Any], bool], nodes: Callable[[], ShapedFederation]
) -> federation.RunResult:
    """A run on ``nodes``, which have its link for real; they are started with the first run that needs them."""
    os.environ["FLWR_HOME"] = str(nodes().home)
    return federation.run(config, on_round, superlink=CONNECTION)


def measured(
    config: RunConfig, limit_s: float, out: Path, run: Callable[..., federation.RunResult]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of a run that ends with the first round after ``limit_s``; those of ``out`` where it is over.

    The server has begun its next round when it is asked to stop. So it is asked when that one will be the last, if it
    takes half as long as this one: a first round takes longest.
    """
    paths = [out / f"{config.run_id}-{name}.parquet" for name in ("rounds", "participants")]
    if not all(path.exists() for path in paths):
        found = run(config, on_round=lambda new: bool(new["wall_s"] + new["round_wall_s"] / 2 >= limit_s))
        for path, frame in zip(paths, (found.rounds, found.participants), strict=True):
            frame.to_parquet(path)
    rounds, participants = (pd.read_parquet(path) for path in paths)
    return rounds, participants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, default=len(RATES), help="how many of the rates, from the first")
    parser.add_argument("--seconds", type=float, default=50.0, help="a run ends with the first round after these")
    parser.add_argument("--out", type=Path, default=REPO_ROOT / "data" / "results" / "full" / "measurements")
    parser.add_argument("--runs", type=Path, default=REPO_ROOT / "build" / "race", help="where single runs are kept")
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    os.environ["FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"] = str(CHUNK)
    rates = dict(list(RATES.items())[: given.rates])
    start = pd.Timestamp.now("UTC").to_pydatetime()
    device, shapes = scale.this_machine(), clock.shapes_of(models.load(MODEL)[0])

    def place(config: RunConfig, link: str) -> race_clock.Place:
        return race_clock.Place(shapes, device, catalogue.link(link), config.wire.uplink)

    def runs(link: str, variant: str, seconds: float, rounds: int) -> Iterator[Found]:
        """The tables of each method over that link; nodes are started once."""
        shaped = {"variant": variant, "clock.link": link, "federation.rounds": rounds}
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flux-race-")))
            nodes = partial(stack.enter_context, ShapedFederation(folder, make_config({**COMMON, **shaped})))
            run = partial(over_relays, nodes=cache(nodes))
            for name in METHODS:
                config = make_config({**COMMON, **METHODS[name], "method": name, **shaped})
                yield name, place(config, link), *measured(config, seconds, given.runs, run)

    speeds: dict[str, race_clock.Speed] = {}
    per_s = 0.0
    for name, there, rounds, participants in runs(UNSHAPED, "unshaped", math.inf, CALIBRATION_ROUNDS):
        speeds[name] = race_clock.calibrated(rounds, participants, there)
        print(f"{name} here: {speeds[name]}", flush=True)
        if name == "fmd":
            real = race_clock.Place(clock.shapes(REAL), catalogue.DEVICES["l20"], catalogue.link("1gbps"), "bfloat16")
            per_s = race_clock.rate(participants, real, TOKENS)
            print(f"sending to training as there: {8 * per_s / 1e6:.2f} Mb/s", flush=True)
    # A node asks every three seconds: how a run falls into step with that is chance, and lasts for all its rounds.
    alike = [name for name, own in METHODS.items() if own is SMALL]
    besides_s = float(np.mean([speeds[name].besides_s for name in alike]))
    speeds |= {name: replace(speeds[name], besides_s=besides_s) for name in alike}
    rows: list[Row] = []
    for label, times in rates.items():
        link, variant = f"{8 * per_s * times / 1e3:.0f}kbps", label.lower().replace(" ", "-").replace("/", "")
        for name, there, rounds, participants in runs(link, variant, given.seconds, MAX_ROUNDS):
            said = race_clock.predicted(participants, there, speeds[name])
            rows += race_clock.rows(rounds, said, f"{name}, {label}")
            print(f"{name} {label}: {len(rounds) - 1} rounds, score {rounds['metric'].iloc[-1]:.3f}", flush=True)
    frame = measurements(rows, f"race-{MODEL}")
    parameters = {"link_mbps": 8 * per_s / 1e6, "seconds": given.seconds, "machine": machine(torch.device("cpu")),
                  "besides_s": {name: speed.besides_s for name, speed in speeds.items()},
                  "factors": {name: dict(speed.factors) for name, speed in speeds.items()}}  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    records.write("measurements", frame, given.out / f"race-{MODEL}.parquet", records.about_run(parameters, start))
    print(json.dumps(parameters, indent=1))
    found = scale.race_summary(frame)
    print(table(found.to_dict("records"), list(found)))


if __name__ == "__main__":
    main()
