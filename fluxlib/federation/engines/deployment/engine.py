"""A run on a SuperLink: submitted with Flower's command line, followed by its files, read back as on every engine.

The server app runs beside the SuperLink, which watches it; it writes tables, the tuned experts, and a line per round as
it goes. So the folder ``out`` must be one that both this process and the SuperLink's machine see: the same
machine, or a shared file system.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fluxlib import models, records
from fluxlib.config import REPO_ROOT, ConfigError, RunConfig
from fluxlib.federation import progress
from fluxlib.federation.checks import check
from fluxlib.federation.engines.deployment.processes import CONNECTION, LocalFederation, flwr
from fluxlib.federation.protocol import wire as wires
from fluxlib.federation.results import Output, RunFailed, RunResult, experts_path, table_path
from fluxlib.federation.store import lock
from fluxlib.moe import find

POLL_S = 0.5
STATUS_EVERY_S = 15.0
"""Seconds between two questions to the SuperLink: each is a process of its own."""

LETTING_GO_S = 5.0
"""Seconds that a server app which was killed may still seem to run."""


def run_deployment(config: RunConfig, options: Output, superlink: str | None) -> RunResult:
    """Run ``config`` on the SuperLink that ``options`` name, or on a federation started here for this one run.

    Raises:
        ConfigError: what :func:`~fluxlib.federation.checks.check` refuses, an unknown SuperLink, or another process
            that is running this run in this folder, or following it.
        RunFailed: the server app failed or was killed; the message says why. The same call goes on after the last
            complete round.
    """
    check(config, options.out)
    if options.on_result is not None:
        raise ConfigError("on_result works on the engines 'local' and 'simulation', where the server is this process")
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flux-")))
        out = (options.out or temporary / "out").resolve()
        stack.enter_context(lock.hold(out, config.run_id, "caller"))
        with lock.hold(
            out, config.run_id, wait_s=LETTING_GO_S
        ):  # a server at work would lose what it wrote for its caller
            progress.clear(out, config.run_id)
        if superlink is None:
            federation = stack.enter_context(LocalFederation(temporary / "federation", config))
            home, superlink = federation.home, CONNECTION
        else:
            home = flower_home()
        _follow(submit(config, out, home, superlink), config, options, out, home, superlink)
        return _read(config, out, keep=options.out is not None)


def flower_home() -> Path:
    """The folder of Flower's configuration, as Flower finds it."""
    from flwr.supercore.utils import get_flwr_home

    return Path(get_flwr_home())


def submit(config: RunConfig, out: Path, home: Path, superlink: str) -> str:
    """Start the run on ``superlink``; the number Flower gives it.

    Raises:
        ConfigError: Flower refuses, with what it says.
    """
    with tempfile.TemporaryDirectory(prefix="flux-") as temporary:
        path = Path(temporary) / "run.toml"
        # A JSON text without its escapes for other alphabets is a TOML text too.
        settings = json.dumps(json.dumps(config.model_dump(mode="json", exclude_defaults=True)))
        path.write_text(f"settings = {settings}\nout = {json.dumps(str(out))}\nengine = {json.dumps(config.engine)}\n")
        app = Path(temporary) / "fluxlib"  # Flower looks through all files of an app's folder, a checkout has many
        app.mkdir()
        shutil.copy(REPO_ROOT / "pyproject.toml", app)
        done = flwr(home, "run", str(app), superlink, "--run-config", str(path), "--format", "json")
    try:
        return str(json.loads(done.stdout)["run-id"])
    except (ValueError, KeyError, TypeError):
        said = (done.stdout + done.stderr).strip()
        raise ConfigError(f"superlink is {superlink!r}, it did not take the run: {said}") from None


def _follow(number: str, config: RunConfig, options: Output, out: Path, home: Path, superlink: str) -> None:
    """Show rows as they come until the run is over.

    The server app says so itself; one that was killed, or never started, cannot, so the SuperLink is asked as well.
    """
    rows, asked = progress.follow(out, config.run_id), time.monotonic()
    while (failure := progress.over(out, config.run_id)) is None:
        _show(rows, options, out, config)
        if time.monotonic() - asked > STATUS_EVERY_S:
            status, details = run_status(number, home, superlink)
            asked = time.monotonic()
            if status.startswith("finished") and progress.over(out, config.run_id) is None:
                failure = details or status
                break
        time.sleep(POLL_S)
    _show(rows, options, out, config)
    progress.clear(out, config.run_id)
    if failure:
        raise RunFailed(f"run {number} on {superlink}: {failure}")


def _show(rows: Iterator[dict[str, Any] | None], options: Output, out: Path, config: RunConfig) -> None:
    while (row := next(rows)) is not None:
        if options.on_round and options.on_round(row):
            progress.ask_to_stop(out, config.run_id)


def run_status(number: str, home: Path, superlink: str) -> tuple[str, str]:
    """Status of a run (``running``, ``finished:completed`` ...) and what is said about it."""
    done = flwr(home, "list", superlink, "--run-id", number, "--format", "json")
    try:
        found = json.loads(done.stdout)["runs"][0]
        return str(found["status"]), str(found["status-details"])
    except (ValueError, KeyError, IndexError, TypeError):
        return "unknown", (done.stdout + done.stderr).strip()


def _read(config: RunConfig, out: Path, keep: bool) -> RunResult:
    """Tables and model of a finished run."""
    paths = {table: table_path(out, table, config.run_id) for table in ("rounds", "participants")}
    if not all(path.is_file() for path in paths.values()):
        raise RunFailed(f"the run is complete; its tables are in {out} on the SuperLink's machine, not on this one")
    frames = {table: records.read(table, path) for table, path in paths.items()}
    model, _ = models.load(config.model)
    found = find.layers(model)
    experts: dict[tuple[int, int], dict[str, Any]] = {}
    for name, tensor in load_file(experts_path(out, config.run_id)).items():
        key, part = wires.parse_name(name)
        experts.setdefault(key, {})[part] = tensor
    for (layer, expert), tensors in experts.items():
        find.write_expert(found[layer].experts, expert, tensors)
    return RunResult(config.run_id, **frames, path=out if keep else None, model=model)
