"""``fluxlib deploy``: what an operator needs beside Flower's own commands; ``docs/deployment.md`` shows where.

The SuperLink itself and the registration of nodes are Flower's commands as they are.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fluxlib.app.cli.arguments import Command, JsonOption

PATIENCE_S, RETRY_S = 150.0, 10.0
"""How long a node that is not let in tries again, and how often."""

LATE = 2.0
"""How many times as long as the longest before a round may take until it is called late."""

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


@app.command(cls=Command)
def status(
    superlink: Annotated[str, typer.Argument(help="its name in Flower's configuration")],
    out: Annotated[Path, typer.Option(help="folder of the tables: --out of the run")] = Path("build/runs"),
    as_json: JsonOption = False,
) -> None:
    """Nodes, rounds, each participant's last reply, and what is late; exit code 1 if something is.

    \b
    Example:
        fluxlib deploy status flux --out /srv/flux/results
    """
    from fluxlib.federation.engines.deployment import engine

    nodes, runs = (engine.answer(None, superlink, *how) for how in (("nodes", "supernode", "list"), ("runs", "list")))
    work = _at_work(out)
    late = [f"node {node['node-id']} is offline since {node['offline-at']}"
            for node in nodes if node["status"] == "offline"]  # fmt: skip
    for run_id, one in work.items():
        late += [f"{run_id}: participant {p}, round {n}: {reply}" for p, n, reply in one["replies"] if reply != "good"]
        if one["longest_s"] and one["ago_s"] > LATE * one["longest_s"]:
            late.append(f"{run_id}: its last round ended {one['ago_s']:.0f} s ago, none took more than "
                        f"{one['longest_s']:.0f} s")  # fmt: skip
    if as_json:
        print(json.dumps({"nodes": nodes, "runs": runs, "at_work": work, "late": late}))
    else:
        print("\n".join([
            *(f"node {node['node-id']}: {node['status']}" for node in nodes),
            *(f"run {run['run-id']}: {run['status']}" for run in runs),
            *(f"{one['last']}, {one['ago_s']:.0f} s ago" for one in work.values()),
            *(f"  participant {p}, round {n}: {reply}" for one in work.values() for p, n, reply in one["replies"]),
            *(f"late: {what}" for what in late or ["nothing"]),
        ]))  # fmt: skip
    raise SystemExit(bool(late))


def _at_work(out: Path) -> dict[str, dict[str, Any]]:
    """Each unfinished run in ``out``: its last round, how long ago that ended, its longest round, the last replies."""
    from fluxlib import records
    from fluxlib.analysis import store
    from fluxlib.federation.store.progress import Progress

    found: dict[str, dict[str, Any]] = {}
    files = [*out.glob(f"{store.CHECKPOINTS}/*.safetensors"), *out.glob("progress/*.jsonl")]
    for name in sorted({file.stem for file in files}):
        kept, replies = out / store.CHECKPOINTS / f"{name}.safetensors", []
        if kept.is_file():
            rounds: list[Any] = store.read(kept).to_dict("records")
            last = store.read(kept, "participants").groupby("participant").tail(1).sort_values("participant")
            replies = last[["participant", "round", "rejected"]].replace({"rejected": {"": "good"}}).values.tolist()
        else:  # in its first round
            rounds = Progress(out, name).new()
        if rounds and "over" not in rounds[-1]:
            written = max(store.modified(file) for file in files if file.stem == name)
            walls = [row["round_wall_s"] + row["evaluate_wall_s"] for row in rounds if row["round"]]
            found[name] = {
                "last": records.describe_round(rounds[-1]), "ago_s": time.time() - written, "replies": replies,
                "longest_s": max(walls, default=0.0),
            }  # fmt: skip
    return found
