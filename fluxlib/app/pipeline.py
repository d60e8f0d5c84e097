"""What the pipeline needs beside Snakemake: a profile as a list of runs, and notebooks executed with care.

- :func:`load` reads ``config/<profile>.yaml`` and validates every run in it before any work.
- :func:`execute` runs a notebook through papermill, refusing unknown parameters and unwritable folders first.
- :func:`notebook_digest` and :func:`model_digest` say whether what a run depends on has changed, by content.

Nothing here imports torch: Snakemake reads a profile once per job.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxlib.config import REPO_ROOT, ConfigError, RunConfig, check_writable, data_dir, flatten, make_config

GRID = {"methods": "method", "models": "model", "tasks": "task", "seeds": "seed"}
ASIDES = {"by-hand", "try-it"}
"""Tags of cells that a reader may change: nothing that a notebook keeps depends on them."""
SECTIONS = ("profile", "grid", "run", "per_model", "per_task", "per_method", "variants", "studies")


@dataclass(frozen=True)
class Pipeline:
    """The pipeline as one profile has it: its runs by run id, and the parameters of its study notebooks."""

    name: str
    runs: dict[str, RunConfig]
    studies: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By the notebook's stem, e.g. ``01_profiling``."""

    @property
    def models(self) -> dict[str, str]:
        """The models' names by their last parts, in the order of the file."""
        return {Path(run.model).name: run.model for run in self.runs.values()}


def load(path: Path) -> Pipeline:
    """Read ``config/<profile>.yaml``: a grid, common parameters, what differs per model, task or method.

    A later section wins over an earlier one: ``run``, ``per_model``, ``per_task``, ``per_method``, and a variant's own
    ``run``. A variant is the grid once more, or the part of it that the variant names, with something changed; or a
    list of such parts.

    Raises:
        ConfigError: an unknown section or a bad parameter, by name and run.
    """
    import yaml

    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ConfigError(f"no profile {path.stem!r} in {path.parent}; allowed are {known}")
    content = yaml.safe_load(path.read_text())
    _only("section", content, SECTIONS, path)
    grid = content["grid"]
    _only("grid", grid, tuple(GRID), path)
    runs = _runs(content, grid, {}, path)
    for name, variant in (content.get("variants") or {}).items():
        for part in variant if isinstance(variant, list) else [variant]:
            _only(f"key of variant {name}:", part, (*GRID, "run"), path)
            points = {axis: part.get(axis, grid[axis]) for axis in GRID}
            runs |= _runs(content, points, {"variant": str(name), **(part.get("run") or {})}, path)
    studies = {
        name: _with_data(parameters or {}, "data_path") for name, parameters in (content.get("studies") or {}).items()
    }
    return Pipeline(content["profile"], runs, studies)


def _runs(
    content: dict[str, Any], grid: dict[str, list[Any]], changes: dict[str, Any], path: Path
) -> dict[str, RunConfig]:
    names = GRID.values()
    points = itertools.product(*(grid[axis] for axis in GRID))
    runs = [_configure(content, dict(zip(names, point, strict=True)), changes, path) for point in points]
    return {run.run_id: run for run in runs}


def _configure(content: dict[str, Any], point: dict[str, Any], changes: dict[str, Any], path: Path) -> RunConfig:
    parameters = flatten(content.get("run") or {})
    for axis in ("model", "task", "method"):
        parameters |= flatten((content.get(f"per_{axis}") or {}).get(point[axis]) or {})
    try:
        return make_config(_with_data(parameters) | flatten(changes) | point)
    except ConfigError as error:
        raise ConfigError(f"{path}, run {point | changes}:\n{error}") from None


def _with_data(parameters: dict[str, Any], name: str = "data.path") -> dict[str, Any]:
    """``parameters`` with a folder of data that is right from anywhere: notebooks are executed in their own folder."""
    if not parameters.get(name):
        return parameters
    return parameters | {name: str(Path(parameters[name]).expanduser().resolve())}


