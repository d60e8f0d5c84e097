"""One code path, three engines: what belongs to an engine and not to a run. Deployment has a file of its own."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import logging
import os
import socket
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Array, ConfigRecord, Context, Message, RecordDict

import fluxlib
from fluxlib import federation
from fluxlib.app.cli import deploy
from fluxlib.config import REPO_ROOT, RunConfig
from fluxlib.federation import LocalGrid, Output
from fluxlib.federation.client import client_app, local_copy, local_data
from fluxlib.federation.engines import grid as engine_grid
from fluxlib.federation.engines.deployment import credentials, folders, processes
from fluxlib.federation.engines.deployment import engine as deployment
from fluxlib.federation.protocol import messages
from fluxlib.federation.server import server_app
from fluxlib.federation.server.server_app import from_run_config
from fluxlib.federation.store import lock
from fluxlib.federation.store.progress import Progress
from fluxlib.io import ConfigError
from fluxlib.tasks.base import Example

Make = Callable[..., RunConfig]


@pytest.fixture
def ray() -> Iterator[None]:
    """Ray, started. It gives up after 30 s, which a machine at work may need: it is started again then."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own files and processes
        for tries_left in (2, 1, 0):
            try:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
                break
            except Exception:
                ray.shutdown()
                if not tries_left:
                    raise
        yield
        ray.shutdown()
        gc.collect()


@pytest.mark.usefixtures("ray")
def test_simulation_gives_the_same_tables(make_config: Make) -> None:
    small = {"method": "flux", "federation.rounds": 2, "training.local_steps": 1}
    one = federation.run(make_config({"engine": "local"} | small))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray's own files and processes
        other = federation.run(make_config({"engine": "simulation"} | small))
        gc.collect()
    for table in ("rounds", "participants"):
        frames = [getattr(result, table) for result in (one, other)]
        left = [n for n in frames[0].columns if n.endswith("wall_s") or n in ("peak_memory_bytes", "engine")]
        pd.testing.assert_frame_equal(*(frame.drop(columns=left) for frame in frames), check_exact=True)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_simulation_without_ray_says_what_to_do(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs Ray: pip install .*'fluxlib\\[simulation\\]'"):
        federation.run(make_config({"engine": "simulation"}))


def test_a_superlink_is_for_deployment_alone(make_config: Make) -> None:
    with pytest.raises(ConfigError, match="superlink is 'prod', which engine 'local' does not use"):
        federation.run(make_config(), superlink="prod")


def test_flowers_bundle_names_the_apps_and_runs_what_is_installed() -> None:
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())
    assert project["project"]["version"] == fluxlib.__version__
    app = project["tool"]["flwr"]["app"]
    assert app["fab-include"] == ["pyproject.toml"]
    assert app["components"] == {
        "serverapp": "fluxlib.federation.server.server_app:app",
        "clientapp": "fluxlib.federation.client.client_app:app",
    }  # fmt: skip
    config, out = from_run_config(app["config"])
    assert (config.engine, config.federation.participants, out) == ("simulation", 2, REPO_ROOT / "build/runs")


def test_settings_of_flowers_run_configuration_win() -> None:
    config, _ = from_run_config({"federation.rounds": 3, "settings": "{federation.rounds: 5, data.alpha: 0.1}"})
    assert (config.federation.rounds, config.data.alpha) == (5, 0.1)
    with pytest.raises(ConfigError, match="settings is 'alpha', allowed is a mapping"):
        from_run_config({"settings": "alpha"})


class SlowGrid:
    """Answers in any order, some never, and says so itself for a node that is gone, as a SuperLink does."""

    def __init__(self, ready_after: dict[int, float], gone: int) -> None:
        self.ready_after, self.gone, self.polls = ready_after, gone, 0

    def push_messages(self, sent: list[SimpleNamespace]) -> list[str]:
        return [str(message.number) for message in sent]

    def pull_messages(self, identifiers: list[str]) -> list[SimpleNamespace]:
        self.polls += 1
        return [self._reply(int(i)) for i in identifiers if self.polls > self.ready_after[int(i)]]

    def _reply(self, number: int) -> SimpleNamespace:
        source = 1 if number == self.gone else 10 + number
        metadata = SimpleNamespace(src_node_id=source, reply_to_message_id=str(number))
        return SimpleNamespace(
            number=number,
            metadata=metadata,
            has_content=lambda: False,
            error=SimpleNamespace(reason="node unavailable"),
        )


