"""A run on a SuperLink: submitted with Flower's command line, followed by its files, read back as on every engine.

The server app runs beside the SuperLink, which watches it; it writes tables, the tuned experts, and a line per round as
it goes. So the folder ``out`` must be one that both this process and the SuperLink's machine see: the same
machine, or a shared file system.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fluxlib import models, records
from fluxlib.config import REPO_ROOT, RunConfig
from fluxlib.federation.checks import check
from fluxlib.federation.engines.deployment.processes import CONNECTION, LocalFederation, flwr, reach
from fluxlib.federation.protocol.wire import by_expert
from fluxlib.federation.results import TABLES, Output, RunFailed, RunResult, experts_path, table_path
from fluxlib.federation.store import lock
from fluxlib.federation.store.progress import Progress
from fluxlib.federation.store.tensor_file import read_tensors
from fluxlib.io import ConfigError, brief
from fluxlib.moe import find
from fluxlib.moe.adapter import Adapter

log = logging.getLogger(__name__)

POLL_S = 0.5
STATUS_EVERY_S = 30.0
"""Seconds without a row, or an answer, after which the SuperLink is asked: each question is a process of its own."""

SILENCE_S = 60.0
"""Seconds without a word from the SuperLink after which a run is given up."""

LETTING_GO_S, STOPPING_S = 5.0, 60.0
"""Seconds that a server app may still run: one that was killed, one that Flower stops at its next heartbeat."""


def run_deployment(config: RunConfig, output: Output, superlink: str | None) -> RunResult:
    """Run ``config`` on the SuperLink of that name, or on a federation started here for this one run.

    Raises:
        ConfigError: what :func:`~fluxlib.federation.checks.check` refuses, an unknown SuperLink, or another process
            that is running this run in this folder, or following it.
        RunFailed: the server app failed or was killed; the message says why.
    """
    check(config, output.out)
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flux-")))
        out = (output.out or temporary / "out").resolve()
        progress = Progress(out, config.run_id)
        stack.enter_context(lock.hold(out, config.run_id, "caller"))
        wait_s = STOPPING_S if progress.stopping else LETTING_GO_S
        with lock.hold(out, config.run_id, wait_s=wait_s):  # a server at work would lose what it wrote
            progress.clear()
        home: Path | None = None  # Flower's own
        if superlink is None:
            federation = stack.enter_context(LocalFederation(out / "federation" / config.run_id, config))
            home, superlink = federation.home, CONNECTION
        number = submit(config, out, home, superlink)
        try:
            failure = _follow(progress, number, output, home, superlink)
        except BaseException:
            if home is None:  # left alone, the server app would hold the run against the same command
                progress.ask_to_stop()
                flwr(home, "stop", number, superlink)
            raise
        progress.clear()
        if failure:
            again = "the same command goes on after the last complete round"
            raise RunFailed(f"run {number} on {superlink}: {failure}; {again}")
        return _read(config, out, keep=output.out is not None)


def submit(config: RunConfig, out: Path, home: Path | None, superlink: str) -> str:
    """Start the run on ``superlink``; the number Flower gives it. ConfigError as in :func:`answer`."""
    with tempfile.TemporaryDirectory(prefix="flux-") as temporary:
        path = Path(temporary) / "run.toml"
        # A JSON text without its escapes for other alphabets is a TOML text too.
        settings = json.dumps(json.dumps(config.settings(changed_only=True)))
        path.write_text(f"settings = {settings}\nout = {json.dumps(str(out))}\nengine = {json.dumps(config.engine)}\n")
        app = Path(temporary) / "fluxlib"  # Flower looks through all files of an app's folder, a checkout has many
        app.mkdir()
        shutil.copy(REPO_ROOT / "pyproject.toml", app)
        return str(answer(home, superlink, "run-id", "run", str(app), "--run-config", str(path)))


def _follow(progress: Progress, number: str, output: Output, home: Path | None, superlink: str) -> str:
    """Show rows as they come until the run is over; why it failed, if it did.

    The server app says so itself; one that was killed, or never started, cannot, so the SuperLink is asked as well.
    """
    asked = heard = time.monotonic()
    ended = ""
    while True:
        for row in progress.new():
            asked = heard = time.monotonic()
            if "over" in row:
                return str(row["over"])
            if output.on_round and output.on_round(row):
                progress.ask_to_stop()
        if ended:
            return ended
        if time.monotonic() - asked > STATUS_EVERY_S:
            status, details = run_status(number, home, superlink)
            asked, ended = time.monotonic(), (details or status) if status.startswith("finished") else ""
            if status != "unknown":
                heard = asked
            elif asked - heard > SILENCE_S:
                return f"nothing was heard of it for {asked - heard:.0f} s: {details}"
            else:
                log.warning("no word of run %s on %s: %s", number, superlink, details)
        else:
            time.sleep(POLL_S)


def run_status(number: str, home: Path | None, superlink: str) -> tuple[str, str]:
    """Status of a run (``running``, ``finished:completed`` ...) and what is said about it."""
    try:
        found = answer(home, superlink, "runs", "list", "--run-id", number)[0]
        return str(found["status"]), str(found["status-details"])
    except (ConfigError, KeyError, IndexError, TypeError) as error:
        return "unknown", str(error)


def answer(home: Path | None, superlink: str, what: str, *command: str) -> Any:
    """The entry ``what`` of what one of Flower's commands answers; ConfigError: nobody does, or with something else."""
    reach(home, superlink)
    done = flwr(home, *command, superlink, "--format", "json")
    try:
        return json.loads(done.stdout)[what]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"superlink is {superlink!r}, it says: {brief(done.stdout + done.stderr, 1000)}") from None


def _read(config: RunConfig, out: Path, keep: bool) -> RunResult:
    """Tables and model of a finished run."""
    paths = {table: table_path(out, table, config.run_id) for table in TABLES}
    if not all(path.is_file() for path in paths.values()):
        raise RunFailed(f"the run is complete; its tables are in {out} on the SuperLink's machine, not on this one")
    frames = {table: records.read(table, path) for table, path in paths.items()}
    model, _ = models.load(config.model, getattr(torch, config.torch_dtype))
    found, adapter = find.layers(model), Adapter.of(config)
    for (layer, expert), tensors in by_expert(read_tensors(experts_path(out, config.run_id))[0]).items():
        experts = found[layer].experts
        if adapter is not None:
            base = find.expert_tensors(experts, expert)
            tensors = adapter.added((layer, expert), base, tensors, find.read_layout(experts))
        find.write_expert(experts, expert, tensors)
    return RunResult(config.run_id, **frames, path=out if keep else None, model=model)