def runs_read(profile: Pipeline, study: str, groups: Sequence[str], model: str) -> list[str]:
    """Ids of the runs that a study reads: FLUX's on one model and the study's ``task``, in the variants it names.

    Args:
        groups: parameters of the study, each a mapping from what a variant is called to its name.

    Raises:
        ConfigError: a variant that no run of the profile has.
    """
    settings = profile.studies[study]
    wanted = {variant for group in groups for variant in (settings.get(group) or {}).values()}
    found = {
        run_id: run.variant
        for run_id, run in profile.runs.items()
        if (run.method, Path(run.model).name, run.task) == ("flux", model, settings.get("task"))
    }
    if missing := sorted(wanted - set(found.values())):
        raise ConfigError(f"{study} reads variants {missing}, the profile has {sorted(set(found.values()))}")
    return [run_id for run_id, variant in found.items() if variant in wanted]


def grid_runs(profile: Pipeline, model: str, variants: Sequence[str] = ()) -> list[str]:
    """Ids of the plain runs on one model, every method, task and seed, and of the variants' where the model has them.

    Raises:
        ConfigError: a variant that no run of the profile has.
    """
    if missing := sorted({*variants} - {"", *(run.variant for run in profile.runs.values())}):
        raise ConfigError(f"no run of the profile has the variants {missing}")
    kept = {"", *variants}
    return [run_id for run_id, run in profile.runs.items() if run.variant in kept and Path(run.model).name == model]


def _only(kind: str, content: dict[str, Any], allowed: tuple[str, ...], path: Path) -> None:
    for name in content:
        if name not in allowed:
            raise ConfigError(f"{path}: unknown {kind} {name!r}; allowed are {', '.join(allowed)}")


