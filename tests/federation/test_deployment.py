"""A SuperLink and SuperNodes as real processes: the same tables, faults that cost a reply, nodes that are refused.

One federation serves all tests of this file, in their order; the nodes that one of them kills are not needed later.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

from fluxlib import federation
from fluxlib.config import RunConfig, make_config
from fluxlib.federation.engines.deployment import credentials, engine, processes
from fluxlib.federation.engines.deployment.processes import CONNECTION, LocalFederation

pytestmark = pytest.mark.deployment

PACE: dict[str, float] = {"round_s": 10.0}
"""Seconds of a round on this machine at this moment: what a participant may take depends on it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> RunConfig:
    return make_config({
        "method": "flux", "model": str(model_folder), "task": "mini-piqa", "data.task_size": 60, "engine": "deployment",
        "federation.rounds": 2, "federation.participants": 3, "federation.join_timeout_s": 120.0,
        "federation.min_replies_frac": 0.3, "training.local_steps": 1, "training.batch_size": 2,
        "training.max_tokens": 200, "evaluation.samples": 4, "budget.tune_frac": 0.5, "budget.merge_frac": 0.25,
        "profiling.batches": 1, "clock.fleet": "mixed",
    })  # fmt: skip


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, base: RunConfig) -> Iterator[LocalFederation]:
    before = os.environ.get("FLWR_HOME")
    with LocalFederation(tmp_path_factory.mktemp("federation"), base) as running:
        os.environ["FLWR_HOME"] = str(running.home)
        yield running
    if before is None:
        del os.environ["FLWR_HOME"]
    else:
        os.environ["FLWR_HOME"] = before


def local(config: RunConfig) -> federation.RunResult:
    return federation.run(config.updated({"engine": "local"}))


def until_round_1(frame: pd.DataFrame) -> pd.DataFrame:
    """Its first rows, without what a clock on the wall or the operating system says, and the engine's name.

    And without what a download costs: the nodes hold the model of the run before and get every expert anew.
    """
    others = ("peak_memory_bytes", "engine", "downlink_bytes", "work")
    left = [name for name in frame.columns if name.endswith(("wall_s", "device_s")) or name in others]
    return frame[frame["round"] < 2].drop(columns=left)


