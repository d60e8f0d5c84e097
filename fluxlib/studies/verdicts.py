"""The paper's number beside ours, from the ``measurements`` table, and whether they agree.

Per seed: the mean over tasks; then the mean, smallest and largest over seeds. ``agrees in direction``: every seed
points the paper's way. ``agrees``: the mean also reaches the paper's size. ``does not``: anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

CLOCK_LINK = "1 Gb/s"
COLUMNS = ("claim", "paper", "reach", "ours", "smallest", "largest", "seeds", "verdict")


def profiling(table: pd.DataFrame) -> pd.DataFrame:
    """Section 4: unevenness, 4-bit error, staleness, round time."""
    uneven = by_seed(table, "activation", reduce="max", by="layer")
    age = {name: by_seed(table, "profile_age", f"{name}, a quarter tuned") for name in ("fresh", "stale")}
    merged = {name: by_seed(table, "stale_merge", name) for name in ("fresh", "stale")}
    saving = table[(table["study"] == "round_saving") & (table["setting"] == CLOCK_LINK)]
    return _frame([
        _line("busiest expert of the first layer over that of the last", "above 1", 1.0, uneven[:, 0] / uneven[:, -1]),
        _line("4-bit profile: error of the frequency", "0.1101", 0.1101, by_seed(table, "profile_error",
              "frequency error", x=4), "smaller"),
        _line("the same, against what this project set out to reach", "", 0.08, by_seed(table, "profile_error",
              "frequency error", x=4), "smaller"),
        _line("one round old: error added to the frequency", "under 0.02", 0.02, age["stale"] - age["fresh"],
              "smaller"),
        _line("one round old: error added to the merged model, relative", "under 0.02", 0.02,
              merged["stale"] / merged["fresh"] - 1, "smaller"),
        _line(f"profile beside upload and server: round time saved, best case at {CLOCK_LINK}", "0.282", 0.282,
              np.array([saving["value"].max()])),
    ])  # fmt: skip


def merging(table: pd.DataFrame) -> pd.DataFrame:
    """Section 5: discarding, depth, budgets, clustering, weights, overhead."""
    error = {name: by_seed(table, "error", name) for name in _settings(table, "error")}
    apart = {name: by_seed(table, "divergence", name) for name in _settings(table, "divergence")}
    lines = [
        _below("merged (adaptive) under discarded: error of the model", "lower", 0.0, error, "adaptive", "discarded"),
        _below("the same: divergence from the full model's predictions", "lower", 0.0, apart, "adaptive", "discarded"),
        _line("error of the first layer at the end, over that of the last", "above 1", 1.0, early_over_late(table)),
        _below("adaptive budgets under one slot per layer", "0.656", 0.656, error, "adaptive", "single"),
        _below("adaptive budgets under uniform", "0.476", 0.476, error, "adaptive", "uniform"),
        *(
            _below(f"beyond the paper: {kind} under {other}", size, float(size), error, kind, other)
            for kind in ("measured", "joint + squared gate")
            for other, size in (("single", "0.656"), ("uniform", "0.476"))
        ),
        _below("attention x frequency under frequency", "0.192", 0.192, error, "weights: attention x frequency",
               "weights: frequency"),
        _below("beyond the paper: squared gate under frequency", "0.192", 0.192, error, "weights: squared gate",
               "weights: frequency"),
        _below("beyond the paper: neurons aligned under not", "lower", 0.0, error, "aligned", "adaptive"),
        _below("beyond the paper: similar outputs under similar weights", "lower", 0.0, error, "outputs", "adaptive"),
    ]  # fmt: skip
    for shape in ("32 x 16 experts", "27 x 64 experts"):
        slow, fused = (by_seed(table, "clustering_seconds", f"{shape}, {m}", "median") for m in ("per layer", "fused"))
        lines.append(_line(f"fused clustering, {shape}: times faster", "40", 40.0, slow / fused))
        slow, fused = (by_seed(table, "clustering_inertia", f"{shape}, {m}") for m in ("per layer", "fused"))
        lines.append(_line(f"its inertia over the reference's, {shape}", "", 1.02, fused / slow, "smaller"))
    for x in (64, 512):
        share = by_seed(table, "own_share_device", f"{CLOCK_LINK}, overlapped", x=x)
        lines.append(_line(f"FLUX's own share of a round, {x} samples, {CLOCK_LINK}", "0.05", 0.05, share, "smaller"))
    return _frame(lines)


def roles(table: pd.DataFrame) -> pd.DataFrame:
    """Section 6: forward-only utilities, share of a round, assignment and epsilon."""
    distance = {name: by_seed(table, "probe_cosine_distance", name, x=1) for name in _settings(table, "probe_passes")}
    lines = [
        _line("utilities from one probe per expert, one-sided: cosine distance", "0.29", 0.29,
              distance["one-sided (paper)"], "smaller"),
        _line("the same, two-sided and guided", "", 0.20, distance["two-sided, guided"], "smaller"),
        _line("its cost, over two whole forward passes per expert", "", 1.0,
              by_seed(table, "probe_passes", "two-sided, guided", x=1) / 2, "smaller"),
        _line("its bias, in standard errors, all seeds together", "", 3.0, _pooled_bias(table, "two-sided, guided"),
              "smaller"),
    ]  # fmt: skip
    known = by_seed(table, "probe_rank_correlation", "frequency alone", x=0)
    guided = by_seed(table, "probe_rank_correlation", "two-sided, guided", x=1)
    lines.append(_line("its rank correlation with the true utilities, above that of frequency alone", "", 0.0,
                       guided - known))  # fmt: skip
    for clock in _settings(table, "probe_share"):
        share = by_seed(table, "probe_share", clock)
        lines.append(_line(f"share of a round spent on probes, {clock}", "0.05", 0.05, share, "smaller"))
    # Of these two the paper reports on epsilon alone.
    for group, paper in (("assignment", ""), ("epsilon", "ahead")):
        names = _settings(table, f"{group}_final_metric")
        score = {name: by_seed(table, f"{group}_final_metric", name) for name in names}
        time = {name: by_seed(table, f"{group}_device_s_at_least", name) for name in names}
        for other in names[1:]:
            gained, ratio = score[names[0]] - score[other], time[other] / time[names[0]]
            lines.append(_line(f"{names[0]} above {other}: final score", paper, 0.0, gained))
            lines.append(_line(f"{other} over {names[0]}: device seconds to target", paper, 1.0, ratio))
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


def judge(values: np.ndarray, reach: float, better: str = "larger", mean: float | None = None) -> str:
    """``agrees``, ``agrees in direction`` or ``does not`` for one value per seed.

    Args:
        reach: the size to reach. Where larger is better 0 is the point at which the direction turns (1 for a ratio
            whose size to reach is 1 or more); where smaller is better there is a size only.
        mean: another mean than the arithmetic one.
    """
    mean = float(np.mean(values)) if mean is None else mean
    if better == "smaller":
        return "agrees" if mean <= reach else "does not"
    turn = 1.0 if reach >= 1 else 0.0
    if not (np.asarray(values) > turn).all():
        return "does not"
    return "agrees" if mean >= reach else "agrees in direction"


def _line(claim: str, paper: str, reach: float, values: np.ndarray, better: str = "larger") -> tuple:
    summary = (float(np.mean(values)), float(np.min(values)), float(np.max(values)), len(values))
    return claim, paper, reach, *summary, judge(values, reach, better)


def _below(claim: str, paper: str, reach: float, values: dict[str, np.ndarray], better: str, worse: str) -> tuple:
    """How far ``better`` lies below ``worse``, as a share of it."""
    return _line(claim, paper, reach, 1 - values[better] / values[worse])


def _pooled_bias(table: pd.DataFrame, setting: str) -> np.ndarray:
    """``[1]``: mean bias over its standard error, of the seeds' independent estimates: their signs may cancel."""
    bias, error = (by_seed(table, study, setting, x=1) for study in ("probe_bias", "probe_bias_error"))
    return np.array([abs(bias.mean()) * len(bias) / np.sqrt(np.square(error).sum())])


