"""Figures of section 6: what forward passes know of utilities, who tunes what, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns

from fluxlib import records
from fluxlib.analysis.time_to_target import TARGET_FRACTION, times_to_target
from fluxlib.analysis.wording import METRICS, clock_shapes, interval_name, percent
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, caption, drawn, panels, study, unique

RUN = ["setting", "seed"]
MEASURES = {
    "cosine_distance": "cosine distance of utilities",
    "rank_correlation": "rank correlation of utilities",
    "bias": "bias of the squared norm",
    "spread": "relative spread of the squared norm",
}
PAPER_DISTANCE, TARGET_DISTANCE = 0.29, 0.20
LEVELS = {"merged": "#FFFFFF", "explored": "#F0C36D", "exploited": "#D55E00"}


# Tables


def roles_table(participants: pd.DataFrame) -> pd.DataFrame:
    """One row per expert that a participant exploited or explored in a round.

    Args:
        participants: the ``participants`` table of some runs, with the columns ``setting`` and ``seed``.
    """
    kept = [*RUN, "round", "participant"]
    parts = []
    for role in ("exploited", "explored"):
        frame = participants[kept].assign(expert=participants[role].str.split(), role=role)
        parts.append(frame.explode("expert").dropna(subset=["expert"]))
    rows = pd.concat(parts, ignore_index=True)
    places = [records.read_experts(key)[0] for key in rows["expert"]]
    rows["layer"], rows["expert"] = [layer for layer, _ in places], [expert for _, expert in places]
    return rows[[*kept, "expert", "layer", "role"]]


def coverage(roles: pd.DataFrame, num_experts: int) -> pd.DataFrame:
    """Share of all experts that anybody has tuned so far (``covered_frac``), by setting, seed and round."""
    tuned = roles[roles["role"] == "exploited"].sort_values("round", kind="stable")
    new = ~tuned.duplicated([*RUN, "layer", "expert"])
    found = (
        new.groupby([tuned[name] for name in (*RUN, "round")], sort=False).sum().rename("covered_frac").reset_index()
    )
    found["covered_frac"] = found.groupby(RUN)["covered_frac"].cumsum() / num_experts
    return found


def load(roles: pd.DataFrame, num_experts: int) -> pd.DataFrame:
    """How often each expert was tuned, by setting and seed: ``share`` of all tunings, most tuned first (``rank``)."""
    parts = []
    for key, run in roles[roles["role"] == "exploited"].groupby(RUN, sort=False):
        share = run[["layer", "expert"]].value_counts(normalize=True).to_numpy()
        share = np.concatenate([share, np.zeros(num_experts - len(share))])
        parts.append(pd.DataFrame(dict(zip(RUN, key, strict=True)) | {"rank": range(num_experts), "share": share}))
    return pd.concat(parts, ignore_index=True)


def outcomes(
    rounds: pd.DataFrame, participants: pd.DataFrame, reference: str, fraction: float = TARGET_FRACTION
) -> pd.DataFrame:
    """Every run in one row: quality, time to target, coverage and load.

    Args:
        rounds, participants: tables of some runs of one model and task, with the column ``setting``.
        reference: the setting whose final score, mean over seeds, sets the target.

    Returns:
        :func:`fluxlib.analysis.time_to_target.times_to_target` by setting, and ``final_loss``, ``mean_metric`` (over
        all scored rounds), ``covered_frac`` and ``load_cv``: standard deviation over mean of how often each expert was
        tuned.
    """
    num_experts = int(rounds["num_experts"].max())
    roles = roles_table(participants)
    table = times_to_target(rounds, fraction, reference, by="setting", pairs=("model", "task")).set_index(RUN)
    scored = rounds.dropna(subset=["metric"]).groupby(RUN)
    shares = load(roles, num_experts).groupby(RUN)["share"]
    table["final_loss"], table["mean_metric"] = scored["loss"].last(), scored["metric"].mean()
    table["covered_frac"] = coverage(roles, num_experts).groupby(RUN)["covered_frac"].last()
    table["load_cv"] = shares.std(ddof=0) / shares.mean()
    return table.reset_index()


def probe_shares(participants: pd.DataFrame) -> pd.DataFrame:
    """Mean share of each phase in a participant's round, by clock.

    ``device``: without the first round, whose download is another. ``wall``: what is measured, so without links.
    """
    kept = participants[(participants["rejected"] == "") & (participants["round"] > 1)]
    parts = []
    for clock in ("device", "wall"):
        seconds = pd.Series({phase: kept[f"{phase}_{clock}_s"].fillna(0.0).mean() for phase in records.PHASES})
        parts.append((seconds / seconds.sum()).rename_axis("phase").reset_index(name="share").assign(clock=clock))
    return pd.concat(parts, ignore_index=True)[["clock", "phase", "share"]]


# Pictures


@drawn
def role_utilities(measured: pd.DataFrame) -> Picture:
    """Estimated against true utilities of single experts: one panel per way to probe, one probe each, first seed."""
    every = study(measured, "utility")
    rows = every[every["seed"] == every["seed"].min()]
    wide = rows.pivot_table(index=["layer", "expert"], columns="setting", values="value", sort=False).reset_index()
    names = [name for name in pd.unique(rows["setting"]) if name != "true"]
    figure, axes = panels(every, (2.6 * len(names) + 0.6, 2.9), 1, len(names), sharex=True, sharey=True, squeeze=False)
    layers = style.in_shades(sorted(wide["layer"].unique()))
    values = wide[["true", *names]].to_numpy(dtype=float)
    ends = values[values > 0].min() / 2, values.max() * 2
    look: dict[str, Any] = {"hue": "layer", "style": "layer", "edgecolor": "black", "linewidth": 0.4}
    look["palette"] = {layer: shade.color for layer, shade in layers.items()}
    look["markers"] = {layer: shade.marker for layer, shade in layers.items()}
    for ax, name in zip(axes[0], names, strict=True):
        ax.plot(ends, ends, color="black", linewidth=0.8, zorder=1)
        sns.scatterplot(wide.assign(**{name: wide[name].clip(lower=ends[0])}), x="true", y=name, s=22, legend=False,
                        ax=ax, zorder=2, **look)  # fmt: skip
        ax.set(title=name, xlabel="true utility", ylabel="estimated, one probe", xscale="log", yscale="log")
        ax.set(xlim=ends, ylim=ends)
    marks.legend(
        axes[0, 0], [replace(look, dashes=(0, 1)) for look in layers.values()], title="layer", ncols=2, fontsize=7
    )
    told = f"seed {rows['seed'].iloc[0]}", f"{len(wide)} experts, one batch of 16 samples"
    caption(figure, _about(rows)[0], *told)
    return figure


@drawn
def role_probes(measured: pd.DataFrame) -> Picture:
    """Quality of probes over what they cost, in forward passes of the whole model per expert."""
    names = [f"probe_{name}" for name in (*MEASURES, "bias_error", "passes", "seconds")]
    shown = study(measured, *names)
    figure, axes = panels(shown, (7.4, 5.0), 2, 2, sharex=True)
    passes = study(shown, "probe_passes").groupby(["setting", "x"])["value"].mean().rename("cost").reset_index()
    rows = shown.merge(passes, on=["setting", "x"])
    looks = style.of_settings(rows["setting"].unique())
    for ax, (name, title) in zip(axes.flat, MEASURES.items(), strict=True):
        own = study(shown, f"probe_{name}")
        if name != "bias":
            marks.lines(ax, study(rows, f"probe_{name}"), "cost", "value", "setting", looks)
        if (own["x"] == 0).any():
            free = own.loc[own["x"] == 0, "value"].mean()
            marks.reference(ax, free, f"frequency alone, no pass: {free:.2f}")
        ax.set(title=title, xscale="log", xlabel="forward passes per expert", ylabel="")
    for place, (name, look) in enumerate(looks.items()):
        own = rows[rows["setting"] == name].pivot_table(index="cost", columns="study", values="value")
        # Side by side, since these error bars would hide each other.
        axes[1, 0].errorbar(own.index * 1.06**place, own["probe_bias"], 2 * own["probe_bias_error"], color=look.color,
                            marker=look.marker, ls=(0, look.dashes or None), capsize=2)  # fmt: skip
    axes[1, 0].axhline(0, color="black", linewidth=0.8)
    ticks = sorted(passes["cost"].round(2).unique())
    axes[0, 0].set_xticks(ticks[:: max(1, len(ticks) // 5)], minor=False)
    axes[1, 0].xaxis.set_major_formatter("{x:g}")
    axes[1, 0].xaxis.set_minor_formatter("")
    marks.reference(axes[0, 0], PAPER_DISTANCE, f"paper: {PAPER_DISTANCE:.2f}")
    marks.reference(axes[0, 0], TARGET_DISTANCE, f"to reach: {TARGET_DISTANCE:.2f}")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 1].set_ylim(bottom=0)
    marks.legend(axes[1, 1], looks.values(), loc="upper right", fontsize=7)
    counts = ", ".join(f"{x:g}" for x in sorted(rows["x"].unique()))
    caption(figure, *_about(rows), f"marks: {counts} probes per expert; bars: 2 standard errors")
    return figure


@drawn
def role_seconds(measured: pd.DataFrame, participants: pd.DataFrame) -> Picture:
    """Measured seconds of ways to learn one expert's utility, and what share of a round probing takes on both clocks.

    Args:
        measured: the ``measurements`` table; its study ``probe_seconds`` is drawn.
        participants: the ``participants`` table of the runs whose shares (:func:`probe_shares`) are drawn.
    """
    rows = study(measured, "probe_seconds")
    figure, (left, right) = panels(rows, (7.4, 2.9), 1, 2)
    times = 1000 * rows.groupby("setting")["value"].median().sort_values()
    looks = style.of_settings(times.index)
    looks = {name: replace(look, color="#D55E00" if "per pass" in name else "#999999", hatch="")
             for name, look in looks.items()}  # fmt: skip
    marks.bars(left, times.reset_index().assign(seed=0), "setting", "value", looks, fmt="{:.1f}", horizontal=True)
    left.set_xlabel("milliseconds per expert, measured here (median)")
    shares = probe_shares(participants)
    shares = shares.assign(percent=100 * shares["share"], clock=shares["clock"].map(
        {"device": "device clock", "wall": "measured here\n(no link)"}))[shares["share"] > 0]  # fmt: skip
    phases = style.of_phases(shares["phase"])
    marks.stacked(right, shares, "clock", "phase", "percent", phases, horizontal=True)
    for place, (_, own) in enumerate(shares.groupby("clock", sort=False)):
        probe = own.loc[own["phase"] == "probe", "percent"].sum()
        right.annotate(
            f"probe {probe:.1f} %", (50, place), (0, 22), textcoords="offset points", ha="center", fontsize=7
        )
    right.set(xlabel="share of a participant's round (%)", xlim=(0, 100), ylim=(1.5, -0.7))
    marks.legend(right, phases.values(), True, ncols=3, fontsize=6.5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    seeds = rows["seed"].nunique()
    told = f"{seeds} seeds" if seeds > 1 else "1 seed", f"right: {participants['setting'].iloc[0]}, round 2 on"
    caption(figure, _about(rows)[0], *told)
    return figure


@drawn
def role_map(roles: pd.DataFrame, num_experts: int, participants: Sequence[int] = (0, 1, 2, 3)) -> Picture:
    """Which experts some participants tuned and explored, round by round: one map per participant.

    Args:
        roles: of :func:`roles_table`, one run.
        num_experts: experts per layer.
    """
    from matplotlib.colors import ListedColormap

    shown = [p for p in participants if p in set(roles["participant"])]
    num_layers, num_rounds = int(roles["layer"].max()) + 1, int(roles["round"].max())
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    size = 3.7 * columns, 0.7 + rows * max(1.7, 0.024 * num_layers * num_experts)
    figure, axes = panels(roles, size, rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, participant in zip(axes.flat, shown, strict=False):
        grid = np.zeros((num_layers * num_experts, num_rounds))
        for level, role in enumerate(LEVELS):
            part = roles[(roles["participant"] == participant) & (roles["role"] == role)]
            grid[part["layer"] * num_experts + part["expert"], part["round"] - 1] = level
        look = {"vmax": 2, "cbar": False, "xticklabels": False, "yticklabels": False}
        marks.heat(ax, grid, "", cmap=ListedColormap(list(LEVELS.values())), **look)
        ax.hlines(np.arange(1, num_layers) * num_experts, 0, num_rounds, color="black", linewidth=0.7)
        ax.set_yticks((np.arange(num_layers) + 0.5) * num_experts, range(num_layers))
        rounds = np.arange(0, num_rounds, max(1, num_rounds // 5))
        ax.set_xticks(rounds + 0.5, rounds + 1)
        ax.set(title=f"participant {participant}", xlabel="round")
        ax.label_outer()
    figure.supylabel(f"MoE layer ({num_experts} experts each)", fontsize=9)
    levels = [style.Style({"exploited": "tuned"}.get(name, name), color, "", "", "") for name, color in LEVELS.items()]
    marks.legend(figure, levels, filled=True, loc="outside upper right", ncols=3)
    for patch in figure.legends[0].get_patches():
        patch.set_edgecolor("black")
    return figure


@drawn
def role_convergence(
    rounds: pd.DataFrame, clocks: Sequence[str] = ("round", "device_s"), varied: str = "assignment"
) -> Picture:
    """Score and test loss of runs that differ in one setting, over rounds and over the device clock.

    Args:
        rounds: the ``rounds`` table of runs of one model and task, with the column ``setting``.
        varied: what the settings are settings of, for the legend.
    """
    figure, axes = panels(rounds, (3.7 * len(clocks), 4.6), 2, len(clocks), sharex="col", sharey="row", squeeze=False)
    looks = style.of_settings(rounds["setting"].unique())
    scored, seeds = rounds.dropna(subset=["metric"]), rounds["seed"].nunique()
    means = scored.assign(**{clock: scored.groupby(["setting", "round"])[clock].transform("mean") for clock in clocks})
    metric = METRICS.get(unique(rounds, "metric_name"), "score")
    for row, (column, title) in zip(axes, {"metric": metric, "loss": "test loss"}.items(), strict=True):
        for ax, clock in zip(row, clocks, strict=True):
            marks.lines(ax, means, clock, column, "setting", looks, errorbar=None, markevery=2)
            if seeds > 1:
                colors = {name: look.color for name, look in looks.items()}
                sns.lineplot(scored, x=clock, y=column, hue="setting", palette=colors, units="seed", estimator=None,
                             linewidth=0.6, alpha=0.45, legend=False, ax=ax)  # fmt: skip
            ax.set(xlabel=style.CLOCKS[clock], ylabel=title)
            ax.label_outer()
    marks.legend(axes[1, 0], looks.values(), title=varied, title_fontsize=8)
    shown = f"{seeds} seeds: mean, and each one thin" if seeds > 1 else "1 seed"
    caption(figure, _about(rounds)[0], shown, f"device clock: shapes of {clock_shapes(rounds)}")
    return figure


@drawn
def role_ablation(outcome: pd.DataFrame) -> Picture:
    """Final score, rounds and device seconds to target, one bar per setting, one mark per seed.

    Args:
        outcome: of :func:`outcomes`.
    """
    measures = {
        "final_metric": "final score",
        "round_to_target": "rounds to target",
        "device_s_to_target": "device seconds to target",
    }
    figure, axes = panels(outcome, (8.2, 2.8), 1, len(measures))
    looks, seeds = style.of_settings(outcome["setting"].unique()), outcome["seed"].nunique()
    for ax, (column, title) in zip(axes, measures.items(), strict=True):
        missed = outcome[column].isna().groupby(outcome["setting"]).sum()
        whole = outcome[outcome["setting"].map(missed) == 0]
        if column == "final_metric":  # a bar would have to begin at 0
            sns.pointplot(whole, x="setting", y=column, hue="setting", order=list(looks), errorbar=None, legend=False,
                          palette={name: look.color for name, look in looks.items()}, marker="_", markersize=22,
                          markeredgewidth=3, ax=ax)  # fmt: skip
            marks.reference(ax, outcome["target"].iloc[0])
        else:
            marks.bars(ax, whole, "setting", column, looks)
        if seeds > 1 or column == "final_metric":
            white = {"palette": ["white"] * seeds, "size": 3, "edgecolor": "black", "linewidth": 0.8}
            sns.stripplot(outcome, x="setting", y=column, hue="seed", order=list(looks), dodge=seeds > 1, jitter=False,
                          legend=False, ax=ax, **white)  # fmt: skip
        for place, name in enumerate(looks):
            if missed[name]:
                text = f"not reached: {missed[name]}/{(outcome['setting'] == name).sum()}"
                marks.missed(ax, place - 0.3, text)
        ax.set_xticks(range(len(looks)), list(looks), rotation=30, ha="right")
        ax.set(title=title, xlabel="", ylabel="", xlim=(-0.6, len(looks) - 0.4))
        ax.grid(axis="x", visible=False)
    share = percent(outcome["target_fraction"].iloc[0])
    dashed = f"dashed: target, {share} of {outcome['setting'].iloc[0]}'s mean final score"
    told = f"{interval_name(seeds)}; marks: single seeds" if seeds > 1 else "1 seed"
    caption(figure, _about(outcome)[0], dashed, told, f"device clock: shapes of {clock_shapes(outcome)}")
    return figure


@drawn
def role_coverage(roles: pd.DataFrame, rounds: pd.DataFrame) -> Picture:
    """How many experts anybody has tuned so far, and how evenly the tuning is spread over experts.

    Args:
        roles: of :func:`roles_table`.
        rounds: the ``rounds`` table of the same runs.
    """
    num_experts = int(rounds["num_experts"].max())
    covered, loads = coverage(roles, num_experts), load(roles, num_experts)
    figure, (left, right) = panels(covered, (7.4, 2.8), 1, 2)
    looks = style.of_settings(roles["setting"].unique())
    covered = covered.assign(percent=100 * covered["covered_frac"])
    marks.lines(left, covered, "round", "percent", "setting", looks, errorbar=None, markevery=3)
    loads["percent"] = 100 * loads.groupby(RUN)["share"].cumsum()
    loads["experts"] = 100 * (loads["rank"] + 1) / num_experts
    marks.lines(right, loads, "experts", "percent", "setting", looks, errorbar=None, markevery=max(1, num_experts // 6))
    right.plot([0, 100], [0, 100], color="black", linewidth=0.8)
    left.set(xlabel="round", ylabel="experts tuned so far (%)", ylim=(0, 103))
    right.set(xlabel="experts, most tuned first (%)", ylabel="share of all tunings (%)", xlim=(0, 100), ylim=(0, 103))
    right.annotate("even", (62, 62), (4, -10), textcoords="offset points", fontsize=7)
    marks.legend(right, looks.values(), fontsize=7, loc="lower right")
    seeds = rounds["seed"].nunique()
    caption(figure, _about(rounds)[0], f"mean of {seeds} seeds" if seeds > 1 else "1 seed")
    return figure


def _about(frame: pd.DataFrame) -> tuple[str, str]:
    """Model and task, and what bands are, for a caption."""
    return f"{unique(frame, 'model')}, {unique(frame, 'task')}", interval_name(frame["seed"].nunique())
