"""The tables of results: schemas declared once, checked whenever a table is written or read.

Tables are tidy Parquet, one row per observation: ``<folder>/<table>/<run_id>.parquet``, and beside each file
``<run_id>.json`` with what made it (parameters, seeds, versions, commit, machine, start, end). A file appears
whole or not at all. ``docs/tables.md`` shows the schemas as a page.
"""

from __future__ import annotations

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

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

PHASES = ("download", "merge", "quantize", "profile", "train", "probe", "pcie", "upload")
"""What one participant does in a round; profiling for the NEXT round overlaps with the server."""

PACKAGES = ("fluxlib", "torch", "transformers", "numpy", "flwr", "bitsandbytes", "pandas", "pyarrow")


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


_IDENTITY = (
    Column("run_id", "string", "", "method[-variant]-model-task-seedN: one federated run"),
    Column("method", "string", "", "flux, fmd, fmq or fmes"),
    Column("model", "string", "", "the model that was trained"),
    Column("task", "string", "", "the task it was trained on"),
    Column("seed", "int64", "", "seed that every named generator of the run derives from"),
    Column("variant", "string", "", "what was changed against the profile's plain runs; empty: nothing"),
    Column("engine", "string", "", "what ran the apps: local, simulation or deployment"),
    Column("round", "int64", "", "round, counted from 1; 0 is the base model before any training"),
)

ROUNDS = (
    *_IDENTITY,
    Column("metric", "float64", "0..1", "score of the full global model on the server's test split", True),
    Column("metric_name", "string", "", "accuracy, exact_match or rouge_l"),
    Column("loss", "float64", "nats/token", "test loss of the full global model", True),
    Column("train_loss", "float64", "nats/token", "mean of the participants' losses, weighted by samples", True),
    Column("epsilon", "float64", "0..1", "share of the tuning budget that exploits; empty without exploration", True),
    Column("wall_s", "float64", "s", "measured here since the start of the run, evaluation excluded"),
    Column("device_s", "float64", "s", "device clock since the start of the run"),
    Column("round_wall_s", "float64", "s", "measured here in this round, evaluation excluded"),
    Column("round_device_s", "float64", "s", "device clock of this round: slowest participant, then the server"),
    Column("server_device_s", "float64", "s", "the server's part of round_device_s"),
    Column("evaluate_wall_s", "float64", "s", "measured time of the evaluation, in neither clock"),
    Column("clock_model", "string", "", "model whose shapes the device clock uses"),
    Column("link", "string", "", "link between participants and server in the device clock"),
    Column("uplink_bytes", "int64", "B", "payload that left the participants in this round, summed"),
    Column("downlink_bytes", "int64", "B", "payload sent to the participants in this round, summed"),
    Column("peak_memory_bytes", "int64", "B", "highest memory of the process (or GPU) so far, measured"),
    Column("device_memory_bytes", "int64", "B", "predicted peak on the most loaded participant", True),
    Column("num_participants", "int64", "", "participants asked in this round"),
    Column("num_rejected", "int64", "", "replies refused in this round (see participants.rejected)"),
    Column("num_tuned", "int64", "", "different experts that at least one accepted reply changed"),
    Column("num_experts", "int64", "", "routed experts of the model, over all layers"),
)

