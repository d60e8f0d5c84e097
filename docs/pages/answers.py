"""The answer at the top of each lesson: what it found, with numbers from the tables of the ``full`` profile."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import yaml

from fluxlib.analysis import claims, speedups
from fluxlib.analysis.claims.judge import EVERY
from fluxlib.analysis.runs import breakdown
from fluxlib.analysis.wording import REAL_SHAPES, shown
from fluxlib.app import pipeline
from fluxlib.config import REPO_ROOT, results_dir

LESSONS = REPO_ROOT / "notebooks"
TASK, OTHERS = "mini-mmlu", {"second": "mini-piqa", "third": "mini-gsm8k"}
"""The task that has all variants, whose numbers an answer has, and the others."""

ANSWERS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("answers.yaml").read_text())
"""By lesson; a number stands as its name in :func:`numbers`."""


@cache
def numbers() -> dict[str, Any]:
    """Every number of an answer, in words: of the claims by their slugs, of the runs, of the notebooks.

    A claim has its ``value`` and what is said of it (``ours``), model by model, and the ``paper``'s.
    """
    tables = claims.load(results_dir("full"))
    found: dict[str, Any] = {}
    for claim in EVERY:
        read = claims.read(claim, tables)
        values = " and ".join(shown(reading.value, claim.unit) for reading in read)
        ours = " and ".join(reading.ours for reading in read)
        found[claim.slug] = SimpleNamespace(value=values, ours=ours, paper=claim.paper)
    assert tables.rounds is not None and tables.participants is not None, "the full profile's runs are tracked"
    ratios = speedups.speed_ups(tables.times).set_index(["task", "baseline", "model"])["speedup"].sort_index()
    found |= {f"over_{baseline}": _of_each(ratios[TASK, baseline], "x") for baseline in ("fmd", "fmes")}
    found |= {f"over_fmd_{which}": _of_each(ratios[task, "fmd"], "x") for which, task in OTHERS.items()}
    rounds = tables.rounds[tables.rounds["task"] == TASK]
    plain = rounds[rounds["variant"] == ""]
    phases = breakdown(plain, tables.participants).query("method == 'flux' and phase in ('download', 'upload')")
    sent = plain[plain["round"] > 0].groupby(["method", "model"])["uplink_bytes"].mean()
    last = rounds.dropna(subset=["metric"]).sort_values("round").groupby("run_id").last()
    ends = last.groupby(["method", "variant", "model"])[["metric", "loss"]].mean().loc["flux"]
    finals = tables.times.query("method == 'flux' and task == @TASK").groupby("model")["final_metric"].mean()
    starts = plain[plain["round"] == 0].groupby("model")["metric"].mean()
    code = [cell["source"] for cell in pipeline.cells(LESSONS / "09_from_scratch.ipynb") if cell["cell_type"] == "code"]
    return found | {
        "transfer": _of_each(phases.groupby("model")["share"].sum(), "%"),
        "uplink": _of_each(sent["flux"] / sent["fmd"], "%"),
        "start": _of_each(starts), "end": _of_each(finals),
        "loss_flux": _of_each(ends.loc["short"]["loss"]), "loss_random": _of_each(ends.loc["random"]["loss"]),
        "loss_frequency": _of_each(ends.loc["frequency"]["loss"]),
        "summary": claims.summary(claims.claims(tables)),
        "lines": sum(bool(line.strip()) for cell in code for line in cell.splitlines()),
    }  # fmt: skip


def _of_each(values: pd.Series, unit: str = "") -> str:
    """One value per model, in the order in which all are told."""
    return " and ".join(shown(values[model], unit) for model in REAL_SHAPES)


def lesson(stem: str) -> str:
    """The file of the notebook called ``stem``, with today's answer in its first cell."""
    content = json.loads((LESSONS / f"{stem}.ipynb").read_text())
    first, answer = content["cells"][0], ANSWERS[stem].format_map(numbers())
    text = re.sub(r"^\*\*Answer\.\*\*.*$", lambda _: f"**Answer.** {answer}", "".join(first["source"]), flags=re.M)
    first["source"] = text.splitlines(keepends=True)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
