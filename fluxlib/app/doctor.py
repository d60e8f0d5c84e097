"""What ``fluxlib doctor`` checks: is this machine ready, and if not, what to do. Nothing is sent anywhere.

Each check is a function that yields :class:`Check` records; :func:`examine` calls them all. A ``problem`` stops the
suite from running (exit code 1), a ``warning`` stops a part of it, both say what to do.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fluxlib.config import REPO_ROOT, data_dir, figures_dir, results_dir
from fluxlib.io import ConfigError, check_writable

GIB = 2**30
CORE = ("torch", "transformers", "numpy", "safetensors", "pydantic", "pandas", "pyarrow")
PARTS = {
    "flwr": "federated runs",
    "papermill": "headless notebooks",
    "snakemake": "make reproduce",
    "matplotlib": "figures",
    "scikit-learn": "the reference clustering",
    "rouge-score": "mini-dolly and dolly",
    "ipywidgets": "live progress in JupyterLab",
    "bitsandbytes": "the 4-bit comparison",
}


@dataclass(frozen=True)
class Check:
    """One finding: ``status`` is ``ok``, ``warning`` or ``problem``; the latter two come with ``advice``."""

    name: str
    status: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"\n{'':10}-> {self.advice}" if self.advice else ""
        return f"{self.status:<9} {self.name}: {self.found}{advice}"


def examine() -> list[Check]:
    """All checks, in the order in which problems are best solved."""
    return [*_python(), *_packages(), *_memory(), *_disk(), *_devices(), *_folders(), *_models()]


def _python() -> Iterator[Check]:
    """The package cannot be installed on a Python that is too old; one that is too new only lacks tested pins."""
    found = f"{platform.python_version()} at {sys.executable}"
    if platform.python_version_tuple()[:2] == ("3", "11"):
        yield Check("python", "ok", found)
    else:
        yield Check("python", "warning", f"{found}, tested with 3.11", "`make clean`, then PYTHON=python3.11")


def pins(path: Path = REPO_ROOT / "constraints.txt") -> dict[str, str]:
    """Pinned versions by distribution name in lower case; empty when the file is not there."""
    if not path.is_file():
        return {}
    lines = (text.split("#")[0].strip() for text in path.read_text().splitlines())
    return {name.lower(): version for name, _, version in (text.partition("==") for text in lines) if version}


def _packages() -> Iterator[Check]:
    pinned = pins()
    for name in (*CORE, *PARTS):
        needed_for = PARTS.get(name, "everything")
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            status = "problem" if name in CORE else "warning"
            yield Check(name, status, f"not installed; needed for {needed_for}", "run `make venv`")
            continue
        wanted = pinned.get(name)
        if wanted and version.split("+")[0] != wanted:
            yield Check(name, "warning", f"{version}, tested with {wanted}", "run `make venv` for the tested versions")
        else:
            yield Check(name, "ok", version)


def _memory() -> Iterator[Check]:
    """The mini profile needs about 1.5 GiB per run side by side."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores = os.cpu_count() or 1
    found = f"{total:.1f} GiB, {cores} cores"
    if total < 3:
        yield Check("memory", "problem", found, "the mini profile needs 3 GiB: run it with JOBS=1 on a larger machine")
    elif total < 1.5 * cores + 1:
        yield Check("memory", "warning", found, f"run `make reproduce JOBS={max(1, int((total - 1) / 1.5))}`")
    else:
        yield Check("memory", "ok", found)


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(REPO_ROOT).free / GIB
    status, advice = ("ok", "") if free >= 2 else ("problem", "free at least 2 GiB, or `make clean`")
    yield Check("disk", status, f"{free:.1f} GiB free", advice)


def _devices() -> Iterator[Check]:
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Check(f"cuda:{index}", "ok", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")
    elif torch.version.cuda:
        yield Check("gpu", "warning", "torch is built for CUDA but sees no GPU", "check the driver with `nvidia-smi`")
    else:
        none = "none (smoke, mini and full need none; paper does)"
        yield Check("gpu", "ok", "Apple MPS" if torch.backends.mps.is_available() else none)


def _folders() -> Iterator[Check]:
    for folder in (results_dir("mini"), figures_dir("mini"), REPO_ROOT / "build"):
        try:
            yield Check("folder", "ok", f"{check_writable(folder)} is writable")
        except ConfigError as error:
            yield Check("folder", "problem", str(error), "give yourself the right to write there, or set FLUXLIB_DATA")


def _models() -> Iterator[Check]:
    """Every file there, and the contents those that were published (their checksums)."""
    from fluxlib.models import checkpoints
    from fluxlib.models.loading import MINI

    for name in MINI:
        folder = data_dir() / "models" / name
        try:
            checkpoints.weight_files(folder)
            checkpoints.verify_checksums(folder)
            yield Check(name, "ok", str(folder))
        except OSError as error:
            yield Check(name, "problem", str(error), "get the files again: `git checkout -- data/models`")
