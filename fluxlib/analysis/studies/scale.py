"""Notebook 06: stored runs with their participants, and on other devices and links; the clock held against this machine
and against measured races."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fluxlib.analysis import store
from fluxlib.analysis.studies.bench import Row, interleaved
from fluxlib.analysis.studies.merging import PROBED_SAMPLES, PROBES, STEPS, Case, own_share_measured
from fluxlib.analysis.time_to_target import TARGET_FRACTION, crossing, final_score
from fluxlib.config import Offloading, RunConfig
from fluxlib.devices import catalogue, clock
from fluxlib.federation.store.tables import read_work
from fluxlib.methods.base import Work
from fluxlib.methods.local import size

BLOCKS = {"train": ("train",), "profile": ("quantize", "profile"), "merge": ("merge",), "probe": ("probe",)}
"""Measured block: phases of the clock that it consists of."""
RACE_FINAL = 2
"""The final score of a measured race is the mean of this many last rounds: a run has few."""
Reply = tuple[Any, Work, Work | None]
"""An accepted reply: its row of ``participants``, its work, and that of a profile made before the round."""


def with_crowds(rounds: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """``rounds`` with the numbers ``participants``, and ``participants_per_round``: all of them where none was set.

    Both are from what is stored beside each run in ``folder``.
    """
    found = store.configs(folder, rounds["run_id"].unique())
    runs = [found[run].federation for run in rounds["run_id"]]
    asked = [run.participants_per_round or run.participants for run in runs]
    return rounds.assign(participants=[run.participants for run in runs], participants_per_round=asked)


def with_works(participants: pd.DataFrame) -> set[str]:
    """Ids of the runs all of whose accepted replies have their work: older ones were stored without."""
    accepted = participants[participants["rejected"] == ""]
    return set(accepted["run_id"]) - set(accepted.loc[accepted["work"].isna(), "run_id"])


def replies(participants: pd.DataFrame) -> dict[int, list[Reply]]:
    """The accepted replies of one run, by round."""
    found: dict[int, list[Reply]] = {}
    accepted: Any = participants[participants["rejected"] == ""]
    for row in accepted.itertuples(index=False):
        found.setdefault(row.round, []).append((row, *read_work(row.work)))
    return found


def recounts(
    participants: pd.DataFrame,
    rounds: pd.DataFrame,
    runs: Mapping[str, RunConfig],
    fleets: Sequence[str | None],
    links: Sequence[str | None] = tuple(catalogue.LINKS),
    offloading: Offloading | None = None,
) -> pd.DataFrame:
    """Every run of ``rounds``, for every fleet and link, as the device clock counts it there, one below the other.

    What a participant did does not depend on its device: ``participants.work`` holds it, and the clock reads it anew.
    Nothing is trained again; scores and budgets stay what they were. The runs have works (:func:`with_works`);
    ``fleets``, ``links`` and ``offloading`` are the catalogue's, None: the run's own.

    Returns:
        ``rounds`` with other ``round_device_s``, ``server_device_s``, ``device_s`` and ``link``, and with ``fleet``.
    """
    by_run = {str(name): run.sort_values("round", kind="stable") for name, run in rounds.groupby("run_id", sort=False)}
    replied = {run_id: replies(participants[participants["run_id"] == run_id]) for run_id in by_run}
    found = []
    for fleet, link, run_id in itertools.product(fleets, links, by_run):
        run, counted = runs[run_id], []
        over, shapes = catalogue.link(link or run.clock.link), clock.shapes(run.sized_as)
        devices = catalogue.fleet(fleet, run.federation.participants) if fleet else None
        tokens, how = run.clock.tokens_per_sample, offloading or run.clock.offloading
        for number in by_run[run_id]["round"]:
            answers = replied[run_id].get(number, ())
            server_s, seconds = clock.server_seconds([work for _, work, _ in answers], shapes), []
            for row, work, first in answers:
                device = devices[row.participant] if devices else catalogue.DEVICES[row.device]
                seconds.append(clock.participant_seconds(work, first, shapes, device, over, tokens, how))
            counted.append((clock.round_seconds(seconds, server_s) if seconds else 0.0, server_s))
        totals, servers = zip(*counted, strict=True)
        since_start = list(itertools.accumulate(totals))
        table = by_run[run_id].assign(round_device_s=totals, server_device_s=servers, device_s=since_start)
        found.append(table.assign(link=over.name, fleet=fleet or run.clock.fleet))
    return pd.concat(found, ignore_index=True) if found else rounds.assign(fleet="")


def this_machine(size: int = 768, repeats: int = 5) -> catalogue.Device:
    """This machine on one thread: arithmetic of a 32-bit product, bandwidth of a copy that no cache holds."""
    left = torch.ones(size, size)
    block = torch.ones(2**24)
    times = interleaved({"product": lambda: left @ left, "copy": lambda: block.clone()}, repeats)
    product_s, copy_s = (max(min(times[name]), 1e-9) for name in ("product", "copy"))
    bandwidth = 2 * block.numel() * block.element_size() / copy_s
    return catalogue.Device(
        name="host", title="this machine, one thread", memory_bytes=2**40, unified=True,
        peak_flops=2 * size**3 / product_s, memory_bytes_per_s=bandwidth, bus_bytes_per_s=bandwidth,
        host_bytes_per_s=bandwidth, compute_frac=1.0, bandwidth_frac=1.0,
        sources={"all": "measured here"},
    )  # fmt: skip


def check_clock(cases: Iterable[Case], repeats: int, device: catalogue.Device) -> Iterator[Row]:
    """Rows ``clock_check``: seconds of each block, ``<block>, predicted`` and ``<block>, measured`` (median).

    ``device`` is :func:`this_machine`; all else is the clock as it stands, 16-bit weights included.
    """
    for case in cases:
        rows = list(own_share_measured([case], repeats))
        shapes = clock.shapes_of(case.bench.model)  # type: ignore[arg-type]
        predicted = clock.phase_seconds(_work(case), shapes, device, catalogue.LINKS["1gbps"])
        for block, phases in BLOCKS.items():
            found = [r["value"] for r in rows if r["study"] == "phase_wall_s" and r["setting"] == block]
            seconds = sum(predicted[phase] for phase in phases)
            yield case.bench.row("clock_check", f"{block}, measured", float(np.median(found)), unit="s")
            yield case.bench.row("clock_check", f"{block}, predicted", seconds, unit="s")


def _work(case: Case) -> Work:
    """The account of what :func:`fluxlib.analysis.studies.merging.own_share_measured` does."""
    (num_layers, _), num_experts, num_tuned = case.tuned.shape, case.tuned.numel(), int(case.tuned.sum())
    eight = {name: rows[:PROBED_SAMPLES] for name, rows in case.data[0].items()}
    trained, profiled, probed = (size(batches) for batches in ([case.data[0]] * STEPS, case.data[:2], [eight]))
    each = PROBES * (num_layers + 1) / num_layers
    return Work(
        num_experts=num_experts, num_tuned=num_tuned, num_updated=num_tuned, num_frozen=case.num_merged,
        num_merge_sources=num_experts - num_tuned, train_steps=STEPS, train_samples=trained[0], train_tokens=trained[1],
        profile_samples=profiled[0], profile_tokens=profiled[1], profile_bits=4, num_quantized=num_experts,
        probe_samples=probed[0], probe_tokens=probed[1],
        expert_probe_samples=round(each * probed[0]), expert_probe_tokens=round(each * probed[1]),
    )  # fmt: skip


def race_summary(table: pd.DataFrame, fraction: float = TARGET_FRACTION) -> pd.DataFrame:
    """A measured race, as ``benchmarks/race.py`` leaves it: who arrives when, and how far the device clock was off.

    One row per link and method: ``rounds``, ``final`` score, ``to_target_s`` to ``fraction`` of FMD's final score on
    that link (NaN: not reached), ``clock_error``: median over rounds of how far the predicted seconds are off.
    """
    table = table.join(table["setting"].str.split(", ", expand=True).set_axis(["method", "link", "kind"], axis=1))
    scores, seconds = (table[table["study"] == f"race_{name}"] for name in ("score", "seconds"))
    seconds = seconds.pivot(index=["link", "method", "x"], columns="kind", values="value")
    errors: Any = (seconds["predicted"] / seconds["measured"] - 1).abs()
    found = []
    for place, run in scores.groupby(["link", "method"], sort=False):
        fmd = scores[(scores["link"] == place[0]) & (scores["method"] == "fmd")]
        target = fraction * final_score(fmd["value"].tolist(), RACE_FINAL)
        found.append({
            "link": place[0], "method": place[1], "rounds": len(errors[place]),
            "final": final_score(run["value"].tolist(), RACE_FINAL),
            "to_target_s": crossing(run["x"].tolist(), run["value"].tolist(), target),
            "clock_error": errors[place].median(),
        })  # fmt: skip
    return pd.DataFrame(found)
