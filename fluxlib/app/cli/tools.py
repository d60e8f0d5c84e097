"""All but federated runs: memory planned, notebooks executed, results judged, the machine examined."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from fluxlib import records
from fluxlib.app.cli.arguments import JsonOption, OutOption, SetOption, parse_settings
from fluxlib.config import results_dir
from fluxlib.io import ConfigError


def plan(
    model: Annotated[str, typer.Option(help="a known model, a folder, or a hub name")] = "llama-moe-3.5b",
    method: Annotated[str, typer.Option(help="flux, fmd, fmq or fmes")] = "flux",
    memory: Annotated[str | None, typer.Option(help="of the participant's device, such as 24GiB")] = None,
    device: Annotated[str | None, typer.Option(help="a device of the catalogue, instead of --memory")] = None,
    batch: Annotated[int, typer.Option(help="sequences per step")] = 16,
    tokens: Annotated[int, typer.Option(help="tokens per sequence, padding included")] = 512,
    rank: Annotated[int, typer.Option(min=0, help="of low-rank adapters; 0: experts are tuned whole")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Predict a participant's peak memory, and the experts that fit: B_tune and B_non. Needs no weights.

    \b
    Examples:
        fluxlib plan --model deepseek-moe-16b --memory 48GiB
        fluxlib plan --device rtx-3060 --batch 2 --tokens 128 --json
    """
    if memory and device:
        raise ConfigError("--memory and --device say the same thing: give one of them")
    from fluxlib.devices import catalogue
    from fluxlib.devices import memory as planner

    if device is not None and device not in catalogue.DEVICES:
        raise ConfigError(f"--device is {device!r}, allowed are {', '.join(catalogue.DEVICES)}")
    try:
        size = int(catalogue.DEVICES[device].memory_bytes) if device else memory
        found = planner.plan(model, size, method, batch=batch, tokens=tokens, rank=rank)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    print(json.dumps(found.to_dict()) if as_json else found.table())


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
    from fluxlib.app import pipeline

    if not source.is_file():
        known = ", ".join(sorted(file.name for file in source.parent.glob("*.ipynb"))) or "none"
        raise ConfigError(f"no notebook {source}; in its folder: {known}")
    try:
        values = dict(json.loads(parameters))
    except (ValueError, TypeError):
        raise ConfigError(f"--parameters takes one JSON object, got {parameters!r}") from None
    from papermill import PapermillExecutionError

    # What the cells print goes to papermill's logger.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("papermill").setLevel(logging.INFO)
    try:
        pipeline.execute(source, output, values | parse_settings(settings))
    except PapermillExecutionError as error:
        said = f"error: {source.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}"
        print(said, f"the executed copy, with the traceback, is {output}", sep="\n", file=sys.stderr)
        raise SystemExit(1) from None


def trials(out: OutOption = None, as_json: JsonOption = False) -> None:
    """Print the trials of `make reproduce PROFILE=tune`: every setting of every method, and the best of each.

    \b
    Example:
        fluxlib trials --json
    """
    from fluxlib.analysis import search, store

    folder = out or results_dir("tune")
    try:
        rounds = records.read_all("rounds", folder)
        if left := records.unfinished(folder):
            raise ValueError(f"{', '.join(left)} did not finish; run them again, or take them away")
        table = search.trials(rounds, store.configs(folder, rounds["run_id"].unique()))
    except ValueError as error:
        wanted = "a folder of trials, such as `make reproduce PROFILE=tune` writes"
        raise ConfigError(f"no search in {folder}: {error}\nallowed is {wanted} ({results_dir('tune')})") from None
    print(table.to_json(orient="records") if as_json else table.to_string(index=False, float_format="{:.4g}".format))


def claims(
    profile_name: Annotated[str, typer.Option("--profile", help="whose results are read")] = "full",
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the claims table: the paper's value, ours, and the verdict, computed from stored results.

    \b
    Example:
        fluxlib claims --profile mini
    """
    from fluxlib.analysis import claims as judged

    folder = _results(profile_name, out)
    try:
        table = judged.claims(judged.load(folder))
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    print(table.to_json(orient="records") if as_json else judged.to_markdown(table))


def _results(profile_name: str, out: Path | None) -> Path:
    """The folder of a profile's tables, or the one that is given."""
    folder = out or results_dir(profile_name)
    if not folder.is_dir():
        known = ", ".join(sorted(path.name for path in folder.parent.glob("*/")))
        raise ConfigError(f"there are no results in {folder}; allowed for --profile are {known or 'none yet'}")
    return folder


def verify(
    name: Annotated[str, typer.Argument(metavar="CLAIM", help="its short name; a wrong one lists them")],
    profile_name: Annotated[
        str, typer.Option("--profile", help="whose results are read, or whose runs are made")
    ] = "full",
    rerun: Annotated[bool, typer.Option("--rerun", help="from new runs, which are made below build/verify")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="runs side by side, with --rerun")] = os.cpu_count() or 1,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compute one claim anew, from stored tables or from new runs, and say whether it is reproduced.

    It is where the verdict is "agrees"; the exit code is 0 then, and 1 where it is not.

    \b
    Examples:
        fluxlib verify four_bit
        fluxlib verify ahead_of_fmd --profile mini --rerun
    """
    from fluxlib.analysis.claims import judge, load, table
    from fluxlib.app import verify as anew

    begin, known = time.monotonic(), {claim.slug: claim for claim in judge.EVERY}
    if name not in known:
        raise ConfigError(f"claim is {name!r}, allowed are {', '.join(known)}")
    if rerun and out is not None:
        raise ConfigError("--out is a folder of stored tables; --rerun makes its own: give one of them")
    try:
        folder = anew.rerun(known[name], profile_name, jobs) if rerun else _results(profile_name, out)
        found = table.row(known[name], table.read(known[name], load(folder)))
        if rerun and results_dir(profile_name).is_dir():
            before = table.row(known[name], table.read(known[name], load(results_dir(profile_name))))
            found["stored"] = "<br>".join(filter(None, (before["verdict"], before["ours"])))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    reproduced, seconds = found["verdict"] == judge.AGREES, time.monotonic() - begin
    if as_json:
        print(json.dumps(found | {"reproduced": reproduced, "seconds": seconds, "tables": str(folder)}))
    else:
        for title, text in found.items():
            if text:
                print(f"{title:<13}" + text.replace("`", "").replace("<br>", "\n" + 13 * " "))
        print(f"{'' if reproduced else 'not '}reproduced, in {records.span(seconds)}, from {folder}")
    raise SystemExit(not reproduced)


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
        print(*results, sep="\n")
    raise SystemExit(any(check.status == "problem" for check in results))
