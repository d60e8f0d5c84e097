"""The store of runs: which there are, and finding one by what a person would type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fluxlib import records
from fluxlib.config import PROFILES, REPO_ROOT, ConfigError, results_dir

if TYPE_CHECKING:
    import pandas as pd


def folders() -> list[Path]:
    """Where runs lie unless somebody says otherwise: every profile's results, ``build/runs``, ``build/explore``."""
    build = REPO_ROOT / "build"
    return [*(results_dir(profile) for profile in PROFILES), build / "runs", build / "explore"]


def runs(places: Sequence[Path] | None = None) -> dict[str, Path]:
    """Tables of ``rounds`` in ``places``, by a label that says which run it is and where it lies."""
    found: dict[str, Path] = {}
    for place in folders() if places is None else places:
        for file in sorted(place.glob("rounds/*.parquet")):
            found[f"{file.stem}  ({place.name})"] = file
    return found


def find(name: str, places: Sequence[Path] | None = None) -> Path:
    """The table that ``name`` means: a file, a folder with one run, a run id, or any part of one that is unique.

    Raises:
        ConfigError: no such run, or several; the message lists what there is.
    """
    path = Path(name)
    if path.suffix == ".parquet" and path.is_file():
        return path
    known = runs([path]) if path.is_dir() else runs(places)
    exact = [file for file in known.values() if file.stem == name]
    partly = [file for label, file in known.items() if name in label]
    matching = list(known.values()) if path.is_dir() else exact or partly
    if len(matching) == 1:
        return matching[0]
    listed = "\n".join(f"  {file}" for file in (matching or known.values())) or "  none: `fluxlib run` makes some"
    what = "means several runs" if matching else "is no run"
    raise ConfigError(f"{name!r} {what}; give a run id, a unique part of one, or a path. There are:\n{listed}")


def load(names: Sequence[str], places: Sequence[Path] | None = None) -> dict[str, pd.DataFrame]:
    """The ``rounds`` tables of ``names``, by short labels: run ids, with their folder where two are the same.

    Raises:
        ConfigError: see :func:`find`; a run that is named twice; a table that cannot be read.
    """
    files = [find(name, places) for name in names]
    for file in files:
        if files.count(file) > 1:
            raise ConfigError(f"{file} is named twice")
    stems = [file.stem for file in files]
    labels = [f.stem if stems.count(f.stem) == 1 else f"{f.stem} ({f.parent.parent.name})" for f in files]
    try:
        return {label: records.read("rounds", file) for label, file in zip(labels, files, strict=True)}
    except records.TableError as error:
        raise ConfigError(str(error)) from None


def best_final(runs: dict[str, pd.DataFrame]) -> tuple[str, float]:
    """The run that ends with the highest score, and that score.

    Raises:
        ConfigError: no run was ever scored.
    """
    scores = {label: table["metric"].dropna() for label, table in runs.items()}
    finals = {label: float(found.iloc[-1]) for label, found in scores.items() if len(found)}
    if not finals:
        raise ConfigError("no run with a score sets a target: they were stopped before the first evaluation")
    best = max(finals, key=finals.__getitem__)
    return best, finals[best]


def as_one(runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """All tables one below the other; the column ``run`` holds the labels."""
    import pandas as pd

    return pd.concat([table.assign(run=label) for label, table in runs.items()], ignore_index=True)
