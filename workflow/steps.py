"""What the Snakefile asks of a profile, its notebooks and its models: parameters, what makes a step stale, figures."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fluxlib.app.pipeline import Pipeline, cells, declared_parameters
from fluxlib.config import RunConfig, data_dir
from fluxlib.io import ConfigError

ASIDES = {"by-hand", "try-it"}
"""Tags of cells that a reader may change: nothing that a notebook keeps depends on them."""


def find_figure(name: str, drawn: Sequence[str]) -> str:
    """Which of the figures in ``drawn`` is meant by a number of the paper, or by its own name; else ConfigError."""
    known = yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text())
    shown = {family: known[family].get("paper", "").lower().replace(" ", "") for family in drawn}
    paper = {number: family for family, text in shown.items() for number in re.findall(r"table\d|\d+[a-z]?", text)}
    found = paper.get(name.lower(), name)
    if found not in drawn:
        raise ConfigError(f"FIG is {name!r}, allowed are {', '.join(paper)} (the paper's), {', '.join(drawn)}")
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
