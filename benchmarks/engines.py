"""The same run on every engine: the same metrics and bytes, and what each engine costs in time.

    python benchmarks/engines.py             four participants, three rounds
    python benchmarks/engines.py --quick     two participants, one round

``start_s`` is the time until the base model's score is there, which is mostly starting processes; ``round_s`` the
median time of a round, evaluation left out. ``same`` says whether metric, loss and bytes of every round are those of
the first engine, bit for bit. Simulation needs Ray, and is left out without it.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import pandas as pd
import torch
import transformers
from _measure import Row, machine, options_of, table, write

from fluxlib import federation
from fluxlib.config import RunConfig, make_config

ENGINES = ("local", "simulation", "deployment")
COMPARED = ["round", "metric", "loss", "train_loss", "uplink_bytes", "downlink_bytes", "num_rejected", "device_s"]
COLUMNS = ["engine", "metric", "loss", "uplink_bytes", "downlink_bytes", "same", "start_s", "round_s", "total_s"]


def measure(config: RunConfig) -> tuple[Row, pd.DataFrame]:
    """One run: its row of the table, and what is compared."""
    begin = time.perf_counter()
    first: list[float] = []

    def on_round(row: dict[str, Any]) -> None:
        first.append(time.perf_counter() - begin)

    rounds = federation.run(config, on_round=on_round).rounds
    last = rounds.iloc[-1]
    row: Row = {
        "engine": config.engine,
        "metric": float(last["metric"]),
        "loss": float(last["loss"]),
        "uplink_bytes": int(rounds["uplink_bytes"].sum()),
        "downlink_bytes": int(rounds["downlink_bytes"].sum()),
        "start_s": first[0],
        "round_s": float(rounds["round_wall_s"].iloc[1:].median()),
        "total_s": time.perf_counter() - begin,
    }
    return row, rounds[COMPARED]


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    participants, num_rounds = (2, 1) if given.quick else (4, 3)
    rows: list[Row] = []
    reference: pd.DataFrame | None = None
    for name in given.engines:
        if name == "simulation" and importlib.util.find_spec("ray") is None:
            print("simulation: Ray is not installed, left out")
            continue
        config = make_config({
            "engine": name, "data.task_size": 400, "federation.participants": participants,
            "federation.rounds": num_rounds, "training.local_steps": 2, "evaluation.samples": 32,
        })  # fmt: skip
        row, compared = measure(config)
        reference = compared if reference is None else reference
        rows.append(row | {"same": compared.equals(reference)})
        print(row, flush=True)
    facts = machine(torch.device("cpu"))
    text = "\n".join([
        f"flux, mini-llama-moe, mini-gsm8k, {participants} participants, {num_rounds} rounds, seed 0; {facts}", "",
        table(rows, COLUMNS),
    ])  # fmt: skip
    write(given.out, "engines", {"machine": facts, "rows": rows}, text)


if __name__ == "__main__":
    main()
