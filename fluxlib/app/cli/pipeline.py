"""What `make` stands on: notebooks executed, the search and the claims told from results, the machine examined."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fluxlib.app.cli.base import JsonOption, SetOption, existing_folder, parse_settings


def notebook(
    source: Annotated[Path, typer.Argument(help="a notebook of notebooks/")],
    output: Annotated[Path, typer.Argument(help="where the executed copy goes")],
    parameters: Annotated[str, typer.Option(metavar="JSON", help="parameters as one JSON object")] = "{}",
    settings: SetOption = None,
) -> None:
    """Execute a notebook with parameters, as `make reproduce` does; unknown parameters and names are refused first.

    \b
    Example:
        fluxlib notebook notebooks/00_start_here.ipynb build/start.ipynb --set task_name=mini-piqa
    """
    from fluxlib.app import workflow
    from fluxlib.config import ConfigError

    if not source.is_file():
        known = ", ".join(sorted(file.name for file in source.parent.glob("*.ipynb"))) or "none"
        raise ConfigError(f"no notebook {source}; in its folder: {known}")
    by_hand = parse_settings(settings)
    workflow.check_names(by_hand)
    workflow.check_kinds(source, by_hand)
    values = _object(parameters) | by_hand
    from papermill import PapermillExecutionError

    # What the cells print goes to papermill's logger.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("papermill").setLevel(logging.INFO)
    try:
        workflow.execute(source, output, values)
    except PapermillExecutionError as error:
        print(
            f"error: {source.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}",
            file=sys.stderr,
        )
        print(f"the executed copy, with the traceback, is {output}", file=sys.stderr)
        raise SystemExit(1) from None


def _object(text: str) -> dict[str, Any]:
    """The JSON object of ``--parameters``."""
    from fluxlib.config import ConfigError

    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--parameters takes one JSON object, got {text!r} ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--parameters takes one JSON object, got {text!r}")
    return values


def trials(
    out: Annotated[Path | None, typer.Option(help="folder of tables; default: those of the profile tune")] = None,
    figure: Annotated[Path | None, typer.Option(help="folder for trials.{pdf,png,csv}")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the trials of `make reproduce PROFILE=tune`: every setting of every method, and the best of each.

    \b
    Example:
        fluxlib trials --figure build/trials
    """
    from fluxlib import records
    from fluxlib.analysis import store
    from fluxlib.config import ConfigError, check_writable, results_dir

    folder = existing_folder(out) if out else results_dir("tune")
    if figure is not None:
        check_writable(figure)
    from fluxlib import figures

    try:
        rounds = records.read_all("rounds", folder)
        if left := records.unfinished(folder):
            raise ValueError(f"{', '.join(left)} did not finish; run them again, or take them away")
        parameters = {run: store.parameters(folder / "rounds" / f"{run}.parquet") for run in rounds["run_id"].unique()}
        table = figures.trials(rounds, parameters)
    except (records.TableError, ValueError) as error:
        wanted = "a folder of trials, such as `make reproduce PROFILE=tune` writes"
        raise ConfigError(f"no search in {folder}: {error}\nallowed is {wanted} ({results_dir('tune')})") from None
    if figure is not None:
        figures.save(figures.draw_trials(table), "trials", figure, table)
    print(table.to_json(orient="records") if as_json else table.to_string(index=False, float_format="{:.4g}".format))


def claims(
    profile_name: Annotated[str, typer.Option("--profile", help="whose results are read")] = "full",
    out: Annotated[Path | None, typer.Option(help="folder of tables; default: the profile's")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the claims table: the paper's value, ours, and the verdict, computed from stored results.

    \b
    Example:
        fluxlib claims --profile mini
    """
    from fluxlib import records
    from fluxlib.config import REPO_ROOT, ConfigError, results_dir

    known = sorted(file.stem for file in (REPO_ROOT / "config").glob("*.yaml"))
    if out is None and profile_name not in known:
        raise ConfigError(f"--profile is {profile_name!r}, allowed are {', '.join(known)}")
    folder = existing_folder(out) if out else results_dir(profile_name)
    from fluxlib.analysis import claims as judged

    try:
        table = judged.claims(folder)
    except (records.TableError, ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    print(table.to_json(orient="records") if as_json else judged.to_markdown(table))


def doctor(as_json: JsonOption = False) -> None:
    """Check Python, packages, memory, disk, devices, folders, models; say what to do about problems.

    \b
    Example:
        fluxlib doctor
    """
    from fluxlib.app import doctor as checks

    results = checks.examine()
    if as_json:
        print(json.dumps([vars(check) for check in results], indent=2))
    else:
        for check in results:
            print(checks.line(check))
    raise SystemExit(checks.exit_code(results))


def deploy(context: typer.Context) -> None:
    """Certificates, keys, SuperNodes, a demonstration: `fluxlib deploy --help`, docs/deployment.md."""
    from fluxlib.federation.engines.deployment import commands

    commands.main(context.args)
