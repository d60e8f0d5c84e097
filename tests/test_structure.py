"""What the design fixes about the shape of the code and of the notebooks."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import steps

from fluxlib.app import pipeline
from fluxlib.config import REPO_ROOT, make_config

PACKAGE = REPO_ROOT / "fluxlib"
NOTEBOOKS = sorted((REPO_ROOT / "notebooks").glob("*.ipynb"))
PROFILES = sorted((REPO_ROOT / "config").glob("*.yaml"))

# A module may import from its own layer's earlier names and from every layer above it.
LAYERS = (
    ("io", "config", "seeding", "records"),
    ("moe",),
    ("models",),
    ("tasks",),
    ("profiling", "merging", "gradients", "roles"),
    ("methods",),
    ("devices",),
    ("federation",),
    ("analysis",),
    ("figures",),
    ("app",),
)
ORDER = [name for layer in LAYERS for name in layer]
CORE = [name for layer in LAYERS[:7] for name in layer]

MAX_CELL_LINES = 25


def top_name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def library_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_parts(path: Path) -> set[str]:
    """First parts below ``fluxlib`` that ``path`` imports, at its top or inside a function."""
    found: set[str] = set()
    package = path.relative_to(REPO_ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) + 1 - node.level]) if node.level else []
            base += [node.module] if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("fluxlib.")}
    return found


def test_every_part_of_the_library_has_its_place():
    assert sorted({top_name(path) for path in library_files()} - set(ORDER)) == []


@pytest.mark.parametrize("path", library_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards_only(path):
    place = ORDER.index(top_name(path))
    wrong = [name for name in imported_parts(path) if name in ORDER and ORDER.index(name) > place]
    assert not wrong, f"{path.relative_to(REPO_ROOT)} imports {wrong}, which come later in LAYERS"


def modules() -> dict[str, Path]:
    """Every module of the library by its dotted name; a package is its ``__init__``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(REPO_ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_modules(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the library that ``path`` imports, at its top or inside a function, type checking aside."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    aside = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    ignored = {id(inner) for node in aside for inner in ast.walk(node)}
    found: set[str] = set()
    for node in (node for node in ast.walk(tree) if id(node) not in ignored):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return {module for module in found if module in known and module != name}


def test_no_import_goes_in_a_circle():
    known = modules()
    waiting = {name: imported_modules(name, path, known) for name, path in known.items()}
    while ready := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in ready:
            del waiting[name]
    while outside := waiting.keys() - set().union(*waiting.values()):  # they import a circle, none imports them
        for name in outside:
            del waiting[name]
    assert not waiting, f"these import each other: {sorted(waiting)}"


def test_the_numerical_core_needs_torch_transformers_and_numpy_alone():
    """Import it with everything else made unimportable, in an interpreter of its own."""
    modules = [name for name in CORE if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()]
    blocked = ["flwr", "bitsandbytes", "papermill", "ipywidgets", "matplotlib", "pandas", "pyarrow", "sklearn"]
    code = (
        "import sys, importlib\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {modules!r}: importlib.import_module('fluxlib.' + name)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", library_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_left_over_or_pickled(path):
    text = path.read_text()
    for pattern in (r"\b(TODO|FIXME|XXX|HACK)\b", r"NotImplementedError", r"import pickle"):
        assert not re.search(pattern, text), pattern
    assert not re.search(r"torch\.load\((?!.*weights_only=True)", text)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def notebook(request) -> dict:
    return json.loads(request.param.read_text()) | {"path": request.param}


def test_a_notebook_stores_no_outputs(notebook):
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")
    assert "widgets" not in notebook["metadata"]


def test_a_notebook_names_a_kernel_that_papermill_finds(notebook):
    kernel = notebook["metadata"]["kernelspec"]
    assert (kernel["name"], kernel["language"]) == ("python3", "python")


def test_a_notebook_has_one_cell_of_literal_parameters_early_on(notebook):
    assert pipeline.declared_parameters(notebook["path"])
    tagged = [i for i, c in enumerate(notebook["cells"]) if "parameters" in c["metadata"].get("tags", [])]
    assert tagged[0] <= 4


def test_every_parameter_says_what_it_is(notebook):
    cell = next(c for c in pipeline.cells(notebook["path"]) if "parameters" in c["metadata"].get("tags", []))
    for line in cell["source"].splitlines():
        if re.match(r"\w+.*=", line):
            assert "#" in line, f"no comment with unit or choices: {line}"


def test_code_cells_are_short_and_define_nothing(notebook):
    from_scratch = notebook["path"].stem == "09_from_scratch"  # it does without the library
    for cell in pipeline.cells(notebook["path"]):
        if cell["cell_type"] == "code":
            assert len(cell["source"].splitlines()) <= MAX_CELL_LINES, cell["source"][:80]
            defines = re.search(r"^(def|class|async def) ", cell["source"], re.M)
            assert from_scratch or not defines, cell["source"][:80]


def test_a_notebook_is_half_prose_and_begins_with_a_title(notebook):
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[0] == "markdown"
    assert "".join(notebook["cells"][0]["source"]).startswith("# ")
    assert kinds.count("markdown") >= 0.35 * len(kinds)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_names_runs_that_exist(path):
    from fluxlib import methods, models, tasks
    from fluxlib.devices import catalogue

    profile = pipeline.load(path)
    assert profile.name == path.stem
    assert len(profile.runs) == len({run.model_dump_json() for run in profile.runs.values()})
    for run in profile.runs.values():
        assert run.method in methods.METHODS
        assert run.task in tasks.TASKS
        assert models.config(run.model).model_type in ("llama_moe", "deepseek")
        assert run.clock.model == "self" or run.clock.model in models.known()
        assert catalogue.fleet(run.clock.fleet, run.federation.participants) and catalogue.link(run.clock.link)


def test_every_profile_fits_the_notebook_that_runs_it():
    notebook = REPO_ROOT / "notebooks" / "04_federated_run.ipynb"
    for path in PROFILES:
        for run in pipeline.load(path).runs.values():
            parameters = steps.notebook_parameters(notebook, run)
            pipeline.check_parameters(notebook, parameters)
            federation = {name: parameters.pop(name) for name in ("rounds", "participants")}
            assert make_config(parameters.pop("settings", {}) | parameters | {"federation": federation}) == run


def test_the_smoke_profile_has_the_defaults_of_the_run_notebook_or_less():
    notebook = REPO_ROOT / "notebooks" / "04_federated_run.ipynb"
    first = next(iter(pipeline.load(REPO_ROOT / "config" / "smoke.yaml").runs.values()))
    wanted = steps.notebook_parameters(notebook, first)
    declared = pipeline.declared_parameters(notebook)
    smoke, own = wanted.pop("settings"), declared["settings"]
    assert {name: declared[name] for name in wanted} == wanted
    assert all(smoke[name] <= own[name] for name in own)


def test_tracked_files_are_small_and_no_pins_stand_elsewhere():
    listed = subprocess.run(["git", "ls-files"], cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    for name in listed.stdout.split():
        path = REPO_ROOT / name
        assert not path.is_file() or path.stat().st_size <= 12_000_000, name
    assert "==" not in (REPO_ROOT / "environment.yml").read_text()
    assert "==" not in (REPO_ROOT / "pyproject.toml").read_text()


def test_nothing_of_flower_but_its_public_modules_is_imported() -> None:
    public = {"app", "clientapp", "serverapp", "simulation"}
    found = {
        (path.name, part)
        for path in library_files()
        for part in re.findall(r"\bflwr\.(\w+)[\w.]* import", path.read_text())
    }
    assert {part for _, part in found} <= public, found
