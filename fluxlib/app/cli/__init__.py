"""The ``fluxlib`` command: run, compare and export federated runs, profile a model, plan memory, execute notebooks.

Wrong input ends with one message and exit code 2, a failure on the way with exit code 1. Every command that gives
results gives them as JSON too, with ``--json``.
"""

# Heavy imports live inside the commands, so that --help is quick.

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from fluxlib.app.cli import deploy, runs, tools
from fluxlib.app.cli.arguments import Command, check_arguments, parse_settings

__all__ = ["app", "main", "parse_settings"]

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
    "profile": tools.profile,
    "plan": tools.plan,
    "notebook": tools.notebook,
    "trials": tools.trials,
    "claims": tools.claims,
    "pages": tools.pages,
    "doctor": tools.doctor,
}
for name, command in COMMANDS.items():
    app.command(name, cls=Command)(command)
app.add_typer(deploy.app, name="deploy")


def main() -> None:
    """Entry point: turns expected errors into one message and an exit code."""
    from fluxlib.config import ConfigError

    try:
        check_arguments(sys.argv[1:])
        app(prog_name="fluxlib")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
