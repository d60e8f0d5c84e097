"""The ``fluxlib`` command: run, compare and export federated runs, profile a model, plan memory, execute notebooks.

Wrong input ends with one message and exit code 2, a failure on the way with exit code 1. Every command that gives
results gives them as JSON too, with ``--json``.
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
PictureOption = Annotated[Path, typer.Option(help="pdf, png and csv are written under this name")]
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
    engine: Annotated[str, typer.Option(help="what runs the Flower apps: local, simulation or deployment")] = "local",
    superlink: Annotated[
        str | None, typer.Option(help="deployment: its name in Flower's configuration; default: one started here")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="files of dolly, gsm8k, mmlu or piqa; default: the hub's")] = None,
    out: Annotated[Path, typer.Option(help="folder of the tables")] = Path("build/runs"),
    save: Annotated[Path | None, typer.Option(help="new folder for the tuned model and its card")] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one federated run, print a line per round, write its tables to --out.

    A run that was interrupted goes on when the same command is given again.

    \b
    Examples:
        fluxlib run --rounds 2 --participants 3 --set task_size=400 --set local_steps=2
        fluxlib run --method fmd --task mini-mmlu --rounds 10 --save build/models/fmd
    """
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
    if save is not None:
        _new_folder(save)

    from fluxlib import federation

    try:
        result = federation.run(config, on_round=None if as_json else _print_round, out=out, superlink=superlink)
    except (federation.RunFailed, federation.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if save is not None:
        from fluxlib import exports

        exports.save_tuned(result, config, save)
    if as_json:
        saved = {} if save is None else {"saved": str(save)}
        print(json.dumps({"run_id": result.run_id, "path": str(result.path), "last": _last(result.rounds)} | saved))
    else:
        print(f"{result.run_id}: tables in {result.path}" + (f", tuned model in {save}" if save else ""))


def _new_folder(folder: Path) -> None:
    """Refuse a folder with something in it, before hours of work."""
    from fluxlib.config import ConfigError, check_writable

    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: a model is written to a new folder")
    check_writable(folder)


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
    """Execute a notebook with parameters, as `make reproduce` does; unknown parameters and names are refused first.

    \b
    Example:
        fluxlib notebook notebooks/00_start_here.ipynb build/start.ipynb --set task_name=mini-piqa
    """
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
    by_hand = parse_settings(settings)
    workflow.check_names(by_hand)
    values |= by_hand
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


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def deploy(context: typer.Context) -> None:
    """Certificates, keys, SuperNodes, a demonstration: `fluxlib deploy --help`, docs/deployment.md."""
    from fluxlib.federation.deployment import commands

    commands.main(context.args)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check Python, packages, memory, disk, devices, folders, models; say what to do about problems.

    \b
    Example:
        fluxlib doctor
    """
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
    """Predict a participant's peak memory, and the experts that fit: B_tune and B_non. Needs no weights.

    \b
    Examples:
        fluxlib plan --model deepseek-moe-16b --memory 48GiB
        fluxlib plan --device rtx-3060 --batch 2 --tokens 128 --json
    """
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
    out: Annotated[Path | None, typer.Option(help="folder of tables; default: every profile's, build/runs")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs in the store: last round, score, both clocks; exit code 1 if one cannot be read.

    \b
    Example:
        fluxlib list --json
    """
    from fluxlib import records, store

    folders = [_existing(out)] if out else store.folders()
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


def _existing(folder: Path) -> Path:
    from fluxlib.config import ConfigError

    if not folder.is_dir():
        raise ConfigError(f"--out is {folder}, which is no folder")
    return folder


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="run ids, unique parts of one, or paths of tables")],
    target: Annotated[float, typer.Option(help="share of the reference's last score that is to be reached")] = 0.95,
    reference: Annotated[str, typer.Option(help="run that sets the target; default: the best of them")] = "",
    picture: PictureOption = Path("build/compare/curves"),
    out: Annotated[Path | None, typer.Option(help="folder of tables; default: every profile's, build/runs")] = None,
    as_json: JsonOption = False,
) -> None:
    """Curves and time to target of any stored runs, side by side.

    \b
    Examples:
        fluxlib compare flux-mini-llama-moe-mini-mmlu-seed0 fmd-mini-llama-moe-mini-mmlu-seed0
        fluxlib compare flux-mini-llama-moe-mini-mmlu fmd-mini-llama-moe-mini-mmlu --target 0.9 --json
    """
    from fluxlib import store
    from fluxlib.config import ConfigError

    if not 0 < target <= 1:
        raise ConfigError(f"--target is {target}, allowed is above 0 and at most 1")
    places = [_existing(out)] if out else None
    found = store.load(runs, places)
    best, score = store.best_final(store.load([reference], places) if reference else found)
    _check_picture(picture)

    from fluxlib import figures

    times = figures.compare_runs(found, target * score)
    drawn = figures.curves(found, target=target * score)
    files = figures.save(drawn, picture.name, picture.parent, store.as_one(found))
    if as_json:
        rows = json.loads(times.to_json(orient="records"))
        answer = {"target": target * score, "reference": best, "runs": rows, "picture": str(files["png"])}
        print(json.dumps(answer))
        return
    print(f"target {target * score:.3f}: {target:.0%} of the last score of {best}")
    print(times.drop(columns=["target"]).round(3).to_string(index=False, na_rep="not reached"))
    print(f"curves: {files['png']}")


