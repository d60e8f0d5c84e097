"""The store of runs: which there are, and finding one by what a person would type.

A run is named by the file of its ``rounds`` table. One that was stopped or killed is in the store too, with the rounds
it finished: they are in its checkpoint, a safetensors file from which the same configuration goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open

from fluxlib import records
from fluxlib.config import PROFILES, REPO_ROOT, RunConfig, make_config, results_dir
from fluxlib.io import ConfigError, reading, shown

CHECKPOINTS = "checkpoints"
SEARCH = "tune"
"""The profile whose runs are trials of settings."""
LISTED = 12
"""Runs that a message names, at most."""
HOW = "give a run id, a unique part of one, or a path"


def folders(trials: bool = True) -> list[Path]:
    """Where runs lie unless somebody says otherwise: every profile's results, ``build/runs``, ``build/explore``.

    ``trials``: those of the search too, which are many and have settings that nobody would choose.
    """
    build, profiles = REPO_ROOT / "build", [profile for profile in PROFILES if trials or profile != SEARCH]
    return [*(results_dir(profile) for profile in profiles), build / "runs", build / "explore"]


def runs(places: Sequence[Path] | None = None) -> dict[str, Path]:
    """Tables of ``rounds`` in ``places``, by a label that says which run it is, where it lies, whether it may go on.

    A file is called as its run is. Of an unfinished run it is the newer of the table in its checkpoint and the one
    written when it ended.
    """
    places = list({place.resolve(): place for place in (folders() if places is None else places)}.values())
    found: dict[str, Path] = {}
    for place, title in zip(places, _place_names(places), strict=True):
        written = {file.stem: file for file in place.glob("rounds/*.parquet")}
        kept = {file.stem: file for file in place.glob(f"{CHECKPOINTS}/*.safetensors")}
        for name in sorted({*written, *kept}):
            files = [files[name] for files in (written, kept) if name in files]
            found[f"{name}  ({title}{', unfinished' if name in kept else ''})"] = max(files, key=modified)
    return found


def place_of(file: Path) -> Path:
    """The folder of runs that a table of :func:`runs` lies in."""
    return file.parent.parent


def is_checkpoint(file: Path) -> bool:
    """Whether a table of :func:`runs` is part of a checkpoint, not of the results."""
    return file.suffix == ".safetensors"


def modified(file: Path) -> float:
    """When ``file`` was written, in seconds; 0 if it is gone."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def read(file: Path, table: str = "rounds") -> pd.DataFrame:
    """The ``table`` of the run whose ``rounds`` are in ``file``; TableError: there is none that fits the schema."""
    with reading(f"no {table!r} table of {file}", records.TableError):
        if is_checkpoint(file):
            rows = _mapping(_beside(file).get("rows")).get(table)
            if rows is None:
                raise records.TableError("its checkpoint cannot be read")
            frame = pd.DataFrame(rows, columns=[column.name for column in records.columns(table)])
            found = records.validate(table, frame).to_pandas()
        else:
            found = records.read(table, file if table == "rounds" else place_of(file) / table / file.name)
    if table == "rounds" and found.empty:
        raise records.TableError(f"{file}: no round in it")
    return found


def parameters(file: Path) -> dict[str, Any]:
    """The configuration of the run whose ``rounds`` are in ``file``, as it was stored; empty where none was."""
    return _mapping(_beside(file).get("config" if is_checkpoint(file) else "parameters"))


def _beside(file: Path) -> dict[str, Any]:
    """The JSON object beside a run's tables; empty where there is none: it may be half written, or not ours."""
    try:
        if is_checkpoint(file):
            with safe_open(file, "np") as opened:
                text = (opened.metadata() or {}).get("about", "{}")
        else:
            text = file.with_suffix(".json").read_text()
        return _mapping(json.loads(text))
    except (OSError, ValueError, SafetensorError):
        return {}


