"""The ``fluxlib`` command: run one federated run, look after the machine, execute a notebook, list results.

Wrong input ends with one message and exit code 2, a failure on the way with exit code 1.
"""

# Heavy imports live inside the commands, so that --help is quick.

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=__doc__,
)

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="any other parameter; repeat as needed"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for a machine to read")]


def main() -> None:
    """Entry point: turns expected errors into one message and an exit code."""
    from fluxlib.config import ConfigError

    try:
        app()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """``["rounds=3", "epsilon=dynamic"]`` as a dictionary; a value is YAML where it can be, text otherwise.

    Raises:
        ConfigError: an item without ``=``, or a name given twice.
    """
    import yaml

    from fluxlib.config import ConfigError

    found: dict[str, Any] = {}
    for item in settings or []:
        name, separator, text = item.partition("=")
        if not separator or not name:
            raise ConfigError(f"--set takes NAME=VALUE, got {item!r}")
        if name in found:
            raise ConfigError(f"--set {name} is given twice")
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            found[name] = text
    return found


@app.command()
def run(
    method: Annotated[str, typer.Option(help="flux, fmd, ... (a wrong name lists them)")] = "flux",
    model: Annotated[str, typer.Option(help="an embedded mini model, a folder, or a hub name")] = "mini-llama-moe",
    task: Annotated[str, typer.Option(help="mini-gsm8k, ... (a wrong name lists them)")] = "mini-gsm8k",
    rounds: Annotated[int, typer.Option(help="number of rounds")] = 10,
    participants: Annotated[int, typer.Option(help="number of participants")] = 10,
    seed: Annotated[int, typer.Option(help="every source of chance derives from it")] = 0,
    engine: Annotated[str, typer.Option(help="what runs the Flower apps")] = "local",
    data: Annotated[Path | None, typer.Option(help="files of dolly, gsm8k, mmlu or piqa; default: the hub's")] = None,
    out: Annotated[Path, typer.Option(help="folder of the tables")] = Path("build/runs"),
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one federated run, print a line per round, write its tables to --out."""
    from fluxlib.config import ConfigError, check_writable, make_config

    named = {
        "method": method, "model": model, "task": task, "rounds": rounds,
        "participants": participants, "seed": seed, "engine": engine,
    } | ({} if data is None else {"data_path": str(data.resolve())})  # fmt: skip
    more = parse_settings(settings)
    for name in sorted(set(named) & set(more)):
        raise ConfigError(f"{name} is an option of its own: --{name} VALUE")
    config = make_config(named | more)
    check_writable(out)

    from fluxlib import federation

    try:
        result = federation.run(config, on_round=None if as_json else _print_round, out=out)
    except (federation.RunFailed, federation.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if as_json:
        print(json.dumps({"run_id": result.run_id, "path": str(result.path), "last": _last(result.rounds)}))
    else:
        print(f"{result.run_id}: tables in {result.path}")


def _print_round(row: Any) -> None:
    from fluxlib.records import describe_round

    print(describe_round(row), flush=True)


def _last(rounds: Any) -> dict[str, Any]:
    return dict(json.loads(rounds.tail(1).to_json(orient="records"))[0])


@app.command()
def notebook(
    source: Annotated[Path, typer.Argument(help="a notebook of notebooks/")],
    output: Annotated[Path, typer.Argument(help="where the executed copy goes")],
    parameters: Annotated[str, typer.Option(metavar="JSON", help="parameters as one JSON object")] = "{}",
    settings: SetOption = None,
) -> None:
    """Execute a notebook with parameters, as `make reproduce` does; unknown parameters are refused first."""
    from fluxlib import workflow
    from fluxlib.config import ConfigError

    if not source.is_file():
        known = ", ".join(sorted(file.name for file in source.parent.glob("*.ipynb"))) or "none"
        raise ConfigError(f"no notebook {source}; in its folder: {known}")
    try:
        values = json.loads(parameters)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--parameters takes one JSON object, got {parameters!r} ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--parameters takes one JSON object, got {parameters!r}")
    values |= parse_settings(settings)
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


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check Python, packages, memory, disk, devices, folders, models; say what to do about problems."""
    from fluxlib import doctor as checks

    results = checks.examine()
    if as_json:
        print(json.dumps([vars(check) for check in results], indent=2))
    else:
        for check in results:
            print(checks.line(check))
    raise SystemExit(checks.exit_code(results))


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="a known model, a folder, or a hub name")] = "llama-moe-3.5b",
    method: Annotated[str, typer.Option(help="flux, fmd, fmq or fmes")] = "flux",
    memory: Annotated[str | None, typer.Option(help="of the participant's device, such as 24GiB")] = None,
    device: Annotated[str | None, typer.Option(help="a device of the catalogue, instead of --memory")] = None,
    batch: Annotated[int, typer.Option(help="sequences per step")] = 16,
    tokens: Annotated[int, typer.Option(help="tokens per sequence, padding included")] = 512,
    checkpointing: Annotated[bool, typer.Option(help="recompute activations in the backward pass")] = False,
    as_json: JsonOption = False,
) -> None:
    """Predict a participant's peak memory, and the experts that fit: B_tune and B_non. Needs no weights."""
    from fluxlib.config import ConfigError

    if memory and device:
        raise ConfigError("--memory and --device say the same thing: give one of them")
    from fluxlib.devices import catalogue
    from fluxlib.devices import memory as planner

    try:
        size = catalogue.fleet(device, 1)[0].memory_bytes if device else memory
        found = planner.plan(model, size, method, batch=batch, tokens=tokens, checkpointing=checkpointing)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    print(json.dumps(found.to_dict()) if as_json else found.table())


@app.command(name="list")
def list_runs(
    out: Annotated[Path | None, typer.Option(help="folder of tables; default: those of every profile")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs in the store: last round, score, both clocks."""
    from fluxlib import records
    from fluxlib.config import PROFILES, results_dir

    folders = [out] if out else [results_dir(profile) for profile in PROFILES]
    files = [file for folder in folders for file in sorted(folder.glob("rounds/*.parquet"))]
    last = [_last(records.read("rounds", file)) | {"path": str(file)} for file in files]
    if as_json:
        print(json.dumps(last))
        return
    if not last:
        print(f"no runs in {', '.join(map(str, folders))}: `make reproduce` or `fluxlib run` makes some")
    for row in last:
        print(f"{records.describe_round(row)}  {row['path']}")


if __name__ == "__main__":
    main()
