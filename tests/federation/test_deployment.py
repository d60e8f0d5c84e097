"""A SuperLink and SuperNodes as real processes: the same tables, faults that cost a reply, nodes that are refused.

One federation and one run of it serve all tests of this file, in their order: a round of three nodes takes half a
minute of processor time, since every message starts a process. The nodes that are killed are not needed later.
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
from flwr.app import Message

from fluxlib import federation
from fluxlib.config import RunConfig, make_config
from fluxlib.federation.engines.deployment import credentials, engine, processes
from fluxlib.federation.engines.deployment.processes import CONNECTION, LocalFederation
from fluxlib.federation.engines.grid import SERVER_NODE_ID, LocalGrid
from fluxlib.federation.protocol import messages
from fluxlib.federation.results import table_path

pytestmark = pytest.mark.deployment


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> RunConfig:
    return make_config({
        "method": "flux", "model": str(model_folder), "task": "mini-piqa", "data.task_size": 60, "engine": "deployment",
        "federation.rounds": 3, "federation.participants": 3, "federation.join_timeout_s": 120.0,
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


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """Without what a clock on the wall or the operating system says, and the engine's name.

    And without what downloads cost: whom round 2 had reached before the SuperLink died has got its experts already.
    """
    others = ("peak_memory_bytes", "engine", "downlink_bytes", "work")
    left = [name for name in frame.columns if name.endswith(("wall_s", "device_s")) or name in others]
    return frame.drop(columns=left)


def struck_in_process(monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> federation.RunResult:
    """The same run in this process, where participants 1 and 2 never answer in round 3."""
    deliver = LocalGrid._deliver

    def silent(grid: LocalGrid, message: Message) -> Message | None:
        about = message.metadata
        if (about.message_type, about.group_id) == (messages.TRAIN, "3") and about.dst_node_id > SERVER_NODE_ID + 1:
            return None
        return deliver(grid, message)

    monkeypatch.setattr(LocalGrid, "_deliver", silent)
    return federation.run(config.updated({"engine": "local", "federation.round_timeout_s": 10.0}))


def test_a_superlink_that_dies_costs_nothing_and_nodes_that_do_cost_their_replies(
    base: RunConfig, nodes: LocalFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``kill -9`` of the SuperLink after round 1, and of a node after round 2, where another one gets ``kill -STOP``.

    The server app dies with its SuperLink, and who follows the run is told, in bounded time. The same command goes on
    after the last complete round: participants kept their state on disk, the server its checkpoint. In the last round
    the third participant's reply is all that is left. Tables and model are those of the same run in process.
    """
    monkeypatch.setattr(engine, "STATUS_EVERY_S", 8.0)
    monkeypatch.setattr(engine, "SILENCE_S", 5.0)
    rows: list[dict[str, Any]] = []
    servers: list[psutil.Process] = []

    def strike(row: dict[str, Any]) -> None:
        rows.append(row)
        if row["round"] == 1:
            servers.append(server_app_of(nodes))
            assert (tmp_path / f".{base.run_id}.lock").read_text().startswith(f"process {servers[0].pid} on")
            nodes.processes["superlink"].kill()
            nodes.processes["superlink"].wait()
        if row["round"] == 2:
            os.killpg(nodes.processes["node-1"].pid, signal.SIGKILL)
            os.killpg(nodes.processes["node-2"].pid, signal.SIGSTOP)

    with pytest.raises(federation.RunFailed, match="nobody answers at .*; the same command goes on after the last com"):
        federation.run(base, on_round=strike, out=tmp_path, superlink=CONNECTION)
    wait_for(lambda: not servers[0].is_running())
    nodes.start_superlink()
    # What a participant may take depends on this machine at this moment.
    patience = {"federation.round_timeout_s": 10 + 2 * rows[-1]["round_wall_s"]}
    result = federation.run(base.updated(patience), on_round=strike, out=tmp_path, superlink=CONNECTION)
    os.killpg(nodes.processes["node-2"].pid, signal.SIGCONT)
    assert [row["round"] for row in rows] == [0, 1, 2, 3], "nothing was done twice"
    assert result.rounds["num_rejected"].tolist() == [0, 0, 0, 2]
    assert set(result.rounds["engine"]) == {"deployment"}
    people = result.participants.pivot(index="round", columns="participant", values="rejected")
    assert people.to_numpy().tolist() == [["", "", ""], ["", "", ""], ["", "missing", "missing"]]
    alone = struck_in_process(monkeypatch, base)
    for table in ("rounds", "participants"):
        one, other = (comparable(getattr(found, table)) for found in (result, alone))
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    for a, b in zip(result.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b) and torch.isfinite(a).all()
    about = json.loads(table_path(tmp_path, "rounds", result.run_id).with_suffix(".json").read_text())
    assert (about["status"], about["labels_by_participant"]) == ("complete", [])
    assert not {"checkpoints", "progress"} & {path.name for path in tmp_path.iterdir()}


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
