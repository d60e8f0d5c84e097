"""The generated pages of ``docs``, and the answers of the lessons: ``make pages`` writes all of them anew.

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
from typing import Any, Literal, Union

import answers
import pandas as pd
import yaml
from pydantic.fields import FieldInfo

from fluxlib import records
from fluxlib.analysis import claims, speedups, store
from fluxlib.analysis.claims.judge import OWN
from fluxlib.analysis.time_to_target import TARGET_FRACTION, by_loss
from fluxlib.analysis.wording import METRICS, in_order, markdown_table, methods_in_order, percent, title
from fluxlib.config import GROUPS, REPO_ROOT, RunConfig, results_dir

OWN_HEADER = ("claim", "where", "ours", "to reach", "scale", "verdict", "reason", "verify")
FIGURES = Path("figures") / "full"
FAMILIES = yaml.safe_load((REPO_ROOT / "workflow" / "figures.yaml").read_text())
"""Every family of figures: its title, what of the paper it shows, whose seconds; explained in the file."""
MODELS = ("mini-llama-moe", "mini-deepseek-moe")


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
    """Each family of figures in ``folder`` and the picture that stands for it: known ones first, in their order."""
    found: dict[str, Path] = {}
    for model in MODELS:
        for path in sorted(folder.glob(f"*-{model}.png")):
            found.setdefault(path.stem.removesuffix(f"-{model}"), path)
    for path in sorted(folder.glob("*.png")):
        if not path.stem.endswith(MODELS):
            found.setdefault(path.stem, path)
    order = [*FAMILIES, *sorted(found.keys() - FAMILIES.keys())]
    return {name: found[name] for name in order if name in found}


def _about(numbers: Path, clock: str) -> str:
    """What the csv beside a picture says of its scale: model, tasks, seeds, its clock or else ``clock``."""
    with numbers.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def values(column: str) -> list[str]:
        return list(dict.fromkeys(row[column] for row in rows if row.get(column)))

    seeds, shapes = values("seed"), values("clock_model")
    model = next((name for name in MODELS if numbers.stem.endswith(name)), ", ".join(values("model")))
    clock = f"device clock: {', '.join(shapes)} over {', '.join(values('link'))}" if shapes else clock
    parts = [
        f"`{model}`" if model else "",
        ", ".join(f"`{task}`" for task in values("task")),
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}" if seeds else "",
        clock,
    ]
    return " · ".join(part for part in parts if part)


def gallery(root: Path = REPO_ROOT) -> str:
    """Two pictures a row, each with its caption."""
    cells = []
    for name, path in families(root / FIGURES).items():
        family = FAMILIES.get(name, {"title": name.replace("_", " ")})
        title = family["title"] + (f" ({family['paper']})" if "paper" in family else "")
        link = f"../{path.relative_to(root).as_posix()}"
        cells.append(f"![{title}]({link})<br>**{title}.** {_about(path.with_suffix('.csv'), family.get('clock', ''))}")
    cells += [""] * (len(cells) % 2)
    intro = (
        "# Gallery\n\nEvery figure of the `full` profile, of one model where there are two. Its numbers lie beside it."
    )
    return f"{intro}\n\n{markdown_table(('', ''), list(zip(cells[::2], cells[1::2], strict=True)))}\n"


def claims_page(results: Path | None = None) -> str:
    """``docs/claims.md``: the claims table of ``results``, the tracked profile's if it is not given."""
    tables = claims.load(results or results_dir("full"))
    parts = [
        "# The paper's claims",
        "The paper's value beside ours: mean over seeds, with its 95 % t interval, and a verdict by one rule"
        " (`fluxlib/analysis/claims/judge.py`). Of several models the weakest counts. The paper's values are in"
        " `fluxlib/analysis/claims/claims.yaml`; `fluxlib claims --profile full` prints this table anew, and"
        " `fluxlib verify` with the name in the last column one row of it.",
        claims.to_markdown(claims.claims(tables)),
        "## What this suite claims itself",
        "The same rule for our own: what we set out to reach stands where the paper's value does.",
        claims.to_markdown(claims.claims(tables, OWN), OWN_HEADER),
    ]
    return "\n\n".join(parts) + "\n"


def races(results: Path | None = None) -> str:
    """``docs/races.md``: scores and speed-ups.

    Args:
        results: a profile's results with runs that finished; the tracked profile's if it is not given.
    """
    rounds = store.finished(results or results_dir("full"), "rounds")
    if rounds is None:
        return "# Time to target\n\n*No runs.*\n"
    times, share = speedups.against_all(rounds), percent(TARGET_FRACTION)
    parts = [
        "# Time to target",
        f"The target of a seed is {share} of FMD's final score with that seed; seconds are those of the device clock."
        " A factor is a geometric mean over seeds with its 95 % t interval. *never*: the target was not reached.",
        scores_to_markdown(times, rounds),
        speedups.to_markdown(speedups.speed_ups(times)),
        f"**By loss**: the same runs, the target {share} of how far FMD's negative log-likelihood of the right answers"
        " falls. It has less noise than a score, and counts what a score does not see.",
        speedups.to_markdown(speedups.speed_ups(speedups.against_all(by_loss(rounds)))),
    ]
    return "\n\n".join(parts) + "\n"


def scores_to_markdown(times: pd.DataFrame, rounds: pd.DataFrame) -> str:
    """Final scores and times to target, means over seeds: one line per model and task.

    Args:
        times: of :func:`against_all`.
        rounds: the runs, whose first rows are the base models' scores.
    """
    plain = times.sort_values("model", key=in_order, kind="stable")
    first = rounds[(rounds["round"] == 0) & (rounds["variant"] == "")]
    methods = methods_in_order(plain["method"])
    scores: dict[Any, float] = first.groupby(["model", "task"])["metric"].mean().to_dict()
    rows = []
    for (model, task), part in plain.groupby(["model", "task"], sort=False):
        metric, seeds = part["metric_name"].iloc[0], part["seed"].nunique()
        few = [f"{title(name)} {count}" for name, count in part["method"].value_counts().items() if count < seeds]
        cells = [f"`{Path(str(model)).name}`", f"`{task}`", METRICS.get(metric, metric), ", ".join([str(seeds), *few])]
        cells.append(f"{scores[model, task]:.3f}")
        for column, write in (("final_metric", "{:.3f}"), ("device_s_to_target", ""), ("round_s", "{:.0f}")):
            cells.append(" / ".join(_mean(part.loc[part["method"] == name, column], write) for name in methods))
        rows.append(cells)
    listed = " / ".join(map(title, methods))
    header = [f"{listed} on", "", "metric", "seeds", "before", "final score", "device s to the target"]
    return markdown_table([*header, "device s a round"], rows)


def _mean(values: pd.Series, write: str) -> str:
    """Mean over seeds; of a time (no ``write``) over those that reached the target, whose number is told."""
    if values.isna().all():
        return "–" if write or values.empty else "never"
    some = "" if write or values.notna().all() else f" ({values.count()} of {len(values)})"
    return (write or "{:.0f}").format(values.mean()) + some


PAGES: dict[str, Callable[[], str]] = {
    "claims.md": claims_page,
    "races.md": races,
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


if __name__ == "__main__":
    print("\n".join(f"written: {page}" for page in write_all()) or "all pages are up to date")