def test_a_run_whose_superlink_dies_goes_on_after_its_last_complete_round(
    base: RunConfig, nodes: LocalFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost: participants kept their state on disk, the server its checkpoint. The result is the same.

    The server app dies with its SuperLink. Who follows the run is told, in bounded time.
    """
    config = base  # the seed decides who holds what, which lies in folders
    monkeypatch.setattr(engine, "STATUS_EVERY_S", 2.0)
    monkeypatch.setattr(engine, "SILENCE_S", 5.0)
    servers: list[psutil.Process] = []

    def strike(row: dict[str, Any]) -> None:
        if row["round"] == 1:
            servers.append(server_app_of(nodes))
            assert (tmp_path / f".{config.run_id}.lock").read_text().startswith(f"process {servers[0].pid} on")
            nodes.processes["superlink"].kill()
            nodes.processes["superlink"].wait()

    with pytest.raises(federation.RunFailed, match="nobody answers at .*; the same command goes on after the last com"):
        federation.run(config, on_round=strike, out=tmp_path, superlink=CONNECTION)
    wait_for(lambda: not servers[0].is_running())
    nodes.start_superlink()
    rows: list[dict[str, Any]] = []
    result = federation.run(config, on_round=rows.append, out=tmp_path, superlink=CONNECTION)
    assert [row["round"] for row in rows] == [2]
    assert result.rounds["round"].tolist() == [0, 1, 2]
    assert (result.participants["rejected"] == "").all()
    alone = local(config)
    assert result.rounds[["metric", "loss", "uplink_bytes"]].equals(alone.rounds[["metric", "loss", "uplink_bytes"]])
    for a, b in zip(result.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)
    about = json.loads(result.files["rounds"].with_suffix(".json").read_text())
    assert (about["status"], about["labels_by_participant"]) == ("complete", [])
    assert not {"checkpoints", "progress"} & {path.name for path in tmp_path.iterdir()}
    PACE["round_s"] = float(result.rounds["round_wall_s"].max())


def test_no_sample_is_anywhere_but_in_its_own_folder(base: RunConfig, nodes: LocalFederation) -> None:
    """After a whole run: the SuperLink's database, every log, every result."""
    texts = set()
    for folder in nodes.node_folders:
        for line in (folder / "train.jsonl").read_text().splitlines():
            texts.add(json.loads(line)["prompt"].encode())
    assert len(texts) > 20
    searched = [path for path in nodes.folder.rglob("*") if path.is_file() and path.name != "train.jsonl"]
    assert {"superlink.db", "superlink.log"} <= {path.name for path in searched}
    for path in searched:
        data = path.read_bytes()
        assert not any(text in data for text in texts), path


def server_app_of(nodes: LocalFederation) -> psutil.Process:
    superlink = psutil.Process(nodes.processes["superlink"].pid)
    (found,) = [p for p in superlink.children(recursive=True) if any("flwr-serverapp" in part for part in p.cmdline())]
    return found


def wait_for(condition: Callable[[], bool], limit_s: float = 300.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_killed_node_and_one_that_hangs_cost_their_replies(
    base: RunConfig, nodes: LocalFederation, tmp_path: Path
) -> None:
    """``kill -9`` and ``kill -STOP`` in the middle of the run; the third participant's reply is all that is left.

    Until then all tables are those of the same run in process.
    """
    config = base.updated({"federation.round_timeout_s": 10 + 2 * PACE["round_s"], "variant": "struck"})
    seen: list[int] = []

    def strike(row: dict[str, Any]) -> None:
        seen.append(row["round"])
        if row["round"] == 1:
            os.killpg(nodes.processes["node-1"].pid, signal.SIGKILL)
            os.killpg(nodes.processes["node-2"].pid, signal.SIGSTOP)

    result = federation.run(config, on_round=strike, out=tmp_path, superlink=CONNECTION)
    os.killpg(nodes.processes["node-2"].pid, signal.SIGCONT)
    assert seen == [0, 1, 2] and set(result.rounds["engine"]) == {"deployment"}
    for table in ("rounds", "participants"):
        one, other = (until_round_1(getattr(found, table)) for found in (result, local(config)))
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    people = result.participants.pivot(index="round", columns="participant", values="rejected")
    assert people.loc[1].tolist() == ["", "", ""]
    assert people.loc[2].tolist() == ["", "missing", "missing"]
    assert result.rounds["num_rejected"].tolist() == [0, 0, 2]
    assert all(torch.isfinite(parameter).all() for parameter in result.model.parameters())


def test_strangers_are_refused(nodes: LocalFederation, tmp_path: Path) -> None:
    """They never get a node number, which the SuperLink gives to those it lets in; and the run's nodes stay."""
    commands = {name: node_command(nodes) for name in ("unknown key", "no key", "no TLS", "another SuperLink")}
    credentials.make_node_key(tmp_path)
    replace(commands["unknown key"], "--auth-supernode-private-key", str(tmp_path / credentials.NODE_KEY))
    replace(commands["no key"], "--auth-supernode-private-key")
    replace(commands["no TLS"], "--auth-supernode-private-key")
    replace(commands["no TLS"], "--root-certificates")
    commands["no TLS"].append("--insecure")
    credentials.make_certificates(tmp_path / "other", [processes.HOST])
    replace(commands["another SuperLink"], "--root-certificates", str(tmp_path / "other" / credentials.CA_CERTIFICATE))
    started = {}
    for name, command in commands.items():
        env = processes.environment(FLWR_HOME=str(tmp_path / name))
        started[name] = processes.start(command, tmp_path / f"{name}.log", env)
    deadline = time.monotonic() + 60
    for process in started.values():
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        processes.stop(process)
    for name, process in started.items():
        text = (tmp_path / f"{name}.log").read_text()
        assert "Starting Flower SuperNode" in text, name
        assert "SuperNode ID" not in text, name
        assert process.returncode != 0, name
    with pytest.raises((urllib.error.URLError, OSError)):
        urllib.request.urlopen(f"http://{nodes.address}/health", timeout=10)


def node_command(nodes: LocalFederation) -> list[str]:
    (port,) = processes.free_ports(1)
    return [*processes.supernode_command(nodes.node_folders[0], nodes.address, port), "--max-retries", "0"]


def replace(command: list[str], option: str, value: str | None = None) -> None:
    """Give ``option`` another value, or leave it out."""
    place = command.index(option)
    command[place : place + 2] = [] if value is None else [option, value]
