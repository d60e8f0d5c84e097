"""The tables of results: schemas declared once (``tables.csv``), checked whenever a table is written or read.

Tables are tidy Parquet, one row per observation: ``<folder>/<table>/<run_id>.parquet``, and beside each file
``<run_id>.json`` with what made it (parameters, seeds, versions, commit, machine, start, end). A file appears
whole or not at all. ``docs/tables.md`` shows the schemas as a page.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlib.config import REPO_ROOT
from fluxlib.io import checked, reading, replacing

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

PHASES = ("download", "merge", "quantize", "profile", "train", "probe", "pcie", "upload")
"""What one participant does in a round; profiling for the NEXT round overlaps with the server."""

PACKAGES = ("fluxlib", "torch", "transformers", "numpy", "flwr", "bitsandbytes", "pandas", "pyarrow")


DECLARED = Path(__file__).with_name("tables.csv")
"""Every column of every table: its type, unit and meaning."""


class TableError(ValueError):
    """A table does not have the columns or types that its schema declares; the message names them."""


@dataclass(frozen=True)
class Column:
    """One column: its type (``string``, ``int64``, ``float64`` or ``bool``), unit and meaning."""

    name: str
    dtype: str
    unit: str
    description: str
    nullable: bool = False


def _declared() -> dict[str, tuple[Column, ...]]:
    found: dict[str, tuple[Column, ...]] = {}
    with DECLARED.open(newline="") as file:
        for row in csv.DictReader(file):
            column = Column(row["column"], row["type"], row["unit"], row["meaning"], row["may_be_empty"] == "yes")
            found[row["table"]] = (*found.get(row["table"], ()), column)
    return found


TABLES = _declared()
"""Columns of each table."""


def columns(table: str) -> tuple[Column, ...]:
    """Columns of ``table``; TableError: no such table."""
    if table not in TABLES:
        raise TableError(f"unknown table {table!r}; allowed are {', '.join(TABLES)}")
    return TABLES[table]


def validate(table: str, frame: pd.DataFrame) -> pa.Table:
    """``frame`` as an Arrow table in the declared order and types; units and meanings are in the fields' metadata.

    Raises:
        TableError: columns missing, extra, of another type, or empty where a value is required, by name.
    """
    import pyarrow as pa

    declared = columns(table)
    names = [c.name for c in declared]
    problems = [f"missing column {name!r}" for name in names if name not in frame.columns]
    problems += [f"extra column {name!r}" for name in frame.columns if name not in names]
    if problems:
        raise TableError(f"table {table!r}: " + "; ".join(problems))
    fields = [
        pa.field(c.name, c.dtype, nullable=c.nullable, metadata={"unit": c.unit, "description": c.description})
        for c in declared
    ]
    try:
        # Numbers do not become text, fractions no integers; pandas has no integers with gaps, they come as floats.
        found = pa.Table.from_pandas(frame, schema=pa.schema(fields), preserve_index=False)
    except (pa.ArrowException, ValueError) as error:
        raise TableError(f"table {table!r}: {' '.join(map(str, error.args))}") from None
    return found.replace_schema_metadata()


def write(table: str, frame: pd.DataFrame, path: Path, about: dict[str, Any]) -> Path:
    """Write ``frame`` to ``path`` (``….parquet``), ``about`` to the ``.json`` beside it, whole or not at all.

    Raises:
        TableError: ``frame`` does not fit the schema; nothing is written.
    """
    import pyarrow.parquet as pq

    checked = validate(table, frame)
    path = Path(path)
    text = json.dumps({"table": table, **about}, indent=2, sort_keys=True) + "\n"
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(text)
    with replacing(path) as temporary:
        pq.write_table(checked, temporary)
    return path


def read(table: str, path: Path) -> pd.DataFrame:
    """Read one Parquet file; TableError by name: there is none, or it does not fit the schema."""
    import pyarrow.parquet as pq

    columns(table)
    if not Path(path).is_file():
        raise TableError(f"no {table!r} table at {path}")
    with reading(str(path), TableError):
        return validate(table, pq.read_table(path).to_pandas()).to_pandas()


def read_all(table: str, folder: Path) -> pd.DataFrame:
    """Read ``<folder>/<table>/*.parquet``, the runs one below the other in order of their names; TableError: none."""
    import pandas as pd

    files = sorted((Path(folder) / table).glob("*.parquet"))
    if not files:
        raise TableError(f"no {table!r} tables in {Path(folder) / table}: run something first")
    return pd.concat([read(table, file) for file in files], ignore_index=True)


def unfinished(folder: Path) -> dict[str, str]:
    """Runs in ``<folder>/rounds`` that must not count as finished, by run id, and why.

    A run that failed or was stopped leaves its rounds so far and says so in the ``.json`` beside them.
    """
    found = {}
    for file in sorted((Path(folder) / "rounds").glob("*.parquet")):
        about = file.with_suffix(".json")
        with reading(str(about), TableError):
            text = about.read_text() if about.is_file() else json.dumps({"status": f"no {about.name} beside it"})
            content = checked("it", json.loads(text), dict)
        status = content.get("status", "complete")
        if status != "complete":
            found[file.stem] = f"{status}: {content['failure']}" if content.get("failure") else str(status)
    return found


def about_run(parameters: dict[str, Any], start: datetime.datetime, **more: Any) -> dict[str, Any]:
    """What made a table: parameters, versions, commit, machine, ``start`` and now as the end (both UTC)."""
    found = {package.name: package.version for package in metadata.distributions() if package.name in PACKAGES}
    return {
        "parameters": parameters,
        "versions": {"python": platform.python_version()} | found,
        "commit": _commit(),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "start": start.isoformat(timespec="seconds"),
        "end": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    }


def _commit() -> str:
    """The checkout's commit, ``-dirty`` when files differ from it, or empty outside a git checkout."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=REPO_ROOT, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip()


def write_experts(mask: Any) -> str:
    """Experts of a bool tensor ``[layers, experts]`` as ``exploited`` has them: ``0.3 0.11 2.5``."""
    return " ".join(f"{layer}.{expert}" for layer, expert in mask.nonzero().tolist())


def read_experts(text: str) -> list[tuple[int, int]]:
    """Inverse of :func:`write_experts`: ``(layer, expert)`` pairs."""
    pairs = (key.split(".") for key in text.split())
    return [(int(layer), int(expert)) for layer, expert in pairs]


def seconds(value: float) -> str:
    """Three digits, and no powers of ten: a mini model's rounds take milliseconds, a real one's minutes."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def span(seconds: float) -> str:
    """``48 s``, ``3 min 20 s``, ``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def describe_round(row: Mapping[str, Any]) -> str:
    """One row of ``rounds`` as a line for people."""
    return f"{row['run_id']}  round {row['round']:>3}  {describe_result(row)}"


def describe_result(row: Mapping[str, Any]) -> str:
    """Score, loss, both clocks, traffic and refused replies of one row of ``rounds``."""
    score = "not scored" if _missing(row["metric"]) else f"{row['metric_name']} {row['metric']:.3f}"
    loss = "" if _missing(row["loss"]) else f"  loss {row['loss']:.3f}"
    rejected = f"  {row['num_rejected']} rejected" if row["num_rejected"] else ""
    return (
        f"{score}{loss}  wall {row['wall_s']:.1f} s  device {seconds(row['device_s'])} s  "
        f"up {row['uplink_bytes'] / 1e6:.1f} MB  down {row['downlink_bytes'] / 1e6:.1f} MB{rejected}"
    )


def _missing(value: float | None) -> bool:
    return value is None or value != value
