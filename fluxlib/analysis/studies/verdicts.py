"""The paper's number beside ours, from the ``measurements`` table, and whether they agree: one rule for all.

Per seed: the mean over tasks; two settings are compared seed by seed, each by its mean over the tasks that both have
(:func:`paired`). Values meet by the number of their seed, never by their place. Then, with what would be no effect at
all as ``null`` (1 for a ratio, 0 for a difference, or what is measured without the thing):

- ``agrees``: the mean over seeds (the geometric one of ratios) reaches the paper's size as printed, every seed *and*
  the 95 % t interval over seeds lie on the paper's side of the null, and there are at least :data:`MIN_SEEDS` seeds;
- ``agrees in direction``: every seed, *or* the interval, lies on the paper's side of the null;
- ``does not``: anything else.

Where the paper has a direction only, its size is the null. Where the sign cannot come out otherwise (a share, an error,
a saving that the clock's model makes positive), a sign says nothing: the paper's size is the null, and all or most must
reach it. What is modelled has no seeds; one number is all there is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxlib.analysis.statistics import geometric, interval

if TYPE_CHECKING:
    import pandas as pd

AGREES, DIRECTION, DIFFERS = "agrees", "agrees in direction", "does not"
MIN_SEEDS = 3
"""With fewer there is no t interval (:func:`fluxlib.analysis.statistics.interval`): what they show agrees in direction at most."""
CLOCK_LINK = "1 Gb/s"
TYPICAL = 64
"""Samples that a participant trains on in a typical round."""
COLUMNS = ("claim", "paper", "reach", "ours", "smallest", "largest", "seeds", "verdict")


def profiling(table: pd.DataFrame) -> pd.DataFrame:
    """Section 4: unevenness, 4-bit error, staleness, round time."""
    uneven = by_layer(table, "activation", "max")
    fresh, stale = paired(table, "profile_age", "fresh, a quarter tuned", "stale, a quarter tuned")
    merged = paired(table, "stale_merge", "stale", "fresh")
    saving = by_seed(table, "round_saving", CLOCK_LINK, x=TYPICAL)
    return _frame([
        _line("busiest expert of the first layer over that of the last", "above 1", 1.0,
              uneven.iloc[:, 0] / uneven.iloc[:, -1], ratio=True),
        _line("4-bit profile: error of the frequency", "0.1101", 0.1101, by_seed(table, "profile_error",
              "frequency error", x=4), "smaller"),
        _line("the same, against what this project set out to reach", "", 0.08, by_seed(table, "profile_error",
              "frequency error", x=4), "smaller"),
        _line("one round old: error added to the frequency", "under 0.02", 0.02, stale - fresh, "smaller"),
        _line("one round old: error added to the merged model, relative", "under 0.02", 0.02,
              merged[0] / merged[1] - 1, "smaller"),
        _line(f"profile beside upload and server: round time saved, {TYPICAL} samples, {CLOCK_LINK}", "0.282", 0.282,
              saving, null=0.282, seeded=False),
    ])  # fmt: skip


def merging(table: pd.DataFrame) -> pd.DataFrame:
    """Section 5: discarding, depth, budgets, clustering, weights, overhead."""
    error, apart = (table[table["study"] == name] for name in ("error", "divergence"))
    lines = [
        _below("merged (adaptive) under discarded: error of the model", "lower", 0.0, error, "adaptive", "discarded"),
        _below("the same: divergence from the full model's predictions", "lower", 0.0, apart, "adaptive", "discarded"),
        _line("error of the first layer at the end, over that of the last", "above 1", 1.0, early_over_late(table),
              ratio=True),
        _below("adaptive budgets under one slot per layer", "0.656", 0.656, error, "adaptive", "single"),
        _below("adaptive budgets under uniform", "0.476", 0.476, error, "adaptive", "uniform"),
        *(
            _below(f"beyond the paper: {kind} under {other}", size, float(size), error, kind, other)
            for kind in ("measured", "joint + squared gate")
            for other, size in (("single", "0.656"), ("uniform", "0.476"))
        ),
        _below("attention x frequency under frequency", "0.192", 0.192, error,
               "weights: attention x frequency", "weights: frequency"),
        _below("beyond the paper: squared gate under frequency", "0.192", 0.192, error, "weights: squared gate",
               "weights: frequency"),
        _below("beyond the paper: neurons aligned under not", "lower", 0.0, error, "aligned", "adaptive"),
        _below("beyond the paper: similar outputs under similar weights", "lower", 0.0, error, "outputs", "adaptive"),
    ]  # fmt: skip
    for shape in ("32 x 16 experts", "27 x 64 experts"):
        one, other = (f"{shape}, {kind}" for kind in ("per layer", "fused"))
        slow, fused = paired(table, "clustering_seconds", one, other, "median")
        lines.append(_line(f"fused clustering, {shape}: times faster", "40", 40.0, slow / fused, ratio=True))
        slow, fused = paired(table, "clustering_inertia", one, other)
        lines.append(_line(f"its inertia over the reference's, {shape}", "", 1.02, fused / slow, "smaller",
                           ratio=True))  # fmt: skip
    for x in (TYPICAL, 512):
        share = by_seed(table, "own_share_device", f"{CLOCK_LINK}, serial", x=x)
        lines.append(_line(f"FLUX's own share of a round, {x} samples, {CLOCK_LINK}, nothing hidden", "0.05", 0.05,
                           share, "smaller", seeded=False))  # fmt: skip
    return _frame(lines)


def roles(table: pd.DataFrame) -> pd.DataFrame:
    """Section 6: forward-only utilities, share of a round, assignment and epsilon."""
    distance = {name: by_seed(table, "probe_cosine_distance", name, x=1) for name in _settings(table, "probe_passes")}
    known = by_seed(table, "probe_cosine_distance", "frequency alone", x=0)
    one_sided, without = beside(distance["one-sided (paper)"], known)
    two_sided, too = beside(distance["two-sided, guided"], known)
    lines = [
        _line("utilities from one probe per expert, one-sided: cosine distance", "0.29",
              0.29, one_sided, "smaller", null=without),
        _line("the same, two-sided and guided", "", 0.20, two_sided, "smaller", null=too),
        _line("its cost, over two whole forward passes per expert", "", 1.0,
              by_seed(table, "probe_passes", "two-sided, guided", x=1) / 2, "smaller", ratio=True),
        _line("its bias, in standard errors, all seeds together", "", 3.0, _pooled_bias(table, "two-sided, guided"),
              "smaller", seeded=False),
    ]  # fmt: skip
    ranked = by_seed(table, "probe_rank_correlation", "frequency alone", x=0)
    guided = by_seed(table, "probe_rank_correlation", "two-sided, guided", x=1)
    lines.append(_line("its rank correlation with the true utilities, above that of frequency alone", "", 0.0,
                       (guided - ranked).dropna()))  # fmt: skip
    for clock in _settings(table, "probe_share"):
        share = by_seed(table, "probe_share", clock)
        lines.append(_line(f"share of a round spent on probes, {clock}", "0.05", 0.05, share, "smaller"))
    # Of these two the paper reports on epsilon alone.
    for group, paper in (("assignment", ""), ("epsilon", "ahead")):
        names = _settings(table, f"{group}_final_metric")
        for other in names[1:]:
            ours, theirs = paired(table, f"{group}_final_metric", names[0], other)
            own_s, other_s = paired(table, f"{group}_device_s_at_least", names[0], other)
            lines.append(_line(f"{names[0]} above {other}: final score", paper, 0.0, ours - theirs))
            lines.append(_line(f"{other} over {names[0]}: device seconds to target", paper, 1.0, other_s / own_s,
                               ratio=True))  # fmt: skip
    return _frame(lines)


def sentences(verdicts: pd.DataFrame, where: str) -> str:
    """One bullet per claim, in Markdown: the paper's number, ours, and the verdict."""
    bullets = []
    for item in verdicts.to_dict("records"):
        spread = (
            "" if item["seeds"] < 2 else f" ({item['smallest']:.3g} to {item['largest']:.3g}, {item['seeds']} seeds)"
        )
        paper = f"paper {item['paper']}" if item["paper"] else f"to reach {item['reach']:g}"
        bullets.append(f"- {item['claim']}: {paper}, ours **{item['ours']:.3g}**{spread}: *{item['verdict']}*")
    return f"On {where}:\n\n" + "\n".join(bullets)


