"""What stored runs say of themselves: the settings that their numbers depend on, and which of them must not be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxlib import records
from fluxlib.analysis.claims.races import LONG
from fluxlib.config import NO_NUMBERS, ConfigError, make_config

LENGTH = ("rounds", "variant")
"""In what a run of variant ``long`` differs from the plain one that it stands for."""


def settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers of a stored run depend on, with the default of each setting that it was stored without.

    A run that today's checks refuse is taken as it was stored.
    """
    try:
        known = make_config(dict(parameters)).model_dump(mode="json")
    except ConfigError:
        known = dict(parameters)
    return {name: value for name, value in known.items() if name not in NO_NUMBERS}


def parameters(results: Path) -> dict[str, dict[str, Any]]:
    """Parameters of the runs in ``<results>/rounds``, by run id."""
    files = sorted((Path(results) / "rounds").glob("*.json"))
    return {path.stem: json.loads(path.read_text()).get("parameters", {}) for path in files}


def left_out(results: Path) -> dict[str, str]:
    """Runs that must not be read, by run id, and why: unfinished ones, and those that :func:`odd` names."""
    unfinished = records.unfinished(results)
    return unfinished | odd({run: known for run, known in parameters(results).items() if run not in unfinished})


def odd(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Runs of variant ``long`` that are not the plain one with more rounds, by run id, and in what they differ."""
    known = {run: settings(one) for run, one in stored.items() if one}
    plain = {_who(one): run for run, one in known.items() if not one.get("variant")}
    found = {}
    for run, one in known.items():
        partner = plain.get(_who(one))
        if partner is None or one.get("variant") != LONG:
            continue
        other = known[partner]
        names = sorted(name for name in {*one, *other} - {*LENGTH} if one.get(name) != other.get(name))
        if names:
            told = ", ".join(f"{name} {one.get(name)} in place of {other.get(name)}" for name in names)
            found[run] = f"not {partner} with more rounds: {told}"
    return found


def _who(one: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(one.get(name) for name in ("model", "task", "seed", "method"))
