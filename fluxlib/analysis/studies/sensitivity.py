"""The headline under other circumstances: stored runs on the clock of other devices, links and model shapes.

What a participant did does not depend on its device: ``participants.work`` holds it, and the device clock reads it
anew. Nothing is trained again, and scores stay what they were. Budgets stay too: a device that the run's budgets do
not fit on is shown by ``memory_share``, not given a smaller budget.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlib.devices import catalogue, clock
from fluxlib.devices.memory import RESERVE_FRAC
from fluxlib.federation.store.tables import participant_seconds, read_work, round_time
from fluxlib.methods.base import Work

if TYPE_CHECKING:
    import pandas as pd

FLEETS = ("paper", "rtx-4090", "rtx-3060", "jetson-agx-orin", "macbook-m1-max", "cpu-laptop", "mixed", "weak")
"""The paper's L20s, then each other device of the catalogue for all participants, then fleets of several devices."""


@dataclass(frozen=True)
class Reply:
    """One accepted reply of a run: who, on which device, and what it did."""

    participant: int
    device: str
    work: Work
    first: Work | None


@dataclass(frozen=True)
class Place:
    """Where a run is counted anew; None: as it was.

    Attributes:
        fleet: of :func:`fluxlib.devices.catalogue.fleet`; None: the devices that the run's participants stood for.
        link: of :func:`fluxlib.devices.catalogue.link`.
        clock_model: whose shapes are charged; ``self``: the run's model.
        tokens_per_sample: what every sample counts as; 0: the tokens that were counted.
    """

    fleet: str | None = None
    link: str | None = None
    clock_model: str | None = None
    tokens_per_sample: int | None = None


def recount(participants: pd.DataFrame, rounds: pd.DataFrame, about: Mapping[str, Any], place: Place) -> pd.DataFrame:
    """``rounds`` of one run as the device clock counts them elsewhere.

    Args:
        participants, rounds: the tables of one run.
        about: what is stored beside them; its ``parameters`` are the run's configuration.

    Returns:
        ``rounds`` in order, with other ``round_device_s``, ``server_device_s``, ``device_s``, ``link`` and
        ``clock_model``, and with ``fleet`` and ``memory_share``: the predicted memory of a step over what the device
        has for it, of the participant where that is largest.

    Raises:
        ValueError: a run without works (stored before there was such a column), or an unknown fleet or link.
    """
    replies = read_replies(participants, str(rounds["run_id"].iloc[0]))
    return _recount(replies, rounds, about["parameters"], place)


def read_replies(participants: pd.DataFrame, run_id: str) -> dict[int, list[Reply]]:
    """The accepted replies of one run by round, in the order of the table.

    Raises:
        ValueError: the run has accepted replies without ``work``.
    """
    found: dict[int, list[Reply]] = {}
    rows = participants[(participants["run_id"] == run_id) & (participants["rejected"] == "")]
    if rows["work"].isna().any():
        raise ValueError(f"{run_id} has no works: it was stored before the column was, run it again")
    names = ["round", "participant", "device", "work"]
    for number, participant, device, text in rows[names].itertuples(index=False, name=None):
        found.setdefault(int(number), []).append(Reply(int(participant), str(device), *read_work(text)))
    return found


def _recount(
    replies: Mapping[int, list[Reply]], rounds: pd.DataFrame, run: Mapping[str, Any], place: Place
) -> pd.DataFrame:
    name = place.clock_model or str(run["clock_model"])
    shapes = clock.shapes(str(run["model"]) if name == "self" else name)
    tokens = run["clock_tokens_per_sample"] if place.tokens_per_sample is None else place.tokens_per_sample or None
    over = catalogue.link(place.link or str(run["link"]))
    devices = catalogue.fleet(place.fleet, run["participants"]) if place.fleet else None
    table = rounds.sort_values("round", kind="stable")
    counted = [_count(replies.get(int(number), []), devices, shapes, over, tokens) for number in table["round"]]
    return table.assign(
        round_device_s=[total for total, _, _ in counted],
        server_device_s=[server for _, server, _ in counted],
        device_s=list(itertools.accumulate(total for total, _, _ in counted)),
        link=over.name,
        clock_model=name,
        fleet=place.fleet or str(run["fleet"]),
        memory_share=[share for _, _, share in counted],
    )


def _count(
    replies: list[Reply],
    fleet: list[catalogue.Device] | None,
    shapes: clock.Shapes,
    link: catalogue.Link,
    tokens: int | None,
) -> tuple[float, float, float]:
    """Seconds of a round, the server's part, and the largest share of memory; all 0 where there was no reply."""
    if not replies:
        return 0.0, 0.0, 0.0
    devices = [fleet[r.participant] if fleet else catalogue.DEVICES[r.device] for r in replies]
    pairs = list(zip(replies, devices, strict=True))
    seconds = [participant_seconds(r.work, r.first, shapes, device, link, tokens) for r, device in pairs]
    time = round_time(seconds, [r.work for r in replies], shapes)
    return time.total_s, time.server_s, max(_memory_share(r.work, shapes, device, tokens) for r, device in pairs)


def _memory_share(work: Work, shapes: clock.Shapes, device: catalogue.Device, tokens: int | None) -> float:
    usable = device.memory_bytes * (1 - RESERVE_FRAC)
    return clock.device_bytes(work, shapes, device, tokens) / usable


def with_works(participants: pd.DataFrame) -> set[str]:
    """Ids of the runs all of whose accepted replies have their work."""
    accepted = participants[participants["rejected"] == ""]
    complete = accepted.groupby("run_id")["work"].agg(lambda works: bool(works.notna().all()))
    return {str(run_id) for run_id, whole in complete.items() if whole}


def read_abouts(folder: Path, run_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What is stored beside the ``rounds`` of each run, by run id."""
    return {run_id: json.loads((Path(folder) / "rounds" / f"{run_id}.json").read_text()) for run_id in run_ids}


def recounts(
    participants: pd.DataFrame,
    rounds: pd.DataFrame,
    abouts: Mapping[str, Mapping[str, Any]],
    fleets: Iterable[str] = FLEETS,
    links: Iterable[str] = tuple(catalogue.LINKS),
) -> pd.DataFrame:
    """Every run with works (see :func:`with_works`), for every fleet and link, one below the other.

    Raises:
        ValueError: no run has works.
    """
    import pandas as pd

    kept, places = with_works(participants), list(itertools.starmap(Place, itertools.product(fleets, links)))
    found = []
    for run_id, run in rounds.groupby("run_id", sort=False):
        if run_id in kept:
            replies, parameters = read_replies(participants, str(run_id)), abouts[str(run_id)]["parameters"]
            found += [_recount(replies, run, parameters, place) for place in places]
    if not found:
        raise ValueError("no run has works: all were stored before the column was, run them again")
    return pd.concat(found, ignore_index=True)