def cells(notebook: Path) -> list[dict[str, Any]]:
    """The cells of ``notebook``; their sources are joined into one string each.

    Raises:
        ConfigError: a file that is no notebook.
    """
    try:
        content = json.loads(notebook.read_text())
        return [cell | {"source": "".join(cell["source"])} for cell in content["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ConfigError(f"{notebook} is not a notebook: {why}") from None


def declared_parameters(notebook: Path) -> dict[str, Any]:
    """Names and defaults assigned in the cell tagged ``parameters``.

    Raises:
        ConfigError: there is not exactly one such cell, or a default is not a literal.
    """
    tagged = [cell for cell in cells(notebook) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ConfigError(f"{notebook.name} has {len(tagged)} cells tagged 'parameters', allowed is one")
    found: dict[str, Any] = {}
    for statement in ast.parse(tagged[0]["source"]).body:
        if isinstance(statement, ast.Assign):
            target, value = statement.targets[0], statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            target, value = statement.target, statement.value
        else:
            raise ConfigError(f"{notebook.name}: the parameters cell may only assign literals to names")
        if not isinstance(target, ast.Name):
            raise ConfigError(f"{notebook.name}: the parameters cell may only assign to plain names")
        try:
            found[target.id] = ast.literal_eval(value)
        except ValueError:
            raise ConfigError(f"{notebook.name}: default of {target.id!r} is not a literal") from None
    return found


def notebook_parameters(notebook: Path, run: RunConfig) -> dict[str, Any]:
    """``run`` as parameters of ``notebook``: all that it declares by name, and in ``settings`` the rest.

    ``settings`` holds only what is not the library's default. What is declared is always passed, since the
    notebook's own defaults are those of the smoke profile.
    """
    declared, changed = declared_parameters(notebook), run.settings(changed_only=True)
    direct = {full: full.rpartition(".")[2] for full in run.settings() if full.rpartition(".")[2] in declared}
    direct = {full: name for full, name in direct.items() if "." not in full or name not in RunConfig.model_fields}
    settings = {full: value for full, value in changed.items() if full not in direct}
    values = run.settings()
    return {name: values[full] for full, name in direct.items()} | ({"settings": settings} if settings else {})


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Refuse parameters that ``notebook`` does not declare (papermill itself would warn and go on).

    Raises:
        ConfigError: the unknown names and the allowed ones.
    """
    allowed = declared_parameters(notebook)
    unknown = sorted(set(parameters) - set(allowed))
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise ConfigError(f"{notebook.name} has no parameter {names}; allowed are {', '.join(allowed)}")


def check_names(parameters: dict[str, Any]) -> None:
    """Refuse a ``profile``, ``method`` or ``task`` that does not exist, as far as ``parameters`` have them.

    A notebook would find out by itself, after a kernel has started and some cells have run.

    Raises:
        ConfigError: the name, what is allowed and what came.
    """
    allowed: dict[str, Sequence[str]] = {}
    if "profile" in parameters:
        allowed["profile"] = sorted(path.stem for path in (REPO_ROOT / "config").glob("*.yaml"))
    if "method" in parameters:
        from fluxlib import methods

        allowed["method"] = list(methods.METHODS)
    if named := {"task", "task_name"} & parameters.keys():
        from fluxlib import tasks

        allowed |= dict.fromkeys(sorted(named), tasks.TASKS)
    for name, known in allowed.items():
        if parameters[name] not in known:
            raise ConfigError(f"{name} is {parameters[name]!r}, allowed are {', '.join(known)}")


def check_kinds(notebook: Path, parameters: dict[str, Any]) -> None:
    """Refuse text, or no number at all, for a parameter of ``notebook`` that is a number as it stands.

    Raises:
        ConfigError: the name, what is allowed and what came.
    """
    declared = declared_parameters(notebook)
    for name, value in parameters.items():
        default = declared.get(name)
        if isinstance(default, (int, float)) and (not isinstance(value, (int, float)) or value != value):
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise ConfigError(f"{name} is {value!r}, allowed is {kind} (as it stands: {default})")


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Execute ``notebook`` with ``parameters`` and keep the executed copy at ``output``.

    It runs where JupyterLab would run it, in the notebook's own folder: paths in ``parameters`` are absolute.

    Raises:
        ConfigError: unknown parameters, or nowhere to write; nothing has been executed then.
        papermill.PapermillExecutionError: a cell failed; the copy at ``output`` shows which.
    """
    import papermill

    check_parameters(notebook, parameters)
    _check_output(notebook, output)
    with _environment(FLUXLIB_HEADLESS="1"):
        papermill.execute_notebook(
            notebook,
            output,
            parameters=parameters,
            kernel_name="python3",
            cwd=notebook.resolve().parent,
            progress_bar=False,
            log_output=True,
        )


def _check_output(notebook: Path, output: Path) -> None:
    """Refuse a place where the executed copy cannot lie, or where it would take the notebook's own."""
    if output.suffix != ".ipynb" or output.is_dir():
        raise ConfigError(f"the executed copy is to be {output}, allowed is a file that ends in .ipynb")
    if output.resolve() == notebook.resolve():
        raise ConfigError(f"{output} is the notebook itself: give its executed copy another name")
    check_writable(output.resolve().parent)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for the kernels started inside, and put them back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def notebook_digest(notebook: Path) -> str:
    """Digest of the code cells of ``notebook``, asides left out: no run becomes stale by prose or an example."""
    kept = [cell for cell in cells(notebook) if not ASIDES & set(cell.get("metadata", {}).get("tags", []))]
    code = [cell["source"] for cell in kept if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def model_digest(name: str) -> str:
    """Digest of an embedded base model's files; models from elsewhere are known by name only."""
    folder = data_dir() / "models" / name
    digest = hashlib.sha256(name.encode())
    for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def strangers(results: Path, profile: Pipeline) -> list[Path]:
    """Tables in ``results`` of runs that ``profile`` does not list (any more): they would be drawn with the others."""
    found = sorted(results.glob("rounds/*.parquet"))
    return [path for path in found if path.stem not in profile.runs]
