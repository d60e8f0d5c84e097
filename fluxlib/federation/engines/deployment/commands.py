"""``fluxlib deploy``: what an operator needs beside Flower's own commands; ``docs/deployment.md`` shows where.

The SuperLink itself and the registration of nodes are Flower's commands as they are.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fluxlib.config import ConfigError

PATIENCE_S, RETRY_S = 150.0, 10.0
"""How long a node that is not let in tries again, and how often."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="What an operator needs beside Flower's own commands; docs/deployment.md shows where.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; errors that were expected end with one message and exit code 2."""
    from fluxlib.federation.results import RunFailed

    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="fluxlib deploy")
    except (ConfigError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


@app.command()
def certificates(
    folder: Annotated[Path, typer.Argument(help="where they go; only ca.crt leaves this machine")],
    host: Annotated[list[str], typer.Option(help="name or address under which nodes reach the server; repeat")],
) -> None:
    """Make a certificate authority and the SuperLink's certificate."""
    from fluxlib.federation.engines.deployment import credentials

    credentials.make_certificates(folder, host)
    print(f"{folder}: copy {credentials.CA_CERTIFICATE} to every participant; the others stay here")


@app.command(name="node-key")
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


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="certificates, participants' folders, logs, results")] = Path(
        "build/deploy"
    ),
    participants: Annotated[int, typer.Option(help="SuperNodes")] = 4,
    rounds: Annotated[int, typer.Option(help="number of rounds")] = 3,
    method: Annotated[str, typer.Option(help="flux, fmd, ...")] = "flux",
) -> None:
    """A SuperLink and SuperNodes with data of their own on this machine, training over TLS."""
    from fluxlib.federation.engines.deployment.demo import run_demo

    run_demo(folder, participants, rounds, method)


if __name__ == "__main__":
    main()
