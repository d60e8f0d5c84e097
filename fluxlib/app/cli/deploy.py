"""``fluxlib deploy``: what an operator needs beside Flower's own commands; ``docs/deployment.md`` shows where.

The SuperLink itself and the registration of nodes are Flower's commands as they are.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

PATIENCE_S, RETRY_S = 150.0, 10.0
"""How long a node that is not let in tries again, and how often."""

app = typer.Typer(no_args_is_help=True, help="Certificates, keys, SuperNodes; docs/deployment.md shows where.")


@app.command()
def certificates(
    folder: Annotated[Path, typer.Argument(help="where they go; only ca.crt leaves this machine")],
    host: Annotated[list[str], typer.Option(help="name or address under which nodes reach the server; repeat")],
) -> None:
    """Make a certificate authority and the SuperLink's certificate."""
    from fluxlib.federation.engines.deployment import credentials

    credentials.make_certificates(folder, host)
    print(f"{folder}: copy {credentials.CA_CERTIFICATE} to every participant; the others stay here")


@app.command()
def node_key(folder: Annotated[Path, typer.Argument(help="the participant's folder")]) -> None:
    """Make a participant's key pair: node.pub goes to the operator, node.key stays."""
    from fluxlib.federation.engines.deployment import credentials

    credentials.make_node_key(folder)
    print(f"{folder / credentials.NODE_PUBLIC_KEY}: to be registered with the SuperLink")


@app.command()
def node(
    folder: Annotated[Path, typer.Argument(help="participant.yaml, train.jsonl, node.key, ca.crt")],
    superlink: Annotated[str, typer.Option(help="host:port of the SuperLink")],
    port: Annotated[int, typer.Option(help="of this machine, between the SuperNode and its work")] = 9094,
) -> None:
    """Take part: Flower's SuperNode with what the folder says. Runs until it is ended."""
    from fluxlib.federation.engines.deployment import processes

    command, env = processes.supernode_command(folder, superlink, port), processes.environment()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    begin = time.monotonic()
    while True:
        supernode = subprocess.Popen(command, env=env, preexec_fn=processes.end_with_parent)
        try:
            code = supernode.wait()
        finally:
            supernode.terminate()
        # A SuperLink takes a minute to notice that a node was killed, and lets nobody in with its key until then.
        if code == 0 or time.monotonic() - begin > PATIENCE_S:
            raise SystemExit(code)
        print(f"not let in; trying again for {PATIENCE_S:g} s after the start", flush=True)
        time.sleep(RETRY_S)
