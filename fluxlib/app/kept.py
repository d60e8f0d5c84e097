"""What a notebook keeps: tables and pictures, each written in one line where it is made."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fluxlib import config, figures, records
from fluxlib.analysis import claims, studies
from fluxlib.app.pipeline import declared_parameters
from fluxlib.io import check_writable

PLACES = ("results", "figures_folder", "data_path")
"""Parameters that say where something lies on this machine: no table records them."""


@dataclass(frozen=True)
class Kept:
    """Where the tables and pictures of one notebook go; ``parameters`` and ``start`` are recorded beside a table."""

    notebook: str
    """Its name, e.g. ``01_profiling``."""
    name: str
    """The last name of the model that it studies; empty where it reads the runs of all."""
    tables: Path
    folder: Path
    """Of figures."""
    parameters: Mapping[str, Any]
    start: datetime.datetime

    def table(self, rows: Iterable[studies.Row]) -> pd.DataFrame:
        """``rows`` as a ``measurements`` table."""
        return studies.measurements(rows, f"{self.notebook}-{self.name}")

    def picture(self, slug: str, figure: figures.Picture) -> figures.Picture:
        """``figure``, to be shown; its files are written, named ``slug`` and the model."""
        figures.save(figure, "-".join(filter(None, (slug, self.name))), self.folder)
        return figure

    def write(self, table: pd.DataFrame) -> None:
        """Write the study's ``measurements``, and beside them what made them."""
        path = self.tables / "measurements" / f"{self.notebook}-{self.name}.parquet"
        records.write("measurements", table, path, records.about_run(dict(self.parameters), self.start))

    def verdicts(self, table: pd.DataFrame) -> Any:
        """What ``table`` says on the paper's claims, to be shown."""
        from IPython.display import Markdown

        where = ", ".join([f"`{self.name}`", *filter(None, table["task"].unique())])
        return Markdown(claims.in_notebook(self.notebook, table, where))


def keep(notebook: str, names: Mapping[str, Any]) -> Kept:
    """What ``notebook`` finds is kept where its parameters say; ``names`` are its ``globals()``, which hold them."""
    declared = declared_parameters(config.REPO_ROOT / "notebooks" / f"{notebook}.ipynb")
    given = {name: names[name] for name in declared}
    tables = Path(given["results"] or config.results_dir(given["profile"]))
    folder = Path(given["figures_folder"] or config.figures_dir(given["profile"]))
    for place in (tables, folder) if "model" in given else (folder,):  # without a model it only reads tables
        check_writable(place)
    parameters = {name: value for name, value in given.items() if name not in PLACES}
    start = datetime.datetime.now(datetime.UTC)
    return Kept(notebook, Path(given.get("model", "")).name, tables, folder, parameters, start)