def early_over_late(table: pd.DataFrame) -> np.ndarray:
    """Error at the model's end with the first layer alone merged, over that with the last, per seed; empty: none."""
    rows = table[table["study"] == "growth"]
    if rows.empty:
        return np.array([])
    last = rows[rows["layer"] == rows["layer"].max()]
    first, late = (last[last["x"] == x].groupby("seed")["value"].mean() for x in (0, last["x"].max()))
    return (first / late).to_numpy()


def _settings(table: pd.DataFrame, study: str) -> list[str]:
    return list(table.loc[table["study"] == study, "setting"].unique())


def by_seed(
    table: pd.DataFrame,
    study: str,
    setting: str | None = None,
    reduce: str = "mean",
    x: float | None = None,
    by: str | None = None,
) -> np.ndarray:
    """One value per seed ``[seeds]``, or per seed and layer ``[seeds, layers]``: reduced per task, then the mean."""
    rows = table[table["study"] == study]
    rows = rows if setting is None else rows[rows["setting"] == setting]
    rows = rows if x is None else rows[rows["x"] == x]
    keys = ["seed", "task"] + ([by] if by else [])
    values = rows.groupby(keys)["value"].agg(reduce).groupby(["seed"] + ([by] if by else [])).mean()
    return values.unstack(by).to_numpy(dtype=float) if by else values.to_numpy(dtype=float)


def _frame(lines: list[tuple]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(lines, columns=list(COLUMNS))
