"""The generated pages of ``docs``, and the answers of the lessons: ``fluxlib pages`` writes all of them anew.

The gallery shows every family of figures once, in the order of the notebooks, with what it shows and, from the numbers
beside it, on which tasks, seeds and clock.
"""

from __future__ import annotations

import csv
import types
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from fluxlib import records
from fluxlib.analysis import claims, speedups
from fluxlib.analysis.wording import markdown_table
from fluxlib.app import answers
from fluxlib.app.pipeline import PAPER
from fluxlib.config import GROUPS, REPO_ROOT, RunConfig

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

FIGURES = Path("figures") / "full"
MODELS = ("mini-llama-moe", "mini-deepseek-moe")

TITLES: dict[str, str] = {
    "convergence": "Score over time of each method",
    "time_to_accuracy": "Time to target, and how much sooner than FMD",
    "claims": "Ours beside the paper's, claim by claim",
    "speed_up": "How much sooner FLUX is, task by task",
    "where_flux_pays": "Where FLUX pays: memory of the device and link",
    "where_flux_plus_pays": "Where FLUX+ pays",
    "scale_participants": "More participants",
    "scale_settings": "Other heterogeneity, other budgets",
    "activation_by_layer": "Which experts are used, by layer",
    "profile_error": "A profile in few bits",
    "sample_size": "How many samples a profile needs",
    "drift": "How activation drifts, and a profile one round old",
    "round_saving": "Round time that a stale profile saves",
    "discarding": "Dropping or merging",
    "error_growth": "How an error travels through the layers",
    "attention_frequency": "Attention is not frequency",
    "layer_budgets": "Where slots go, and what that costs",
    "clustering_time": "Finding clusters, fused or layer by layer",
    "merge_options": "Weights of a merge, and what goes beyond the paper",
    "own_share": "FLUX's own share of a round",
    "role_utilities": "Utilities from forward passes against true ones",
    "role_probes": "Forward-only probes: cost and quality",
    "role_seconds": "What learning a utility costs",
    "role_map": "Who tunes which expert over rounds",
    "role_convergence": "Assignments compared, over rounds and device clock",
    "role_ablation": "Assignments compared, at the end",
    "role_coverage": "How many experts anybody has tuned",
    "role_epsilon": "How much to exploit",
    "role_options": "Assignments beyond the paper",
    "round_phases": "Where a round's time goes",
    "round_memory": "Memory by method",
    "link_speed": "The speed-up over the link",
    "clock_check": "The device clock against this machine",
    "race_measured": "A race over real links, and what the clock said of it",
    "real_memory": "Memory of a training step at real size",
    "real_phases": "A round at real size, by device and phase",
    "real_links": "A round at real size, by link and bits",
}

DEVICE, HERE, BOTH = "device clock", "measured", "device clock and measured"
CLOCKS: dict[str, str] = {
    "time_to_accuracy": BOTH, "round_saving": DEVICE, "clustering_time": HERE, "own_share": BOTH, "role_seconds": BOTH,
    "role_ablation": DEVICE, "where_flux_pays": DEVICE, "where_flux_plus_pays": DEVICE,
    "scale_settings": DEVICE, "scale_participants": DEVICE,
    "role_options": DEVICE, "round_phases": DEVICE, "link_speed": DEVICE, "clock_check": BOTH, "race_measured": BOTH,
    "real_phases": DEVICE, "real_links": DEVICE,
}  # fmt: skip
"""Whose seconds a figure shows where the numbers beside it do not say; others show none."""


def settings() -> str:
    """Every setting of a run by group: type, default, meaning."""
    parts = [
        "# Settings",
        "Generated from `fluxlib/config.py`. A setting is named by its group and its own name, everywhere alike: "
        "`--set merging.budgets=joint`\non the command line, `merging: {budgets: joint}` in a profile of `config/`, "
        '`make_config({"merging.budgets": "joint"})` in Python.\nA name or a value that does not exist is refused, '
        "with what is allowed. `None` is `null` in YAML and in `--set`.",
    ]
    plain = {name: field for name, field in RunConfig.model_fields.items() if name not in GROUPS}
    parts += ["## The run", _settings("", plain)]
    for name, group in GROUPS.items():
        parts += [f"## `{name}`", str(group.__doc__).strip(), _settings(f"{name}.", group.model_fields)]
    return "\n\n".join(parts) + "\n"


