"""Runs with other numbers of participants, heterogeneity or budgets (notebook 06), with their settings beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlib import config
from fluxlib.analysis.studies.sensitivity import read_abouts

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = ("participants", "participants_per_round", "alpha", "tune_fraction", "merge_fraction")
"""Fields of :class:`fluxlib.config.RunConfig` that the study's runs differ in."""


def with_settings(rounds: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """``rounds`` with the columns :data:`SETTINGS`, from what is stored beside each run in ``folder``.

    ``participants_per_round`` is the number asked in a round, all participants where none was set.
    """
    found = {run_id: about["parameters"] for run_id, about in read_abouts(folder, rounds["run_id"].unique()).items()}
    columns = {name: rounds["run_id"].map({run_id: run[name] for run_id, run in found.items()}) for name in SETTINGS}
    columns["participants_per_round"] = columns["participants_per_round"].fillna(columns["participants"]).astype(int)
    return rounds.assign(**columns)


def small_runs(common: Mapping[str, Any], methods: Sequence[str]) -> list[config.RunConfig]:
    """Runs that a notebook makes itself: ``common`` once per method, and FLUX and FMD with one participant more."""
    more = {"variant": f"participants-{common['participants'] + 1}", "participants": common["participants"] + 1}
    plain = [config.make_config({**common, "method": method}) for method in methods]
    return plain + [config.make_config({**common, **more, "method": method}) for method in ("flux", "fmd")]