def to_send(number: int) -> SimpleNamespace:
    return SimpleNamespace(number=number, content=RecordDict(), metadata=SimpleNamespace(dst_node_id=10 + number))


def test_replies_come_in_order_and_late_ones_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_grid, "POLL_S", 0.01)
    grid: Any = SlowGrid({0: 4, 1: 0, 2: 1e9, 3: 0, 4: 0}, gone=1)
    sent: Any = [
        SimpleNamespace(number=n, content=RecordDict(), metadata=SimpleNamespace(dst_node_id=10 + n)) for n in range(5)
    ]
    replies: Any = list(engine_grid.send_and_receive(grid, sent, 0.5))
    assert [reply.number for reply in replies] == [0, 3, 4]


def test_a_superlink_that_fails_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_grid, "POLL_S", 0.0)
    grid: Any = SlowGrid({0: 0}, gone=1)
    sent: Any = [to_send(0)]
    answer, failures = grid.pull_messages, [500, 503]

    def pull(identifiers: list[str]) -> list[SimpleNamespace]:
        if failures:
            asked = httpx.Request("POST", "https://superlink")
            raise httpx.HTTPStatusError("database is locked", request=asked, response=httpx.Response(failures.pop()))
        return answer(identifiers)

    monkeypatch.setattr(grid, "pull_messages", pull)
    assert [reply.number for reply in engine_grid.send_and_receive(grid, sent, 0.5)] == [0]
    failures.append(403)
    with pytest.raises(httpx.HTTPStatusError):
        list(engine_grid.send_and_receive(grid, sent, 0.5))


def request(config: RunConfig, store: Any, node: int = 2) -> Message:
    content = messages.Instruction(config, 1, 0, store.delta()).to_records()
    return federation.LocalGrid(client_app.app, 1).create_message(content, "query.profile", node, "1")


