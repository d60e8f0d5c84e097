"""What each way of sending experts, and each protection, costs: bytes, device time and score of the same run.

    python benchmarks/wire.py                                       FLUX and FMD, all wire options, 12 rounds
    python benchmarks/wire.py --methods flux --options exact protection   robust rules, random roles
    python benchmarks/wire.py --methods flux --options exact stale --rounds 30

One JSON line per run: bytes per participant and round, device seconds per round at the shapes of ``--clock-model``
(medians over the rounds after the first), score and loss after the last round. Everything but the option is equal.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from fluxlib import federation
from fluxlib.config import make_config

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "bf16": {"wire.uplink": "bfloat16", "wire.downlink": "bfloat16"},
    "int8 up": {"wire.uplink": "int8"},
    "int8 both": {"wire.uplink": "int8", "wire.downlink": "int8"},
    "stale": {"wire.max_staleness": 2},
    "stale, int8 both": {"wire.max_staleness": 2, "wire.uplink": "int8", "wire.downlink": "int8"},
}
PROTECTION: dict[str, dict[str, Any]] = {
    "trimmed mean": {"aggregation.rule": "trimmed_mean"},
    "median": {"aggregation.rule": "median"},
    "random roles": {"roles.assignment": "random"},
}
ALL = OPTIONS | PROTECTION


def measure(method: str, option: str, given: argparse.Namespace) -> dict[str, object]:
    """One run with one option."""
    config = make_config({
        "method": method, "model": given.model, "task": given.task, "seed": given.seed,
        "federation.rounds": given.rounds, "federation.participants": 8,
        "evaluation.samples": 200, "evaluation.every": given.rounds,
        "clock.model": given.clock_model, "clock.tokens_per_sample": 128, **ALL[option],
    })  # fmt: skip
    result = federation.run(config)
    later, last = result.rounds[result.rounds["round"] > 1], result.rounds.iloc[-1]
    people = result.participants[result.participants["round"] > 1]
    return {
        "method": method, "option": option, "model": given.model, "task": given.task, "rounds": given.rounds,
        "seed": given.seed, "clock_model": given.clock_model, "link": config.clock.link,
        "uplink_mb": round(later["uplink_bytes"].median() / 8 / 1e6, 3),
        "downlink_mb": round(later["downlink_bytes"].median() / 8 / 1e6, 3),
        "round_device_s": round(later["round_device_s"].median(), 2),
        "download_device_s": round(people["download_device_s"].median(), 2),
        "upload_device_s": round(people["upload_device_s"].median(), 2),
        "round_wall_s": round(later["round_wall_s"].median(), 2),
        "score": round(last["metric"], 4), "loss": round(last["loss"], 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["flux", "fmd"])
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=[*ALL, "protection"])
    parser.add_argument("--model", default="mini-llama-moe")
    parser.add_argument("--task", default="mini-mmlu")
    parser.add_argument("--clock-model", default="llama-moe-3.5b")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    wanted = [name for option in given.options for name in (PROTECTION if option == "protection" else [option])]
    for method in given.methods:
        for option in wanted:
            print(json.dumps(measure(method, option, given)), flush=True)


if __name__ == "__main__":
    main()