def _mapping(found: object) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def configs(folder: Path, run_ids: Iterable[str]) -> dict[str, RunConfig]:
    """The configuration of each of the runs whose results are in ``folder``; ConfigError: it cannot be read."""
    found = {}
    for run in run_ids:
        stored = parameters(Path(folder) / "rounds" / f"{run}.parquet")
        if not stored:
            raise ConfigError(f"{run} does not say its settings")
        found[run] = make_config(stored)
    return found


def finished(folder: Path, table: str) -> pd.DataFrame | None:
    """The ``table`` of all runs in ``folder`` that finished; None where there are none."""
    if not any((folder / table).glob("*.parquet")):
        return None
    rows = records.read_all(table, folder)
    kept = rows[~rows["run_id"].isin(list(records.unfinished(folder)))].reset_index(drop=True)
    return kept if len(kept) else None


def find(name: str, places: Sequence[Path] | None = None) -> Path:
    """The table that ``name`` means: a file, a folder with one run, a run id, or any part of one that is unique.

    ConfigError: no such run, or several; the message lists what there is.
    """
    path = Path(name)
    if not name.strip():
        raise ConfigError(f"the name of a run is empty; {HOW}")
    is_folder = os.path.isdir(path)  # a name that no file can have is none, and no error
    if path.suffix in (".parquet", ".safetensors") and os.path.isfile(path):
        return path
    known = runs([path]) if is_folder else runs(places)
    exact = [file for file in known.values() if file.stem == name]
    matching = list(known.values()) if is_folder else exact or [file for label, file in known.items() if name in label]
    if len(matching) == 1:
        return matching[0]
    if not known:
        raise ConfigError(f"{shown(name)} is no run; {HOW}. There are none: `fluxlib run` makes some")
    files = matching or sorted(known.values(), key=lambda file: -SequenceMatcher(None, name, file.stem).ratio())
    listed = "".join(f"\n  {_shown(file)}" for file in files[:LISTED])
    listed += f"\n  and {len(files) - LISTED} more: `fluxlib list`" if len(files) > LISTED else ""
    said = f"means {len(matching)} runs; {HOW}. They are" if matching else f"is no run; {HOW}. Nearest to it"
    raise ConfigError(f"{shown(name)} {said}:{listed}")


def load(names: Sequence[str], places: Sequence[Path] | None = None) -> dict[str, pd.DataFrame]:
    """The ``rounds`` of ``names``, by run id, with the folder where two are the same; ConfigError as :func:`find`,
    TableError as :func:`read`."""
    files = [find(name, places) for name in names]
    if twice := [file for file in files if files.count(file) > 1]:
        raise ConfigError(f"{twice[0]} is named twice")
    labels = tell_apart([file.stem for file in files], files)
    return {label: read(file) for label, file in zip(labels, files, strict=True)}


def tell_apart(labels: Iterable[str], files: Sequence[Path]) -> list[str]:
    """``labels`` of ``files``; those that are the same say where the run lies, and its file if need be."""
    places, labels = list(dict.fromkeys(map(place_of, files))), list(labels)
    named = dict(zip(places, _place_names(places), strict=True))
    for tells in (lambda file: named[place_of(file)], _shown):
        both = zip(labels, files, strict=True)
        labels = [label if labels.count(label) == 1 else f"{label} ({tells(file)})" for label, file in both]
    return labels


def _place_names(places: Sequence[Path]) -> list[str]:
    """A name for each of ``places``: its last part where that says which it is, all of its path otherwise."""
    last = [place.resolve().name for place in places]
    return [name if last.count(name) == 1 else _shown(place) for name, place in zip(last, places, strict=True)]


def _shown(path: Path) -> str:
    """``path`` as it is written from here, where that is shorter."""
    whole, here = path.resolve(), Path.cwd()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) and whole != here else str(whole)


def as_one(runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """All tables one below the other, with the labels as ``run_id``."""
    return pd.concat([table.assign(run_id=label) for label, table in runs.items()], ignore_index=True)
