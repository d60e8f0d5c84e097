"""The ``fluxlib`` command: run, compare and export federated runs, plan memory, execute notebooks, judge claims.

Wrong input ends with one message and exit code 2, a failure on the way with exit code 1. Every command that gives
results gives them as JSON too, with ``--json``.
"""

# Heavy imports live inside the commands, so that --help is quick.

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import typer

from fluxlib.app.cli import deploy, runs, tools
from fluxlib.app.cli.arguments import Command, parse_settings
from fluxlib.io import ConfigError
from fluxlib.records import TableError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=__doc__,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "run": runs.run,
    "list": runs.list_runs,
    "compare": runs.compare,
    "export": runs.export,
    "plan": tools.plan,
    "notebook": tools.notebook,
    "trials": tools.trials,
    "claims": tools.claims,
    "verify": tools.verify,
    "doctor": tools.doctor,
}
for name, command in COMMANDS.items():
    app.command(name, cls=Command)(command)
app.add_typer(deploy.app, name="deploy")


def main() -> None:
    """Entry point: turns expected errors into one message and an exit code."""
    try:
        if any(re.fullmatch(r"(--[a-z-]+=)?\s*", word) for word in sys.argv[1:]):
            # Mostly a shell's variable that was never set; an empty path would mean this folder.
            raise ConfigError("an argument is empty: give a value, or leave the option out")
        app(prog_name="fluxlib")
    except (ConfigError, TableError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
