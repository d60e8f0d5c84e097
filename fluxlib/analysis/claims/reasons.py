"""What the study notebooks' tables say on the reason of a verdict: told beside it, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from fluxlib.analysis.claims.measured import below, over
from fluxlib.analysis.statistics import geometric
from fluxlib.analysis.studies.verdicts import CLOCK_LINK, TYPICAL, by_seed, early_over_late
from fluxlib.analysis.wording import shown


def why_budgets(table: pd.DataFrame) -> str:
    """Where errors are made here, and what budgets from another objective come to."""
    parts = []
    ratios = early_over_late(table)
    if len(ratios):
        part = shown(geometric(ratios)[0], "%")
        parts.append(f"eq. 1 favours early layers; the first layer's error is {part} of the last's here")
    ours = list(_beyond(table))
    return "; ".join([*parts, *ours])


def _beyond(table: pd.DataFrame) -> Iterator[str]:
    joint = [below("error", "joint + squared gate", other)(table) for other in ("single", "uniform")]
    if all(map(len, joint)):
        shares = " / ".join(shown(float(values.mean()), "%") for values in joint)
        yield f"budgets and clusters from one objective (ours): {shares} below one slot / uniform"


def why_weights(table: pd.DataFrame) -> str:
    """How much attention differs between experts beside frequency, and what goes beyond it."""
    spread = {
        name: float(rows.groupby(["seed", "task", "layer"])["value"].agg(lambda v: v.std(ddof=0) / v.mean()).mean())
        for name, rows in table.groupby("study")
        if name in ("activation", "attention")
    }
    parts = []
    if len(spread) == 2:
        told = " and ".join(shown(spread[name], "%") for name in ("attention", "activation"))
        parts.append(f"attention and frequency vary by {told} between the experts of a layer")
    for setting, name in (("aligned", "neurons aligned"), ("weights: squared gate", "squared gate weights")):
        gained = below("error", setting, "weights: frequency")(table)
        if len(gained):
            parts.append(f"{name} (ours): {shown(float(gained.mean()), '%')}")
    return "; ".join(parts)


def why_share(table: pd.DataFrame) -> str:
    """The largest of FLUX's own phases, the share with more samples a round, and what overlap hides of it."""
    rows = table[table["study"] == "phase_device_s"]
    own = {name: rows[(rows["setting"] == f"{CLOCK_LINK}: {name}") & (rows["x"] == TYPICAL)]["value"].mean()
           for name in ("merge", "quantize", "profile", "probe")}  # fmt: skip
    parts = []
    if len(rows):
        largest = max(own, key=lambda name: own[name])
        parts.append(f"{largest} is {shown(own[largest] / sum(own.values()), '%')} of it")
    others = (("overlapped", TYPICAL, "with the profile hidden"), ("serial", 512, "with 512 samples"))
    for kind, samples, words in others:
        share = by_seed(table, "own_share_device", f"{CLOCK_LINK}, {kind}", x=samples)
        parts += [f"{shown(float(share.mean()), '%')} {words}"] if len(share) else []
    return "; ".join(parts)


def why_stale(table: pd.DataFrame) -> str:
    """What the stale profile costs where it is used: the merged model."""
    costs = over("stale_merge", "stale", "fresh")(table)
    if not len(costs):
        return ""
    fresh = float(by_seed(table, "profile_age", "fresh, a quarter tuned").mean())
    merged = shown(float(costs.mean()) - 1, "%")
    return f"a fresh profile is {shown(fresh, '%')} off; the model merged by a stale one has {merged} more error"


def why_saving(table: pd.DataFrame) -> str:
    """What can be hidden at most, and at which number of samples; no more than the best is told of the rest."""
    rows = table[(table["study"] == "round_saving") & (table["setting"] == CLOCK_LINK)].sort_values("value")
    least, best = rows.iloc[0], rows.iloc[-1]
    ends = [f"{shown(float(row['value']), '%')} at {row['x']:.0f} samples" for row in (best, least)]
    return f"only the profile can be hidden; at best {ends[0]}, at least {ends[1]}"


def why_probes(table: pd.DataFrame) -> str:
    """What the utilities would be without probes, and how well either ranks experts: a few large ones make a cosine."""
    told = []
    for study, name in (("probe_cosine_distance", "distance"), ("probe_rank_correlation", "rank correlation")):
        one, none = (by_seed(table, study, *where) for where in (("one-sided (paper)", 1), ("frequency alone", 0)))
        if len(one) and len(none):
            told.append(f"{name} {shown(float(one.mean()))}, of frequency alone {shown(float(none.mean()))}")
    return "; ".join(told)
