"""What the commands share: options that several of them have, and checks."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperArgument, TyperCommand

from fluxlib.io import ConfigError, check_writable

POWER = re.compile(r"[-+]?\d+(\.\d*)?e[-+]?\d+", re.IGNORECASE)
"""Such as 1e-3, which is text to YAML."""

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="any other setting or parameter; repeat as needed"),
]
OutOption = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="folder of tables; default: those of the profiles"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for a machine to read")]


class Command(TyperCommand):
    """A command whose help is plain text, that of its arguments included.

    Typer 0.20 loses an argument's help beside Click 8.5, and escapes brackets as if Rich were to print them.
    """

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        hints = typing.get_type_hints(self.callback, include_extras=True)
        for parameter in self.params:
            if isinstance(parameter, TyperArgument) and not parameter.help:
                parameter.help = hints[str(parameter.name)].__metadata__[0].help

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: Typer lists them with the options."""

    def get_help(self, ctx: click.Context) -> str:
        """The text of ``--help``."""
        return super().get_help(ctx).replace("\\[", "[")


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """``["federation.rounds=3", "roles.epsilon=dynamic"]`` by name; a value is YAML where it can be, else text.

    ConfigError: an item without ``=``, or a name given twice.
    """
    import yaml

    found: dict[str, Any] = {}
    for item in settings or []:
        name, separator, text = item.partition("=")
        if not separator or not name:
            raise ConfigError(f"--set takes NAME=VALUE, got {item!r}")
        if name in found:
            raise ConfigError(f"--set {name} is given twice")
        try:
            found[name] = float(text) if POWER.fullmatch(text) else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):  # no date, no number that Python reads
            found[name] = text
    return found


def new_folder(folder: Path) -> None:
    """ConfigError for a folder with something in it, or that cannot be written, before hours of work."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: a model is written to a new folder")
    check_writable(folder)
