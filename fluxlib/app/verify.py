"""One claim computed from runs that are made for it alone: which tables it needs, and how they are made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fluxlib.analysis.claims import Claim
from fluxlib.analysis.speedups import OURS, REFERENCE
from fluxlib.app import pipeline
from fluxlib.config import REPO_ROOT
from fluxlib.io import ConfigError

DONE = "done"
"""A file in the folder of new runs once all are there: the next call begins with an empty folder."""
LIKE_MAKE = "--nolock --rerun-incomplete --rerun-triggers mtime params input --quiet rules host reason"
"""Snakemake's options in the Makefile, but for one: a claim needs every step, so the first that fails ends it."""


def tables_needed(claim: Claim, profile: pipeline.Pipeline) -> list[str]:
    """Result tables of a profile that tell on a claim, relative to where they are made; empty: it has no such runs."""
    results = f"data/results/{profile.name}"
    if claim.notebook:
        models = profile.models if claim.notebook in profile.studies else ()
        return [f"{results}/measurements/{claim.notebook}-{model}.parquet" for model in models]
    every = list(profile.runs.values())
    if claim.own:
        kinds = [tuple(claim.ours[name]) for name in ("run", "reference") if name in claim.ours]
        named = claim.ours.get("variants", ())
        runs = [run for run in every if run.variant in named or (run.method, run.variant) in kinds]
    else:
        methods = {OURS, REFERENCE, claim.ours.get("baseline", OURS)}
        tasks, ending = claim.ours.get("targets"), claim.ours.get("only", "")
        crowds = [run for run in every if run.variant.startswith("participants-")]
        told = [run for run in every if not run.variant]
        if claim.ours["reader"] == "participants":
            told = told + crowds if crowds else []
        runs = [run for run in told if run.method in methods and run.task in (tasks or [run.task])]
        runs = [run for run in runs if run.task.endswith(ending)]
    return [f"{results}/{table}/{run.run_id}.parquet" for run in runs for table in ("rounds", "participants")]


def rerun(claim: Claim, profile_name: str, jobs: int) -> Path:
    """Make the runs and studies of a claim anew, below ``build/verify``, and give the folder of the new tables.

    Goes on where it was interrupted. ConfigError: the profile has no runs for this claim; RuntimeError: a step failed.
    """
    profile = pipeline.load(REPO_ROOT / "config" / f"{profile_name}.yaml")
    files = tables_needed(claim, profile)
    if not files:
        raise ConfigError(f"profile {profile_name!r} has no runs for {claim.slug}; {claim.needs or 'take another'}")
    folder = REPO_ROOT / "build" / "verify" / f"{profile_name}-{claim.slug}"
    if (folder / DONE).is_file():
        shutil.rmtree(folder)
    make(profile_name, files, folder, jobs)
    (folder / DONE).touch()
    return folder / "data" / "results" / profile_name


def make(profile_name: str, files: Sequence[str], folder: Path, jobs: int) -> None:
    """Make ``files`` of a profile below ``folder``, as ``make reproduce`` does; RuntimeError: a step failed."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPO_ROOT / "Snakefile"), "--cores", str(jobs)]
    command += ["--directory", str(folder), *LIKE_MAKE.split(), "--config", f"profile={profile_name}", "--", *files]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if subprocess.run(command, env=os.environ | threads, check=False).returncode:
        raise RuntimeError(f"not all of it could be made; the logs are in {folder / 'build' / profile_name / 'logs'}")
