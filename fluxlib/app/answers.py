"""The answer at the top of each lesson: what it found, with numbers from the tables of the ``full`` profile."""

from __future__ import annotations

import json
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pandas as pd

from fluxlib.analysis import claims, speedups
from fluxlib.analysis.claims.judge import EVERY
from fluxlib.analysis.runs import breakdown
from fluxlib.analysis.wording import REAL_SHAPES, shown
from fluxlib.app import pipeline
from fluxlib.config import REPO_ROOT, results_dir

LESSONS = REPO_ROOT / "notebooks"

ANSWERS = {
    "00_start_here": (
        "A token uses only a few of a layer's experts, but all of them have to lie somewhere, and a tuned one takes "
        "eight times the memory of a frozen one. What does not fit can be dropped or merged: with our two small "
        "models merging leaves {dropping.value} less error than dropping."
    ),
    "01_profiling": (
        "A copy in 4 bits finds them: with our two small models it errs by {four_bit.value} (paper: "
        "{four_bit.paper}). A profile that is one round old errs by {stale_error.value} more (paper: "
        "{stale_error.paper}), and changes the error of the merged model by {stale_merge.value}."
    ),
    "02_merging": (
        "By the paper's rules merging leaves {budgets_single.value} less error than one slot for each layer, with our "
        "two small models (paper: {budgets_single.paper}). Slots and groups chosen by how strongly tokens weigh an "
        "expert, a rule of our own, leave {joint_single.value} less."
    ),
    "03_role_assignment": (
        "One probe, made of forward passes alone, gives utilities at a cosine distance of {forward_only.value} from "
        "the true ones, with our two small models (paper: {forward_only.paper}). After six rounds FLUX's choice has a "
        "loss of {loss_flux}, and experts drawn at random one of {loss_random}."
    ),
    "04_federated_run": (
        "The score of the whole model rises from {start} to {end} with our two small models, although no participant "
        "ever holds all of it tuned. Each sends {uplink} of the bytes that it would send with all experts tuned, and "
        "still {transfer} of a round is transfer."
    ),
    "05_time_to_accuracy": (
        "On six NVIDIA L20 at 1 Gb/s, with the largest budget that fits, FLUX is {over_fmd} as fast as FMD with our "
        "two small models, and {over_fmes} as fast as FMES. Those seconds are modelled; by the seconds measured here, "
        "where nothing crosses a network, FLUX is slower than FMD."
    ),
    "06_scale_and_overhead": (
        "With our two small models FLUX's own work takes {overhead_runs.value} of a round (paper: "
        "{overhead_runs.paper}), and transfer takes {transfer}. FLUX pays on devices that are too small for FMES, and "
        "on slow links; where FMES fits and the link is fast, FMES is sooner."
    ),
    "07_real_models": (
        "With a quarter of the experts tuned, a training step takes {memory.ours}, at the sizes of LLaMA-MoE and of "
        "DeepSeek-MoE. Most of a round is transfer, and most of that is download, which a small budget hardly makes "
        "less."
    ),
    "08_report": (
        "{summary} Each verdict is computed from the tables, and says how many tasks and seeds stand behind it."
    ),
    "09_from_scratch": (
        "{lines} lines of code. A test runs them and the library from the same seeds: both choose and merge the same "
        "experts, and their tuned models differ by rounding only."
    ),
}
"""Two sentences for each lesson. A number stands as its name in :func:`numbers`."""


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
    ratios = speedups.speed_ups(tables.times).set_index(["baseline", "model"])["speedup"]
    found |= {f"over_{baseline}": _of_each(ratios[baseline], "x") for baseline in ("fmd", "fmes")}
    plain = tables.rounds[tables.rounds["variant"] == ""]
    phases = breakdown(plain, tables.participants).query("method == 'flux' and phase in ('download', 'upload')")
    sent = plain[plain["round"] > 0].groupby(["method", "model"])["uplink_bytes"].mean()
    last = tables.rounds.dropna(subset=["metric"]).sort_values("round").groupby("run_id").last()
    ends = last.groupby(["method", "variant", "model"])[["metric", "loss"]].mean().loc["flux"]
    starts = plain[plain["round"] == 0].groupby("model")["metric"].mean()
    code = [cell["source"] for cell in pipeline.cells(LESSONS / "09_from_scratch.ipynb") if cell["cell_type"] == "code"]
    return found | {
        "transfer": _of_each(phases.groupby("model")["share"].sum(), "%"),
        "uplink": _of_each(sent["flux"] / sent["fmd"], "%"),
        "start": _of_each(starts), "end": _of_each(ends.loc[""]["metric"]),
        "loss_flux": _of_each(ends.loc["short"]["loss"]), "loss_random": _of_each(ends.loc["random"]["loss"]),
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