PARTICIPANTS = (
    Column("run_id", "string", "", "as in rounds"),
    Column("round", "int64", "", "round, counted from 1"),
    Column("participant", "int64", "", "participant, counted from 0"),
    Column("device", "string", "", "device of the catalogue that stands for this participant"),
    Column("num_samples", "int64", "", "samples trained on in this round"),
    Column("num_train_tokens", "int64", "tokens", "real tokens trained on, padding excluded"),
    Column("num_tuned", "int64", "", "experts with gradients (exploited), over all layers"),
    Column("num_explored", "int64", "", "experts whose utility was probed forward-only"),
    Column("num_merged", "int64", "", "merged slots held, over all layers"),
    Column("loss", "float64", "nats/token", "mean training loss of the local steps", True),
    Column("uplink_bytes", "int64", "B", "payload of the reply"),
    Column("downlink_bytes", "int64", "B", "payload of the request"),
    Column("rejected", "string", "", "why the reply was refused; empty: it was accepted"),
    Column("utility_faults", "string", "", "utilities not taken as they came: 2 huge, 1 missing ...; empty: none"),
    Column("exploited", "string", "", "experts tuned, as layer.expert with spaces between"),
    Column("explored", "string", "", "experts held unmerged beside them, to be probed or merely kept, written alike"),
    Column(
        "work", "string", "", "what was done, as JSON of methods.base.Work: the device clock can be read anew", True
    ),
    *(
        Column(f"{phase}_{clock}_s", "float64", "s", f"{phase}: {source}", True)
        for clock, source in (("device", "predicted by the device clock"), ("wall", "measured here"))
        for phase in PHASES
    ),
)

MEASUREMENTS = (
    Column("run_id", "string", "", "notebook-model: one execution of a study notebook"),
    Column("study", "string", "", "what was studied, e.g. profile_error: the figures are named after it"),
    Column("model", "string", "", "the model it was measured on"),
    Column("task", "string", "", "the task whose samples were used; empty: none"),
    Column("seed", "int64", "", "seed of the samples and of everything drawn"),
    Column("setting", "string", "", "what was varied, e.g. 4 bit or merging"),
    Column("x", "float64", "", "the varied quantity where it is a number: bits, probes, samples, round", True),
    Column("layer", "int64", "", "routed layer, counted from 0; empty: over all layers", True),
    Column("expert", "int64", "", "expert within its layer; empty: over all experts", True),
    Column("value", "float64", "see unit", "what was measured", True),
    Column("unit", "string", "", "unit of value; empty: a ratio or a count"),
)
"""What the study notebooks measure beside federated runs: one long table for all of them."""

TIMELINE = (
    Column("run_id", "string", "", "as in rounds"),
    Column("round", "int64", "", "round, counted from 1"),
    Column("participant", "int64", "", "participant, counted from 0; -1: the server"),
    Column("clock", "string", "", "wall: as measured here; device: as predicted by the device clock"),
    Column("phase", "string", "", "a phase of participants, catch_up, or the server's aggregate and evaluate"),
    Column("start_s", "float64", "s", "since the start of the run"),
    Column("end_s", "float64", "s", "since the start of the run"),
)
"""When each phase began and ended; the wall's clock goes on during evaluation, the device's does not."""

TABLES: dict[str, tuple[Column, ...]] = {
    "rounds": ROUNDS,
    "participants": PARTICIPANTS,
    "timeline": TIMELINE,
    "measurements": MEASUREMENTS,
}


def columns(table: str) -> tuple[Column, ...]:
    """Columns of ``table``.

    Raises:
        TableError: no such table.
    """
    if table not in TABLES:
        raise TableError(f"unknown table {table!r}; allowed are {', '.join(TABLES)}")
    return TABLES[table]