def _check_picture(picture: Path) -> None:
    """Refuse a picture that cannot be written, before anything is computed for it."""
    from fluxlib.config import ConfigError, check_writable
    from fluxlib.figures.canvas import check_slug

    check_writable(picture.parent)
    try:
        check_slug(picture.name)
    except ValueError as error:
        raise ConfigError(f"--picture {picture}: {error}") from None


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="a mini model, a folder, or a hub name of any MoE model")],
    text: Annotated[Path, typer.Argument(help="a text file: what the model is to read")],
    bits: Annotated[int, typer.Option(help="of the experts meanwhile: 2, 3, 4, 8; 16: as they are")] = 16,
    tokens: Annotated[int, typer.Option(help="tokens per sample")] = 128,
    samples: Annotated[int, typer.Option(help="at most so many samples are read")] = 64,
    picture: PictureOption = Path("build/profile/activation"),
    as_json: JsonOption = False,
) -> None:
    """Which experts of any MoE model a text uses: a table by layer, and a picture.

    \b
    Example:
        fluxlib profile mini-llama-moe README.md --bits 4
    """
    from fluxlib.config import ConfigError

    if not text.is_file():
        raise ConfigError(f"no file {text}")
    if tokens < 1 or samples < 1:
        raise ConfigError(f"--tokens and --samples must be at least 1, got {tokens} and {samples}")
    _check_picture(picture)
    from fluxlib import exhibits, figures, models

    try:
        loaded, tokenizer = models.load(model)
        batches = exhibits.text_batches(text.read_text(errors="replace"), tokenizer, tokens, samples)
        with typer.progressbar(batches, label="reading", file=sys.stderr) as shown:
            found = exhibits.profile_table(loaded, shown, bits)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    files = figures.save(figures.activation(found.frequency), picture.name, picture.parent, found.by_expert)
    if as_json:
        rows = json.loads(found.by_layer.to_json(orient="records"))
        print(json.dumps({"model": model, "tokens": found.num_tokens, "layers": rows, "picture": str(files["png"])}))
        return
    print(f"{model}: {found.num_tokens} tokens of {text}, experts in {bits} bit")
    print(found.by_layer.round(3).to_string(index=False))
    print(f"picture: {files['png']}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="a folder of `fluxlib run --save`")],
    folder: Annotated[Path, typer.Argument(help="new folder for the compact model")],
    participant: Annotated[int, typer.Option(help="for whose data and budget")] = 0,
    tune: Annotated[float | None, typer.Option(help="share of experts kept unmerged; default: the run's")] = None,
    merge: Annotated[float | None, typer.Option(help="merged slots, as a share; default: the run's")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a participant's compact model of a tuned one, and measure it beside the full one.

    \b
    Example:
        fluxlib run --rounds 4 --save build/models/tuned
        fluxlib export build/models/tuned build/models/participant-0 --participant 0
    """
    _new_folder(folder)
    from fluxlib import exports

    report = exports.save_participant(source, folder, participant, tune, merge)
    print(json.dumps(report.to_dict()) if as_json else report.table())


@app.command()
def trials(
    out: Annotated[Path | None, typer.Option(help="folder of tables; default: those of the profile tune")] = None,
    figure: Annotated[Path | None, typer.Option(help="folder for trials.{pdf,png,csv}")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the trials of `make reproduce PROFILE=tune`: every setting of every method, and the best of each."""
    from fluxlib import records
    from fluxlib.config import ConfigError, check_writable, results_dir

    folder = out or results_dir("tune")
    try:
        rounds = records.read_all("rounds", folder)
        parameters = {
            run: json.loads((folder / "rounds" / f"{run}.json").read_text())["parameters"]
            for run in rounds["run_id"].unique()
        }
        from fluxlib import figures

        table = figures.trials(rounds, parameters)
    except (records.TableError, ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    if figure is not None:
        figures.save(figures.draw_trials(table), "trials", check_writable(figure), table)
    print(table.to_json(orient="records") if as_json else table.to_string(index=False, float_format="{:.4g}".format))


@app.command()
def claims(
    profile_name: Annotated[str, typer.Option("--profile", help="whose results are read")] = "full",
    out: Annotated[Path | None, typer.Option(help="folder of tables; default: the profile's")] = None,
    readme: Annotated[Path | None, typer.Option(help="page whose generated sections are replaced")] = None,
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
        raise ConfigError(f"no profile {profile_name!r}; allowed are {', '.join(known)}")
    folder = _existing(out) if out else results_dir(profile_name)
    from fluxlib import claims as judged
    from fluxlib import pages

    try:
        table = judged.claims(folder)
    except (records.TableError, ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    if readme is not None:
        for name, text in judged.page_sections(folder).items():
            pages.replace(readme, name, text)
    print(table.to_json(orient="records") if as_json else judged.to_markdown(table))


if __name__ == "__main__":
    main()