def judge(
    values: np.ndarray | pd.Series,
    reach: float,
    better: str = "larger",
    null: float | np.ndarray | pd.Series | None = None,
    ratio: bool = False,
    seeded: bool = True,
) -> str:
    """The rule above for one value per seed.

    Args:
        reach: the paper's size.
        null: no effect, one for all or one per value (:func:`beside`). None: 1 or 0, whichever is the largest below or
            at ``reach``; where smaller is better, ``reach`` itself.
        ratio: average geometrically.
        seeded: whether values differ by seed; if not, one is enough.
    """
    values, sign = np.asarray(values, dtype=float), -1.0 if better == "smaller" else 1.0
    size_is_null = better == "smaller" if null is None else bool(np.all(null == reach))
    default = reach if better == "smaller" else 1.0 if reach >= 1 else 0.0
    none = np.asarray(default if null is None else null, dtype=float)
    mean = geometric(values)[0] if ratio else float(values.mean())
    gains = sign * (np.log(values) - np.log(none) if ratio else values - none)
    worst = (float(gains.min()), interval(gains)[1])
    every, apart = (low >= 0 if size_is_null else low > 0 for low in worst)  # "at most 5 %" is kept by 5 %
    return verdict(sign * (mean - reach) >= 0, every, apart, len(values) if seeded else MIN_SEEDS)


