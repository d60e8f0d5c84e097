"""``make deploy-demo``: the whole of docs/deployment.md on one machine, from certificates to a tuned model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fluxlib.config import ConfigError, make_config
from fluxlib.federation.checks import check
from fluxlib.federation.engines.deployment.processes import CONNECTION, LocalFederation
from fluxlib.federation.run import run
from fluxlib.records import describe_round

MARK = ".flux-demonstration"
"""File that says of a folder that a demonstration made it, and that the next one may take it away."""


def run_demo(folder: Path, participants: int, num_rounds: int, method: str) -> None:
    """Start a federation in ``folder``, train on it over TLS, say where everything is.

    Raises:
        ConfigError, RunFailed: as :func:`fluxlib.federation.run`; a folder with anything else in it.
    """
    config = make_config({
        "method": method, "task": "mini-mmlu", "federation.rounds": num_rounds, "clock.fleet": "mixed",
        "federation.participants": participants, "evaluation.samples": 64, "engine": "deployment",
        "federation.join_timeout_s": 300.0,
    })  # fmt: skip
    check(config)
    _clear(folder)
    print(f"starting a SuperLink and {participants} SuperNodes; logs are in {folder / 'logs'}", flush=True)
    with LocalFederation(folder, config) as federation:
        os.environ["FLWR_HOME"] = str(federation.home)
        print(f"SuperLink at https://{federation.address}", flush=True)
        out = folder / "results"
        result = run(config, lambda row: print(describe_round(row), flush=True), out=out, superlink=CONNECTION)
    print("in the last round:")
    for row in result.participants.query(f"round == {num_rounds}").to_dict(orient="records"):
        print(
            f"  participant {row['participant']} ({row['device']}): {row['num_samples']} samples, "
            f"sent {row['uplink_bytes']:,} bytes, got {row['downlink_bytes']:,} {row['rejected']}"
        )
    print(f"participants' folders: {folder}/node-*   tables and tuned experts: {out}")


def _clear(folder: Path) -> None:
    """Take an earlier demonstration away, and nothing else."""
    if folder.exists() and not (folder / MARK).is_file() and (others := sorted(folder.glob("*"))):
        raise ConfigError(f"--folder {folder} holds {others[0].name} and is of no demonstration: give a new folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