def schema(table: str) -> pa.Schema:
    """The Arrow schema of ``table``; units and meanings travel in the fields' metadata."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field(c.name, c.dtype, nullable=c.nullable, metadata={"unit": c.unit, "description": c.description})
            for c in columns(table)
        ]
    )


def validate(table: str, frame: pd.DataFrame) -> pa.Table:
    """``frame`` as an Arrow table in the declared order and types.

    Raises:
        TableError: columns missing, extra, of another type, or empty where a value is required, by name.
    """
    import pyarrow as pa

    names = [c.name for c in columns(table)]
    problems = [f"missing column {name!r}" for name in names if name not in frame.columns]
    problems += [f"extra column {name!r}" for name in frame.columns if name not in names]
    arrays = []
    for column in columns(table):
        if column.name in frame.columns:
            try:
                arrays.append(_to_arrow(frame[column.name], column))
            except (pa.ArrowException, TableError) as error:
                problems.append(f"column {column.name!r} must be {column.dtype}: {error}")
    if problems:
        raise TableError(f"table {table!r}: " + "; ".join(problems))
    return pa.Table.from_arrays(arrays, schema=schema(table))


def _to_arrow(values: pd.Series, column: Column) -> pa.Array:
    import pyarrow as pa

    found = pa.Array.from_pandas(values)
    # pandas has no integers with gaps: they come as floats, and the cast below refuses fractions.
    accepted = (*_ACCEPTED[column.dtype], "float") if column.nullable else _ACCEPTED[column.dtype]
    if len(values) and not pa.types.is_null(found.type) and _kind(found.type) not in accepted:
        raise TableError(f"got {found.type}")
    if found.null_count and not column.nullable:
        raise TableError(f"{found.null_count} of {len(values)} values are missing")
    return found.cast(column.dtype)


def _kind(dtype: Any) -> str:
    import pyarrow as pa

    if pa.types.is_boolean(dtype):
        return "bool"
    if pa.types.is_integer(dtype):
        return "int"
    if pa.types.is_floating(dtype):
        return "float"
    return "string" if pa.types.is_string(dtype) or pa.types.is_large_string(dtype) else str(dtype)


# An integer column may arrive as floats only from outside; a float column may well hold whole numbers.
_ACCEPTED = {"string": ("string",), "int64": ("int",), "float64": ("float", "int"), "bool": ("bool",)}


def write(table: str, frame: pd.DataFrame, path: Path, about: dict[str, Any]) -> Path:
    """Write ``frame`` to ``path`` (``….parquet``), ``about`` to the ``.json`` beside it, whole or not at all.

    Raises:
        TableError: ``frame`` does not fit the schema; nothing is written.
    """
    import pyarrow.parquet as pq

    checked = validate(table, frame)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"table": table, **about}, indent=2, sort_keys=True) + "\n"
    _replace(path.with_suffix(".json"), lambda temporary: temporary.write_text(text))
    _replace(path, lambda temporary: pq.write_table(checked, temporary))
    return path


def _replace(path: Path, save: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(table: str, path: Path) -> pd.DataFrame:
    """Read one Parquet file.

    Raises:
        TableError: no such file, or one that does not fit the schema, by name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns(table)
    if not Path(path).is_file():
        raise TableError(f"no {table!r} table at {path}")
    try:
        return validate(table, pq.read_table(path).to_pandas()).to_pandas()
    except (TableError, pa.ArrowException) as error:
        raise TableError(f"{path}: {error}") from None


def read_all(table: str, folder: Path) -> pd.DataFrame:
    """Read ``<folder>/<table>/*.parquet``, the runs one below the other in the order of their names.

    Raises:
        TableError: nothing to read, or a file that does not fit the schema, by name.
    """
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
        content = json.loads(about.read_text()) if about.is_file() else {"status": f"no {about.name} beside it"}
        status = content.get("status", "complete")
        if status != "complete":
            found[file.stem] = f"{status}: {content['failure']}" if content.get("failure") else str(status)
    return found


def about_run(parameters: dict[str, Any], start: datetime.datetime, **more: Any) -> dict[str, Any]:
    """What made a table: parameters, versions, commit, machine, ``start`` and now as the end (both UTC)."""
    return {
        "parameters": parameters,
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "start": start.isoformat(timespec="seconds"),
        "end": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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


def describe_round(row: Mapping[str, Any]) -> str:
    """One row of ``rounds`` as a line for people: score, loss, both clocks, traffic, refused replies."""
    score = "not scored" if _missing(row["metric"]) else f"{row['metric_name']} {row['metric']:.3f}"
    loss = "" if _missing(row["loss"]) else f"  loss {row['loss']:.3f}"
    rejected = f"  {row['num_rejected']} rejected" if row["num_rejected"] else ""
    return (
        f"{row['run_id']}  round {row['round']:>3}  {score}{loss}  wall {row['wall_s']:.1f} s  "
        f"device {row['device_s']:.1f} s  up {row['uplink_bytes'] / 1e6:.1f} MB  "
        f"down {row['downlink_bytes'] / 1e6:.1f} MB{rejected}"
    )


def _missing(value: float | None) -> bool:
    return value is None or value != value