def test_what_hangs_or_fails_leaves_the_state_of_its_node(
    make_config: Make, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    def hang(instruction: messages.Instruction, context: Context) -> RecordDict:
        context.state["half"] = ConfigRecord({"done": 1})
        time.sleep(1.0)
        return RecordDict()

    monkeypatch.setitem(client_app.WORK, messages.PROFILE, hang)
    context = Context(1, 2, {"partition-id": 0}, RecordDict(), {})
    with pytest.raises(TimeoutError, match="longer than the 0.05 s"):
        client_app.app(request(make_config({"federation.round_timeout_s": 0.05}), store), context)
    assert "half" not in context.state
    client_app.app(request(make_config(), store), context)
    assert "half" in context.state


@pytest.mark.parametrize("method", ["fake-profiling", "flux"])
def test_a_round_that_is_asked_for_again_gives_the_same_reply(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    """As after the server was killed: its participants have done the round, and kept what came of it on their disks."""
    config = make_config({"method": method, "federation.rounds": 3, "wire.uplink": "int8"})
    once = federation.run(config)

    class Twice(federation.LocalGrid):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, node_config=lambda i: {"state-dir": str(tmp_path)}, **more)

        def _work(self, message: Message, stored: Context) -> tuple[Message, RecordDict]:
            if message.metadata.message_type == messages.TRAIN:
                _, stored.state = super()._work(message, stored)
            return super()._work(message, stored)

    monkeypatch.setattr(importlib.import_module("fluxlib.federation.run"), "LocalGrid", Twice)
    federation.run(config.updated({"seed": 1}))  # what is left on the disks is of another run first
    for _ in range(2):  # then of this one
        twice = federation.run(config)
    for a, b in zip(once.model.parameters(), twice.model.parameters(), strict=True):
        assert torch.equal(a, b)


# A participant's folder.


def test_a_participant_trains_on_the_samples_of_its_folder(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    made = folders.make_folders(tmp_path, config)
    task, parts = local_data.load_task(config)
    for folder, part in zip(made, parts, strict=True):
        assert local_data.read_examples(folder / "train.jsonl") == [task.train[index] for index in part]
    settings = folders.node_config(made[1])
    assert (settings["partition-id"], settings["device"], settings["torch-device"]) == (1, "l20", "cpu")
    assert settings["data"] == str(made[1] / "train.jsonl") and settings["state-dir"] == str(made[1] / "state")
    assert 'partition-id=1 device="l20"' in processes.supernode_command(made[1], "here:1", 2)[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must say participant .a number. and device"),
        ("participant: 0\ndevice: toaster\n", "device .one of l20"),
        ("participant: zero\ndevice: l20\n", "participant .a number. .*zero"),
        ("participant: 0\ndevice: l20\ncolour: blue\n", "colour"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "participant.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        folders.read_participant(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": 5}, {"response": None}, {"label": ["x"]}, {"options": "ab"}, {"options": ["a", 1]}, {"answer": 2},
        {"answer": 0.5}, {"answer": True}, {"may_be_cut": "no"}, {"prompt": "\ud800"}, {"secret": "secret"},
    ],
    ids=str,
)  # fmt: skip
def test_samples_of_other_types_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    good = {"prompt": "q", "response": "a", "label": "l", "options": ["a", "b"], "answer": 0}
    (tmp_path / "train.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | change))
    with pytest.raises(local_data.DataError, match="line 2 of this participant's samples is no JSON") as error:
        local_data.read_examples(tmp_path / "train.jsonl")
    assert "secret" not in str(error.value)


def test_damaged_samples_are_named_and_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with pytest.raises(local_data.DataError, match="cannot be read: No such file"):
        local_data.read_examples(path)
    local_data.write_examples(path, [Example("q", "a", "l", ("a", "b"), 0)])
    assert local_data.read_examples(path) == [Example("q", "a", "l", ("a", "b"), 0)]
    path.write_text(path.read_text() + '{"prompt": "a secret"}\n')
    with pytest.raises(local_data.DataError, match="line 2") as error:
        local_data.read_examples(path)
    assert "secret" not in str(error.value)
    path.write_bytes(b"\xff")
    with pytest.raises(local_data.DataError, match="cannot be read: it is no text"):
        local_data.read_examples(path)
    path.write_text("\n")
    with pytest.raises(local_data.DataError, match="empty"):
        local_data.read_examples(path)


def test_a_device_that_a_participant_names_is_the_one_in_the_tables(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = importlib.import_module("fluxlib.federation.run")

    class Grid(federation.LocalGrid):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(
                *arguments, node_config=lambda i: {"device": ["rtx-3060", "toaster"][i - 1]} if i else {}, **more
            )

    monkeypatch.setattr(engines, "LocalGrid", Grid)
    result = federation.run(make_config({"federation.participants": 2, "federation.rounds": 1}))
    assert result.participants["device"].tolist() == ["l20", "rtx-3060"]
    with pytest.raises(federation.RunFailed, match="device is 'toaster', allowed are l20"):
        federation.run(make_config({"federation.participants": 3, "federation.rounds": 1}))


# Every message, whatever carries it.


def test_nothing_of_a_participants_samples_is_in_any_message(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its texts as bytes, its token numbers as integers of any width; arrays hold experts, and no integers."""
    seen: list[RecordDict] = []

    def watched(grid: federation.LocalGrid, message: Message) -> Message | None:
        reply = deliver(grid, message)
        assert reply is not None
        seen.extend([message.content, reply.content])
        return reply

    deliver = federation.LocalGrid._deliver
    monkeypatch.setattr(federation.LocalGrid, "_deliver", watched)
    config = make_config({"method": "flux", "federation.rounds": 2})
    federation.run(config)
    task, parts = local_data.load_task(config)
    samples = [task.train[index] for part in parts for index in part]
    tokenizer = local_copy.workspace(config.model, "float32").tokenizer
    secrets = {text.encode() for sample in samples for text in (sample.prompt, sample.response) if len(text) > 8}
    for sample in samples:
        numbers = tokenizer(sample.prompt)["input_ids"]
        secrets |= {np.array(numbers, kind).tobytes() for kind in (np.uint8, np.uint16, np.int32, np.int64)}
        secrets.add(json.dumps(numbers)[1:-1].encode())
    assert len(seen) == 2 * 3 * (1 + 1 + 2) and len(secrets) > 200
    for content in seen:
        for kind, record in content.items():
            assert kind in ("arrays", "config", "metrics")
            for value in record.values():
                data = (
                    value.data
                    if isinstance(value, Array)
                    else value
                    if isinstance(value, bytes)
                    else str(value).encode()
                )
                assert not any(secret in data for secret in secrets)
                assert not isinstance(value, Array) or value.dtype == "float32"


def test_a_superlink_that_nobody_answers_is_refused_at_once(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        there, (gone,) = listening.getsockname()[1], processes.free_ports(1)
        (tmp_path / "config.toml").write_text(
            f'[superlink.there]\naddress = "127.0.0.1:{there}"\n[superlink.gone]\naddress = "127.0.0.1:{gone}"\n'
            '[superlink.local]\naddress = ":local:"\n[superlink.odd]\naddress = 5\n'
        )
        for name in ("there", "local", "odd", "unknown"):
            processes.reach(None, name)
    config, start = make_config({"engine": "deployment"}), time.monotonic()
    monkeypatch.setattr(deployment, "flwr", lambda *_: pytest.fail("a run was submitted"))
    with pytest.raises(ConfigError, match=f"superlink is 'gone', nobody answers at 127.0.0.1:{gone}"):
        federation.run(config, out=tmp_path / "out", superlink="gone")
    assert deployment.run_status("1", None, "gone")[0] == "unknown" and time.monotonic() - start < 60


def test_a_superlink_that_falls_silent_ends_the_wait_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = iter([("unknown", "no answer"), ("running", ""), *[("unknown", "no answer")] * 1000])
    monkeypatch.setattr(deployment, "run_status", lambda *_: next(said))
    for name, seconds in (("STATUS_EVERY_S", 0.001), ("POLL_S", 0.002), ("SILENCE_S", 0.05)):
        monkeypatch.setattr(deployment, name, seconds)
    ended = deployment._follow(Progress(tmp_path, "one"), "7", Output(), None, "flux")
    assert ended.startswith("nothing was heard of it for") and ended.endswith("no answer")
    assert "no word of run 7 on flux: no answer" in caplog.text


@pytest.mark.parametrize("host", ["m\u00fcller", "\ud800", "\u2603" * 1000])
def test_a_name_that_no_certificate_can_have_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="^host is .*, allowed are addresses, and names as the DNS has them"):
        credentials.make_certificates(tmp_path / "server", ["localhost", host])
    assert not (tmp_path / "server").exists()


def test_certificates_and_keys_are_ones_own(tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

    credentials.make_certificates(tmp_path, ["flux.example", "10.0.0.1"])
    authority = x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["flux.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
    credentials.make_node_key(tmp_path)
    private = load_ssh_private_key((tmp_path / "node.key").read_bytes(), None)
    assert private.public_key() == load_ssh_public_key((tmp_path / "node.pub").read_bytes())
    for name in ("ca.key", "server.key", "node.key"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0
    before = (tmp_path / "node.key").read_bytes()
    credentials.make_node_key(tmp_path)
    assert (tmp_path / "node.key").read_bytes() == before
    with pytest.raises(ConfigError, match="exists already"):
        credentials.make_certificates(tmp_path, ["flux.example"])


def test_rows_are_followed_as_they_come_and_a_run_can_be_stopped(tmp_path: Path) -> None:
    server, follower = Progress(tmp_path, "one"), Progress(tmp_path, "one")
    assert follower.new() == []
    assert server.add({"round": 0}) is False
    assert (follower.new(), follower.new()) == ([{"round": 0}], [])
    with (tmp_path / "progress" / "one.jsonl").open("a") as file:
        file.write('{"round": 1')
    assert follower.new() == []
    with (tmp_path / "progress" / "one.jsonl").open("a") as file:
        file.write("}\n")
    assert follower.new() == [{"round": 1}]
    follower.ask_to_stop()
    assert server.add({"round": 2}) is True
    server.add({"over": "too few"})
    assert follower.new() == [{"round": 2}, {"over": "too few"}]
    follower.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("role", ["", "caller"])
def test_a_second_deployment_run_leaves_the_first_ones_files_alone(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.setattr(deployment, "STOPPING_S", 0.3)
    config = make_config({"engine": "deployment"})
    progress = Progress(tmp_path, config.run_id)
    progress.add({"round": 0})
    progress.ask_to_stop()
    with lock.hold(tmp_path, config.run_id, role), pytest.raises(ConfigError, match=f"running {config.run_id}"):
        federation.run(config, out=tmp_path, superlink="nowhere")
    assert progress.new() == [{"round": 0}]
    assert progress.add({"round": 1}), "the wish to stop is still there"


def test_a_server_that_is_refused_does_not_end_the_run_that_is_there(make_config: Make, tmp_path: Path) -> None:
    config = make_config({"federation.rounds": 1})
    with lock.hold(tmp_path, config.run_id), pytest.raises(ConfigError, match=f"running {config.run_id}"):
        server_app.serve_alone(LocalGrid(client_app.app, 3), config, tmp_path)
    assert Progress(tmp_path, config.run_id).new() == []


def test_who_ends_the_caller_ends_the_run(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its server app would hold the run against the command that is to go on."""
    said: list[tuple[Any, ...]] = []

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    replies = {"submit": lambda *_: "7", "flwr": lambda *w: said.append(w)}
    for name, reply in (replies | {"_follow": interrupted}).items():
        monkeypatch.setattr(deployment, name, reply)
    with pytest.raises(KeyboardInterrupt):
        federation.run(make_config({"engine": "deployment"}), out=tmp_path, superlink="flux")
    assert said == [(None, "stop", "7", "flux")] and any((tmp_path / "progress").glob("*.stop"))


def test_status_says_who_is_there_and_what_is_late(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(row: dict[str, Any]) -> None:
        if row["round"] == 1:
            raise KeyboardInterrupt

    config = make_config()
    with pytest.raises(KeyboardInterrupt):
        federation.run(config, on_round=interrupt, out=tmp_path)
    nodes = [{"node-id": "7", "status": "online"}, {"node-id": "8", "status": "offline", "offline-at": "noon"}]
    known = {"nodes": nodes, "runs": [{"run-id": "5", "status": "running"}]}
    monkeypatch.setattr(deployment, "answer", lambda home, superlink, what, *_: known[what])
    (kept,) = (tmp_path / "checkpoints").iterdir()
    os.utime(kept, (time.time() - 1e6,) * 2)
    Progress(tmp_path, "another").add({"round": 0, "over": ""})
    with pytest.raises(SystemExit) as ended:
        deploy.status("flux", tmp_path, as_json=False)
    said = capsys.readouterr().out
    assert ended.value.code == 1 and "another" not in said
    for line in (
        "node 7: online", "node 8: offline", "run 5: running", "  participant 2, round 1: good",
        "late: node 8 is offline since noon", f"late: {config.run_id}: its last round ended 1000",
    ):  # fmt: skip
        assert line in said
    nodes.pop()
    kept.unlink()
    with pytest.raises(SystemExit) as ended:
        deploy.status("flux", tmp_path, as_json=True)
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out) == known | {"at_work": {}, "late": []}
