"""SuperLink and SuperNodes as processes of this machine, each with its log; and a whole federation of them.

The commands are Flower's own, with what ``docs/deployment.md`` says about each flag. Every process is the head of a
group of its own, so that what it started ends with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from fluxlib.config import RunConfig
from fluxlib.federation.engines.deployment import credentials, folders
from fluxlib.federation.results import RunFailed
from fluxlib.io import ConfigError

HOST = "127.0.0.1"
CONNECTION = "federation"
"""Name of the SuperLink in the Flower configuration that a :class:`LocalFederation` writes."""

START_S, COMMAND_S, ANSWER_S = 120.0, 300.0, 5.0
"""Patience with a SuperLink that starts, with a command, and with a connection; seconds each on an idle machine."""


def environment(**more: str) -> dict[str, str]:
    """This process's, with what makes Flower's commands quiet, quick to find, and of one thread each."""
    ours = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**ours, **os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **more}


def start(command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start ``command`` as the head of a process group; what it prints goes to ``log``. It ends with this process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env,
            start_new_session=True, preexec_fn=end_with_parent,
        )  # fmt: skip


def end_with_parent() -> None:
    """Called in a new process: it is asked to end when the one that started it is gone, however that went (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def stop(process: subprocess.Popen[bytes], patience_s: float = 5.0) -> None:
    """End a process and what it started: asked first, killed after ``patience_s``."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, name)
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:  # the whole group is gone
            process.wait()


def supernode_command(folder: Path, superlink: str, port: int) -> list[str]:
    """A SuperNode for the participant of ``folder``; ``port`` is between it and the process of each message."""
    settings = " ".join(f"{name}={json.dumps(value)}" for name, value in folders.node_config(folder).items())
    return [
        "flower-supernode",
        "--superlink", superlink,
        "--root-certificates", str(folder / credentials.CA_CERTIFICATE),
        "--auth-supernode-private-key", str(folder / credentials.NODE_KEY),
        "--host", HOST, "--port", str(port),
        "--node-config", settings,
    ]  # fmt: skip


def flwr(home: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Flower's command line with its configuration in ``home``; one that never answers counts as failed."""
    env, command = environment(**({"FLWR_HOME": str(home)} if home else {})), ["flwr", *arguments]
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"flwr {arguments[0]} did not answer within {COMMAND_S:g} s")


def reach(home: Path | None, superlink: str) -> None:
    """ConfigError: nobody answers at the address that Flower's configuration has for ``superlink``.

    Flower's own commands try for a minute. What they would say of a wrong configuration is left to them.
    """
    path = (home or Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr"))) / "config.toml"
    try:
        host, text = tomllib.loads(path.read_text())["superlink"][superlink]["address"].rsplit(":", 1)
        port = int(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    try:
        socket.create_connection((host.strip("[]"), port), ANSWER_S).close()
    except OSError as error:
        raise ConfigError(f"superlink is {superlink!r}, nobody answers at {host}:{port} ({error})") from None


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [int(found.getsockname()[1]) for found in sockets]


class LocalFederation:
    """A SuperLink and a SuperNode per participant on this machine, with TLS and a key for each node.

    ``folder`` holds certificates, keys, participants' folders and logs; made if it is not there.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder.resolve(), config
        self.home = self.folder / "flwr"
        self.port, *self.node_ports = free_ports(1 + config.federation.participants)
        self.address = f"{HOST}:{self.port}"
        self.node_folders: list[Path] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> LocalFederation:
        with ExitStack() as stack:
            stack.callback(self.stop)
            server = self.folder / "server"
            authority = server / credentials.CA_CERTIFICATE
            if not (server / credentials.CA_KEY).exists():
                credentials.make_certificates(server, [HOST, "localhost"])
            for path in server.glob("superlink.db*"):
                path.unlink()  # what a SuperLink that was killed still wants to do
            self.node_folders = folders.make_folders(self.folder, self.config)
            self.home.mkdir(parents=True, exist_ok=True)
            (self.home / "config.toml").write_text(
                f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{self.address}"\n'
                f'root-certificates = "{authority}"\n'
            )
            self.start_superlink()
            for folder, door, port in zip(self.node_folders, self.doors(), self.node_ports, strict=True):
                credentials.make_node_key(folder)
                (folder / credentials.CA_CERTIFICATE).write_bytes(authority.read_bytes())
                done = flwr(self.home, "supernode", "register", str(folder / credentials.NODE_PUBLIC_KEY), CONNECTION)
                if done.returncode and "already" not in done.stdout + done.stderr:
                    raise RunFailed(f"the SuperLink did not register {folder.name}: {done.stdout}{done.stderr}")
                self.spawn(folder.name, supernode_command(folder, door, port))
            stack.pop_all()  # what runs is left running: stopped by who leaves the federation
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def doors(self) -> list[str]:
        """Where each node finds the SuperLink."""
        return [self.address] * len(self.node_folders)

    def spawn(self, name: str, command: Sequence[str]) -> None:
        """Start one of the federation's processes; its log is ``logs/<name>.log``."""
        env = environment(FLWR_HOME=str(self.folder / "home" / name))
        self.processes[name] = start(command, self.log(name), env)

    def log(self, name: str) -> Path:
        """The log of one of the processes."""
        return self.folder / "logs" / f"{name}.log"

    def stop(self) -> None:
        """End every process; nodes first."""
        for name in sorted(self.processes, key=lambda name: name == "superlink"):
            stop(self.processes[name])
        self.processes.clear()

    def start_superlink(self) -> None:
        """Start the SuperLink, or start it again on the database that it had; RunFailed: it does not answer."""
        server = self.folder / "server"
        self.spawn("superlink", [  # speaks TLS only, and lets in registered nodes only
            "flower-superlink",
            "--host", HOST, "--port", str(self.port),
            "--ssl-ca-certfile", str(server / credentials.CA_CERTIFICATE),
            "--ssl-certfile", str(server / credentials.SERVER_CERTIFICATE),
            "--ssl-keyfile", str(server / credentials.SERVER_KEY),
            "--enable-supernode-auth",
            "--database", str(server / "superlink.db"),
            "--disable-runtime-dependency-installation",
        ])  # fmt: skip
        context = ssl.create_default_context(cafile=str(server / credentials.CA_CERTIFICATE))
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.processes["superlink"].poll() is None:
            try:
                with urllib.request.urlopen(f"https://{self.address}/health", context=context, timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise RunFailed(f"the SuperLink did not start; {self.log('superlink')} says why")
