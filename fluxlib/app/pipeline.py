"""What the pipeline needs beside Snakemake: a profile as a list of runs, and notebooks executed with care.

Loading a profile imports no torch: Snakemake reads it once per job.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError

from fluxlib.config import REPO_ROOT, RunConfig, data_dir, flatten, make_config
from fluxlib.io import ConfigError, check_writable, reading

AXES = ("model", "task", "method")
"""What a profile may say of by ``per_<axis>``; a later one wins."""
HEADLESS = "FLUXLIB_HEADLESS"
"""Environment variable that says nobody watches; :func:`execute` sets it for its kernels."""


class _Grid(BaseModel, extra="forbid"):
    methods: list[str]
    models: list[str]
    tasks: list[str]
    seeds: list[int]


class _Part(BaseModel, extra="forbid"):
    """Part of the grid, or all of it, with something changed."""

    methods: list[str] | None = None
    models: list[str] | None = None
    tasks: list[str] | None = None
    seeds: list[int] | None = None
    run: dict[str, Any] = {}


_Parts = Annotated[list[_Part], BeforeValidator(lambda given: given if isinstance(given, list) else [given])]


class _Profile(BaseModel, extra="forbid"):
    """A file of ``config/``; of its settings a later section wins over an earlier one, and a variant's over all."""

    profile: str
    grid: _Grid
    run: dict[str, Any] = {}
    per_model: dict[str, dict[str, Any]] = {}
    per_task: dict[str, dict[str, Any]] = {}
    per_method: dict[str, dict[str, Any]] = {}
    variants: dict[str, _Parts] = {}
    studies: dict[str, dict[str, Any]] = {}


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


def load(path: Path, overlay: Path | None = None) -> Pipeline:
    """Read ``config/<profile>.yaml``: a grid, common parameters, what differs per model, task or method, variants.

    ``overlay``: a file of the same form, which may lack anything; what it says wins. ConfigError: an unknown section, a
    bad value or a name that no run has, by section; a bad parameter, by run.
    """
    text, where = _read(path), str(path)
    if overlay is not None:
        text, where = _laid_over(text, _read(overlay)), f"{path} under {overlay}"
    try:
        content = _Profile.model_validate(text)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_explain(item)}" for item in error.errors())) from None
    grid, points, runs = content.grid.model_dump(), [], {}
    for variant, parts in {"": [_Part()], **content.variants}.items():
        for part in parts:
            axes = grid | part.model_dump(include=set(grid), exclude_none=True)
            for values in itertools.product(*axes.values()):
                point = dict(zip(("method", "model", "task", "seed"), values, strict=True)) | {"variant": variant}
                points.append(point)
                given = flatten(content.run)
                for axis in AXES:
                    given |= flatten(getattr(content, f"per_{axis}").get(point[axis], {}))
                folder = Path(point["model"]).expanduser()  # named by its whole path: right from anywhere
                placed = point | ({"model": str(folder.resolve())} if folder.is_dir() else {})
                try:
                    run = make_config(_with_data(given) | flatten(part.run) | placed)
                except ConfigError as error:
                    raise ConfigError(f"{where}, run {point | part.run}:\n{error}") from None
                runs[run.run_id] = run
    for axis in AXES:
        used = {point[axis] for point in points}
        if unused := sorted(getattr(content, f"per_{axis}").keys() - used):
            raise ConfigError(f"{where}: per_{axis} names {', '.join(unused)}; the runs have {', '.join(sorted(used))}")
    studies = {name: _with_data(parameters, "data_path") for name, parameters in content.studies.items()}
    return Pipeline(content.profile, runs, studies)


def _read(path: Path) -> Any:
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ConfigError(f"no profile {path.stem!r} in {path.parent}; allowed are {known}")
    with reading(str(path)):
        return yaml.safe_load(path.read_text())


