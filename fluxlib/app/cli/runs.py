"""Federated runs: make one, list and compare those that are stored, export what one tuned."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fluxlib import records
from fluxlib.app.cli.arguments import JsonOption, OutOption, SetOption, new_folder, parse_settings
from fluxlib.config import RunConfig, flatten, make_config
from fluxlib.io import ConfigError, brief, check_writable, reading

OPTIONS = {
    "method": "method", "model": "model", "task": "task", "federation.rounds": "rounds",
    "federation.participants": "participants", "seed": "seed", "engine": "engine", "data.path": "data",
}  # fmt: skip
"""Settings that have an option of their own."""


def run(
    method: Annotated[str, typer.Option(help="flux, fmd, ... (a wrong name lists them)")] = "flux",
    model: Annotated[str, typer.Option(help="an embedded mini model, a folder, or a hub name")] = "mini-llama-moe",
    task: Annotated[str, typer.Option(help="mini-gsm8k, ... (a wrong name lists them)")] = "mini-gsm8k",
    rounds: Annotated[int, typer.Option(help="number of rounds")] = 10,
    participants: Annotated[int, typer.Option(help="number of participants")] = 10,
    seed: Annotated[int, typer.Option(help="every source of chance derives from it")] = 0,
    engine: Annotated[str, typer.Option(help="what runs the Flower apps: local, simulation or deployment")] = "local",
    superlink: Annotated[
        str | None, typer.Option(help="deployment: its name in Flower's configuration; default: one started here")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="files of dolly, gsm8k, mmlu or piqa; default: the hub's")] = None,
    out: Annotated[Path, typer.Option(help="folder of the tables")] = Path("build/runs"),
    save: Annotated[Path | None, typer.Option(help="new folder for the tuned model and its card")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a run of the same name in --out")] = False,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one federated run, print a line per round, write its tables to --out.

    A run that was interrupted goes on when the same command is given again. One that is complete, or has other
    settings, is replaced with --overwrite only.

    \b
    Examples:
        fluxlib run --rounds 2 --participants 3 --set data.task_size=400 --set training.local_steps=2
        fluxlib run --method fmd --task mini-mmlu --rounds 10 --save build/models/fmd
    """
    path = None if data is None else str(data.resolve())
    named = dict(zip(OPTIONS, (method, model, task, rounds, participants, seed, engine, path), strict=True))
    more = flatten(parse_settings(settings))
    for name in more.keys() & OPTIONS.keys():
        raise ConfigError(f"{name} is an option of its own: --{OPTIONS[name]} VALUE")
    config = make_config(named | more)
    check_writable(out)
    if save is not None:
        new_folder(save)
    if not overwrite:
        _keep_what_is_there(config, out)

    from fluxlib import federation

    if config.engine == "deployment":  # what is started here ends with this process, however that ends
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    watch = None if as_json else lambda row: print(records.describe_round(row), flush=True)
    try:
        result = federation.run(config, watch, out, superlink)
    except (federation.RunFailed, federation.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if save is not None:
        from fluxlib.app import exports

        exports.save_tuned(result, config, save)
    if as_json:
        saved = {} if save is None else {"saved": str(save)}
        print(json.dumps({"run_id": result.run_id, "path": str(result.path), "last": _last(result.rounds)} | saved))
    else:
        print(f"{result.run_id}: tables in {result.path}" + (f", tuned model in {save}" if save else ""))


def _keep_what_is_there(config: RunConfig, out: Path) -> None:
    """ConfigError, with what would go, where a run of the same name would not go on but be replaced."""
    from fluxlib.analysis import store

    files = out / store.CHECKPOINTS / f"{config.run_id}.safetensors", out / "rounds" / f"{config.run_id}.parquet"
    for file in filter(Path.is_file, files):
        with reading(f"{file} is there and cannot be read; --overwrite replaces it"):
            before, rounds = make_config(store.parameters(file)), len(store.read(file)) - 1
            goes_on = store.is_checkpoint(file) or config.run_id in records.unfinished(out)
        settings = config.settings()
        differing = [f"{name}={value}" for name, value in before.settings().items() if value != settings[name]]
        which = brief(", ".join(differing)) or "the same settings"
        if goes_on and (before.numbers, before.engine) == (config.numbers, config.engine):
            return
        raise ConfigError(
            f"{file} holds {rounds} rounds of {config.run_id} with {which}; "
            "--overwrite replaces them, another --out or --set variant=NAME keeps both"
        )


def _last(rounds: Any) -> dict[str, Any]:
    return dict(json.loads(rounds.tail(1).to_json(orient="records"))[0])


def list_runs(out: OutOption = None, as_json: JsonOption = False) -> None:
    """List the runs in the store: last round, score, both clocks; exit code 1 if one cannot be read.

    \b
    Example:
        fluxlib list --json
    """
    from fluxlib.analysis import store

    folders = [out] if out else store.folders()
    last, broken = [], []
    for file in store.runs(folders).values():
        try:
            last.append(_last(store.read(file)) | {"path": str(file), "unfinished": store.is_checkpoint(file)})
        except records.TableError as error:
            broken.append(f"cannot be read: {error}")
    if as_json:
        print(json.dumps(last))
    elif not last and not broken:
        print(f"no runs in {', '.join(map(str, folders))}: `make reproduce` or `fluxlib run` makes some")
    else:
        for row in last:
            print(f"{records.describe_round(row)}  {row['path']}" + "  unfinished" * row["unfinished"])
    if broken:
        print("\n".join(broken), file=sys.stderr)
        raise SystemExit(1)


def compare(
    runs: Annotated[list[str], typer.Argument(help="run ids, unique parts of one, or paths of tables")],
    target: Annotated[float, typer.Option(help="share of the reference's last score that is to be reached")] = 0.95,
    reference: Annotated[str, typer.Option(help="run that sets the target; default: the best of them")] = "",
    picture: Annotated[Path, typer.Option(help="pdf, png and csv are written under this name")] = Path(
        "build/compare/curves"
    ),
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Curves and time to target of any stored runs, side by side.

    \b
    Examples:
        fluxlib compare flux-mini-llama-moe-mini-mmlu-seed0 fmd-mini-llama-moe-mini-mmlu-seed0
        fluxlib compare flux-mini-llama-moe-mini-mmlu fmd-mini-llama-moe-mini-mmlu --target 0.9 --json
    """
    from fluxlib import figures
    from fluxlib.analysis import store
    from fluxlib.analysis.time_to_target import final_scores, reach

    if not 0 < target <= 1:
        raise ConfigError(f"--target is {target}, allowed is above 0 and at most 1")
    check_writable(picture.parent)
    places = [out] if out else None
    found = store.load(runs, places)
    references = store.load([reference], places) if reference else found
    finals = final_scores(store.as_one(references), final_rounds=1).dropna()
    if finals.empty:
        raise ConfigError("no run with a score sets a target: they were stopped before the first evaluation")
    best, score, every = finals.idxmax(), finals.max(), store.as_one(found)
    times = reach(every, target * score, final_rounds=1)
    times = times[["run_id", "rounds", "best_metric", "final_metric", *times.filter(like="_to_target")]]
    drawn = figures.dashboard.curves(found, target * score)
    try:
        files = figures.save(drawn, picture.name, picture.parent, every)
    except ValueError as error:
        raise ConfigError(f"--picture {picture}: {error}") from None
    if as_json:
        rows = json.loads(times.to_json(orient="records"))
        print(json.dumps({"target": target * score, "reference": best, "runs": rows, "picture": str(files["png"])}))
        return
    print(f"target {target * score:.3f}: {target:.0%} of the last score of {best}")
    print(times.round(3).to_string(index=False, na_rep="not reached"))
    print(f"curves: {files['png']}")


def export(
    source: Annotated[Path, typer.Argument(help="a folder of `fluxlib run --save`, of a run with adapter.kind lora")],
    folder: Annotated[Path, typer.Argument(help="new folder for the adapter")],
    peft: Annotated[bool, typer.Option("--peft", help="in PEFT's format, which is the one there is")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write what a run's adapters learned as an adapter of its base; the whole tuned model is in SOURCE already.

    \b
    Example:
        fluxlib run --rounds 4 --set adapter.kind=lora --save build/models/tuned
        fluxlib export build/models/tuned build/models/adapter --peft
    """
    if not peft:
        raise ConfigError(f"give --peft, the format to write; {source} holds the whole tuned model as it is")
    new_folder(folder)
    from fluxlib.app import exports

    exports.save_adapter(source, folder)
    print(json.dumps({"path": str(folder)}) if as_json else f"adapter in {folder}")
