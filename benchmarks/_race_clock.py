"""What the device clock says of the rounds of a measured race.

The clock is told this machine by one run of each method over a link that is not shaped: how much longer than the clock
says its phases take here (mini models are mostly Python), and what a round takes besides (Flower starts a process per
message and asks every three seconds). What is predicted is every round of the runs over shaped links.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fluxlib.analysis.studies.bench import Row, row
from fluxlib.analysis.studies.scale import BLOCKS, replies
from fluxlib.devices import catalogue, clock
from fluxlib.federation.protocol.wire import Form, bits_per_weight
from fluxlib.methods.base import Work


@dataclass(frozen=True)
class Speed:
    """This machine, for one method."""

    factors: Mapping[str, float]
    """Measured over predicted seconds of each block of :data:`~fluxlib.analysis.studies.scale.BLOCKS`."""
    besides_s: float = 0.0
    """Seconds that a message to all takes besides: processes that start, waiting to be asked."""


@dataclass(frozen=True)
class Place:
    """What the clock is told: shapes, device, the link, and how weights travel (codes of FMQ do not, here)."""

    shapes: clock.Shapes
    device: catalogue.Device
    link: catalogue.Link
    wire: Form


def predicted(participants: pd.DataFrame, place: Place, speed: Speed) -> dict[int, float]:
    """Seconds of each round of one run, by the clock."""
    found = {}
    for number, replied in replies(participants).items():
        seconds = [_seconds(work, first, place, speed) for _, work, first in replied]
        times = 2 if any(first for _, _, first in replied) else 1  # a profile before the round is asked for by itself
        found[number] = clock.round_seconds(seconds, 0.0) + times * speed.besides_s
    return found


def calibrated(rounds: pd.DataFrame, participants: pd.DataFrame, place: Place) -> Speed:
    """This machine, from a run over a link that was not shaped: medians over replies and rounds."""
    ratios: dict[str, list[float]] = {block: [] for block in BLOCKS}
    for replied in replies(participants).values():
        for reply, work, _ in replied:
            said = clock.phase_seconds(_as_raced(work, place.wire), place.shapes, place.device, place.link)
            for block, phases in BLOCKS.items():
                took = np.nansum([getattr(reply, f"{phase}_wall_s") for phase in phases])
                if took and (expected := sum(said[phase] for phase in phases)):
                    ratios[block].append(float(took) / expected)
    speed = Speed({block: float(np.median(found)) for block, found in ratios.items() if found})
    known = predicted(participants, place, speed)
    took = rounds.set_index("round")["round_wall_s"]
    besides = [took[number] - seconds for number, seconds in known.items() if number > 1]  # the first asks for more
    return replace(speed, besides_s=float(np.median(besides)))


def rate(participants: pd.DataFrame, real: Place, tokens: int) -> float:
    """Bytes/s at which sending takes as many times as long as training here as it does at ``real``.

    Args:
        participants: of an FMD run; its last round is looked at, in which all that can travel does.
        tokens: of a sample of the real data sets.
    """
    replied, found = replies(participants), []
    for reply, work, _ in replied[max(replied)]:
        there = clock.phase_seconds(work, real.shapes, real.device, real.link, tokens)
        ratio = (there["download"] + there["upload"]) / (there["train"] + there["pcie"])
        sent = reply.downlink_bytes + reply.uplink_bytes
        found.append(sent / (ratio * reply.train_wall_s))
    return float(np.median(found))


def rows(rounds: pd.DataFrame, predicted_s: Mapping[int, float], setting: str) -> Iterator[Row]:
    """Scores over measured seconds, and each round's seconds as they were measured and :func:`predicted`."""
    for one in rounds.to_dict("records"):
        about = {"model": one["model"], "task": one["task"], "seed": one["seed"]}
        yield row("race_score", setting, one["metric"], x=one["wall_s"], **about)
        if one["round"]:
            for kind, seconds in (("measured", one["round_wall_s"]), ("predicted", predicted_s[one["round"]])):
                yield row("race_seconds", f"{setting}, {kind}", seconds, x=float(one["round"]), unit="s", **about)


def _seconds(work: Work, first: Work | None, place: Place, speed: Speed) -> clock.ParticipantSeconds:
    said = clock.participant_seconds(
        _as_raced(work, place.wire), first, place.shapes, place.device, place.link, tokens_per_sample=None
    )
    factors = {phase: speed.factors.get(block, 1.0) for block, phases in BLOCKS.items() for phase in phases}

    def here(seconds: Mapping[str, float]) -> dict[str, float]:
        # The host's memory is the device's here: what offloading adds is in the measured training.
        return {name: value * factors.get(name, 1.0) for name, value in seconds.items() if name != "pcie"}

    return replace(said, main=here(said.main), first=said.first and here(said.first))


def _as_raced(work: Work, wire: Form) -> Work:
    bits = bits_per_weight(wire)
    return replace(work, download_bits=bits, upload_bits=bits, hidden_profile=False)  # nodes profile before they train