def _laid_over(below: Any, above: Any) -> Any:
    """What ``above`` says, and ``below`` where it says nothing: mappings are merged, all else is replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {name: _laid_over(below.get(name), value) for name, value in above.items()}


def _explain(item: Any) -> str:
    where = ".".join(map(str, item["loc"])) or "the profile"
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg']}, got {item['input']!r}"
    inside = _Profile if len(item["loc"]) == 1 else _Grid if item["loc"][0] == "grid" else _Part
    return f"unknown section {where!r}; allowed are {', '.join(inside.model_fields)}"


def _with_data(parameters: dict[str, Any], name: str = "data.path") -> dict[str, Any]:
    """``parameters`` with a folder of data that is right from anywhere: notebooks are executed in their own folder."""
    if not parameters.get(name):
        return parameters
    return parameters | {name: str(Path(parameters[name]).expanduser().resolve())}


def runs_read(profile: Pipeline, model: str, variants: Iterable[str]) -> list[str]:
    """Ids of all runs on one model of these ``variants`` (``""``: plain); ConfigError: no run has one of them."""
    wanted, known = set(variants), {run.variant for run in profile.runs.values()}
    if missing := sorted(wanted - known):
        raise ConfigError(f"no run of the profile has the variants {missing}; it has {sorted(known)}")
    return [key for key, run in profile.runs.items() if run.variant in wanted and Path(run.model).name == model]


def cells(notebook: Path) -> list[dict[str, Any]]:
    """The cells of ``notebook``, sources joined into one string each; ConfigError: a file that is no notebook."""
    with reading(f"{notebook} is not a notebook"):
        content = json.loads(notebook.read_text())
        return [cell | {"source": "".join(cell["source"])} for cell in content["cells"]]


def declared_parameters(notebook: Path) -> dict[str, Any]:
    """Names and defaults assigned in the one cell tagged ``parameters``; ConfigError: none, several, or no literals."""
    tagged = [cell for cell in cells(notebook) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ConfigError(f"{notebook.name} has {len(tagged)} cells tagged 'parameters', allowed is one")
    found: dict[str, Any] = {}
    for line in ast.parse(tagged[0]["source"]).body:
        try:
            target = line.targets[0] if isinstance(line, ast.Assign) else line.target  # type: ignore[attr-defined]
            found[cast("ast.Name", target).id] = ast.literal_eval(line.value)  # type: ignore[attr-defined]
        except (AttributeError, ValueError):
            wrong = ast.unparse(line)
            raise ConfigError(f"{notebook.name}: the parameters cell may only give literals to names, not {wrong!r}"
                              ) from None  # fmt: skip
    return found


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """ConfigError for parameters that ``notebook`` does not declare (papermill goes on), and text for a number."""
    declared = declared_parameters(notebook)
    if unknown := sorted(parameters.keys() - declared.keys()):
        names = ", ".join(map(repr, unknown))
        raise ConfigError(f"{notebook.name} has no parameter {names}; allowed are {', '.join(declared)}")
    for name, value in parameters.items():
        default = declared[name]
        if isinstance(default, (int, float)) and (not isinstance(value, (int, float)) or value != value):
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise ConfigError(f"{name} is {value!r}, allowed is {kind} (as it stands: {default})")


def _check_names(parameters: dict[str, Any]) -> None:
    """ConfigError for a profile, method, task or model that does not exist, before a kernel has started.

    A method's or an embedded model's file is enough: asking the registries imports torch, which takes seconds.
    """
    from fluxlib import tasks

    profiles = sorted(path.stem for path in (REPO_ROOT / "config").glob("*.yaml"))
    allowed: dict[str, Sequence[str]] = {"profile": profiles, "task": tasks.TASKS, "task_name": tasks.TASKS}
    if "method" in parameters and not (REPO_ROOT / "fluxlib" / "methods" / f"{parameters['method']}.py").is_file():
        from fluxlib.methods import METHODS

        allowed["method"] = list(METHODS)
    for name, known in allowed.items():
        if name in parameters and parameters[name] not in known:
            raise ConfigError(f"{name} is {parameters[name]!r}, allowed are {', '.join(known)}")
    for name in {"model", "model_name"} & parameters.keys():
        if (data_dir() / "models" / str(parameters[name]) / "config.json").is_file():
            continue
        from fluxlib import models

        try:
            models.config(parameters[name])
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name}: {error}") from None


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Execute ``notebook`` with ``parameters`` and keep the executed copy at ``output``.

    It runs where JupyterLab would run it, in the notebook's own folder: paths in ``parameters`` are absolute.

    Raises:
        ConfigError: unknown parameters, or nowhere to write; nothing has been executed then.
        papermill.PapermillExecutionError: a cell failed; the copy at ``output`` shows which.
    """
    check_parameters(notebook, parameters)
    if output.suffix != ".ipynb" or output.is_dir():
        raise ConfigError(f"the executed copy is to be {output}, allowed is a file that ends in .ipynb")
    if output.resolve() == notebook.resolve():
        raise ConfigError(f"{output} is the notebook itself: give its executed copy another name")
    check_writable(output.resolve().parent)
    _check_names(parameters)
    import papermill

    os.environ[HEADLESS] = "1"  # for the kernel
    papermill.execute_notebook(
        notebook,
        output,
        parameters=parameters,
        kernel_name="python3",
        cwd=notebook.resolve().parent,
        progress_bar=False,
        log_output=True,
    )