def verdict(reached: bool, every: bool, apart: bool, seeds: int) -> str:
    """The rule: is the size reached, is every seed on the paper's side, is the interval, how many seeds are there?"""
    if not (every or apart):
        return DIFFERS
    return AGREES if reached and every and apart and seeds >= MIN_SEEDS else DIRECTION


def weakest(verdicts: Iterable[str]) -> str:
    """The verdict on a claim that is made of several, all of which must hold."""
    order = (AGREES, DIRECTION, DIFFERS)
    return max(verdicts, key=order.index)


def beside(values: pd.Series, null: pd.Series) -> tuple[pd.Series, pd.Series | None]:
    """Values and no effect, both by seed, of the seeds that have both; all values and None if no effect is empty."""
    if null.empty:
        return values, None
    both = values.index.intersection(null.index)
    return values.loc[both], null.loc[both]


def _line(
    claim: str, paper: str, reach: float, values: Any, better: str = "larger", ratio: bool = False, **more: Any
) -> tuple:
    mean = geometric(values)[0] if ratio else float(np.mean(values))
    summary = (mean, float(np.min(values)), float(np.max(values)), len(values))
    return claim, paper, reach, *summary, judge(values, reach, better, ratio=ratio, **more)


def _below(claim: str, paper: str, reach: float, rows: pd.DataFrame, better: str, worse: str) -> tuple:
    """How far ``better`` lies below ``worse``, as a share of it, in the rows of one study."""
    one, other = paired(rows, rows["study"].iloc[0], better, worse)
    return _line(claim, paper, reach, 1 - one / other)


def _pooled_bias(table: pd.DataFrame, setting: str) -> np.ndarray:
    """``[1]``: mean bias over its standard error, of the seeds' independent estimates: their signs may cancel."""
    bias, error = (by_seed(table, study, setting, x=1) for study in ("probe_bias", "probe_bias_error"))
    bias, error = bias.align(error, join="inner")
    return np.array([abs(bias.mean()) * len(bias) / np.sqrt(np.square(error).sum())])


def early_over_late(table: pd.DataFrame) -> pd.Series:
    """Error at the model's end with the first layer alone merged, over that with the last, by seed; empty: none."""
    rows = table[table["study"] == "growth"]
    first, last = ends(rows[rows["layer"] == rows["layer"].max()], "growth")
    return first / last


def ends(rows: pd.DataFrame, study: str) -> tuple[pd.Series, pd.Series]:
    """One study at its first place ``x`` and at its last, each by seed; empty where there is one place only."""
    places = {rows["x"].min(): "first", rows["x"].max(): "last"}
    return paired(rows.assign(setting=rows["x"].map(places)), study, "first", "last")


def _settings(table: pd.DataFrame, study: str) -> list[str]:
    return list(table.loc[table["study"] == study, "setting"].unique())


def by_seed(table: pd.DataFrame, study: str, setting: str | None = None, x: float | None = None) -> pd.Series:
    """One value per seed: the mean per task, then over tasks."""
    rows = table[table["study"] == study]
    rows = rows if setting is None else rows[rows["setting"] == setting]
    rows = rows if x is None else rows[rows["x"] == x]
    return rows.groupby(["seed", "task"])["value"].mean().groupby("seed").mean()


def by_layer(table: pd.DataFrame, study: str, reduce: str) -> pd.DataFrame:
    """One value per seed (row) and layer (column): reduced over experts per task, then the mean over tasks."""
    rows = table[table["study"] == study]
    per_task = rows.groupby(["seed", "layer", "task"])["value"].agg(reduce)
    return per_task.groupby(["seed", "layer"]).mean().unstack("layer")


def paired(table: pd.DataFrame, study: str, one: str, other: str, reduce: str = "mean") -> tuple[pd.Series, pd.Series]:
    """Two settings of one study, each by seed: the mean over tasks, of the seeds and tasks that both have."""
    rows = table[table["study"] == study]
    wide = [rows[rows["setting"] == name].groupby(["seed", "task"])["value"].agg(reduce) for name in (one, other)]
    both = wide[0].index.intersection(wide[1].index)
    first, second = (part.loc[both].groupby("seed").mean().astype(float) for part in wide)
    return first, second


def _frame(lines: list[tuple]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(lines, columns=list(COLUMNS))