def _settings(prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = [
        (f"`{prefix}{name}`", _allowed(field), f"`{field.default!r}`".replace("'", '"'), str(field.description))
        for name, field in fields.items()
    ]
    return markdown_table(("setting", "allowed", "default", "meaning"), rows)


def _allowed(field: FieldInfo) -> str:
    """Types and bounds in words, such as ``integer ≥ 1``."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "pattern": "like"}
    bounds = [
        f"`{value}`" if name == "pattern" else f"{sign} {value:,}" if value < 2**63 else "< 2⁶³"
        for limit in field.metadata
        for name, sign in signs.items()
        if (value := getattr(limit, name, None)) is not None
    ]
    kinds = _kinds(field.annotation)
    none = " or None" * ("None" in kinds)
    return " or ".join(kind for kind in kinds if kind != "None") + f" {', '.join(bounds)}".rstrip() + none


def _kinds(kind: Any) -> list[str]:
    if typing.get_origin(kind) is Literal:
        return [", ".join(f"`{value}`" for value in typing.get_args(kind))]
    if typing.get_origin(kind) in (Union, types.UnionType):
        return [word for inner in typing.get_args(kind) for word in _kinds(inner)]
    return [{int: "integer", float: "number", str: "text", bool: "true or false"}.get(kind, "None")]


def tables() -> str:
    """The data dictionary: every column of every table."""
    parts = [
        "# Tables",
        "Generated from `fluxlib.records`. `data/results/<profile>/<table>/<run_id>.parquet`, one row per "
        "observation;\n`<run_id>.json` beside each file says what made it.",
    ]
    for table, columns in records.TABLES.items():
        rows = [
            (f"`{c.name}`", c.dtype, c.unit, c.description + " (may be empty)" * c.nullable)
            for c in columns
        ]  # fmt: skip
        parts += [f"## `{table}`", markdown_table(("column", "type", "unit", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def families(folder: Path) -> dict[str, Path]:
    """Each family of figures in ``folder`` and the picture that stands for it: known ones first, as in ``TITLES``."""
    found: dict[str, Path] = {}
    for model in MODELS:
        for path in sorted(folder.glob(f"*-{model}.png")):
            found.setdefault(path.stem.removesuffix(f"-{model}"), path)
    for path in sorted(folder.glob("*.png")):
        if not path.stem.endswith(MODELS):
            found.setdefault(path.stem, path)
    order = {name: place for place, name in enumerate(TITLES)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def _about(family: str, numbers: Path) -> str:
    """What the csv beside a picture says of its scale: model, tasks, seeds, the shapes and link of its clock."""
    with numbers.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def values(column: str) -> list[str]:
        return list(dict.fromkeys(row[column] for row in rows if row.get(column)))

    seeds, shapes = values("seed"), values("clock_model")
    model = next((name for name in MODELS if numbers.stem.endswith(name)), ", ".join(values("model")))
    clock = f"device clock: {', '.join(shapes)} over {', '.join(values('link'))}" if shapes else CLOCKS.get(family, "")
    parts = [
        f"`{model}`" if model else "",
        ", ".join(f"`{task}`" for task in values("task")),
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}" if seeds else "",
        clock,
    ]
    return " · ".join(part for part in parts if part)


def _in_paper(family: str) -> str:
    """Which figures or table of the paper show the same, in brackets; empty: none."""
    found = ", ".join(number for number, figure in PAPER.items() if figure == family)
    where = found.replace("table", "Table ") if "table" in found else f"Fig. {found}"
    return f" ({where})" * bool(found)


def gallery(root: Path = REPO_ROOT) -> str:
    """Two pictures a row, each with its caption."""
    cells = []
    for name, path in families(root / FIGURES).items():
        title = TITLES.get(name, name.replace("_", " ")) + _in_paper(name)
        link = f"../{path.relative_to(root).as_posix()}"
        cells.append(f"![{title}]({link})<br>**{title}.** {_about(name, path.with_suffix('.csv'))}")
    cells += [""] * (len(cells) % 2)
    intro = (
        "# Gallery\n\nEvery figure of the `full` profile, of one model where there are two. Its numbers lie beside it."
    )
    return f"{intro}\n\n{markdown_table(('', ''), list(zip(cells[::2], cells[1::2], strict=True)))}\n"


PAGES: dict[str, Callable[[], str]] = {
    "claims.md": claims.page,
    "races.md": speedups.page,
    "gallery.md": gallery,
    "settings.md": settings,
    "tables.md": tables,
    **{f"../notebooks/{stem}.ipynb": partial(answers.lesson, stem) for stem in answers.ANSWERS},
}
"""By the file, seen from ``docs``."""


def write_all(folder: Path = REPO_ROOT / "docs") -> list[Path]:
    """Write every page that is not up to date; those that were."""
    changed = []
    for name, make in PAGES.items():
        page, text = folder / name, make()
        if not page.is_file() or page.read_text() != text:
            page.write_text(text)
            changed.append(page)
    return changed
