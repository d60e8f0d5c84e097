"""Figures of section 6: what forward passes know of utilities, who tunes what, and what comes of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap

from fluxlib import records
from fluxlib.analysis.runs import phase_shares
from fluxlib.analysis.time_to_target import TARGET_FRACTION, times_to_target
from fluxlib.analysis.wording import METRICS, percent
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, caption, drawn, footer, panels, study, unique

RUN = ["setting", "seed"]
MEASURES = {
    "cosine_distance": "cosine distance of utilities",
    "rank_correlation": "rank correlation of utilities",
    "bias": "bias of the squared norm",
    "spread": "relative spread of the squared norm",
}
PAPER_DISTANCE, TARGET_DISTANCE = 0.29, 0.20
LEVELS = {"merged": "#FFFFFF", "explored": "#F0C36D", "tuned": "#D55E00"}


# Tables


def roles_table(participants: pd.DataFrame) -> pd.DataFrame:
    """One row per expert that a participant exploited or explored in a round, of runs with ``setting`` and ``seed``."""
    kept = [*RUN, "round", "participant"]
    rows = participants.melt(kept, ["exploited", "explored"], "role", "expert")
    rows = rows.assign(expert=rows["expert"].str.split()).explode("expert").dropna(subset=["expert"])
    places = [records.read_experts(key)[0] for key in rows["expert"]]
    rows["layer"], rows["expert"] = zip(*places, strict=True)
    return rows[[*kept, "expert", "layer", "role"]].reset_index(drop=True)


def coverage(roles: pd.DataFrame, num_experts: int) -> pd.DataFrame:
    """Share of all experts that anybody has tuned so far (``covered_frac``), by setting, seed and round."""
    tuned = roles[roles["role"] == "exploited"].sort_values("round", kind="stable")
    new = tuned.assign(covered_frac=~tuned.duplicated([*RUN, "layer", "expert"]) / num_experts)
    found = new.groupby([*RUN, "round"], sort=False)["covered_frac"].sum().reset_index()
    return found.assign(covered_frac=found.groupby(RUN)["covered_frac"].cumsum())


def load(roles: pd.DataFrame, num_experts: int) -> pd.DataFrame:
    """How often each expert was tuned, by setting and seed: ``share`` of all tunings, most tuned first (``rank``)."""
    runs = roles[roles["role"] == "exploited"].groupby(RUN, sort=False)[["layer", "expert"]]
    ranked = {key: run.value_counts(normalize=True).reset_index(drop=True) for key, run in runs}
    every = {key: share.reindex(range(num_experts), fill_value=0.0) for key, share in ranked.items()}
    return pd.concat(every, names=[*RUN, "rank"]).rename("share").reset_index()


def outcomes(
    rounds: pd.DataFrame, participants: pd.DataFrame, reference: str, fraction: float = TARGET_FRACTION
) -> pd.DataFrame:
    """Every run of one model and task in one row: quality, time to target, coverage and load.

    ``reference``: the setting whose final score, mean over seeds, sets the target.

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
    kind = marks.hues("layer", layers) | {"style": "layer", "edgecolor": "black", "linewidth": 0.4}
    kind["markers"] = {layer: look.marker for layer, look in layers.items()}
    for ax, name in zip(axes[0], names, strict=True):
        ax.plot(ends, ends, color="black", linewidth=0.8, zorder=1)
        shown = wide.assign(**{name: wide[name].clip(lower=ends[0])})
        sns.scatterplot(shown, x="true", y=name, s=22, ax=ax, zorder=2, **kind)
        ax.set(title=name, xlabel="true utility", ylabel="estimated, one probe", xscale="log", yscale="log")
        ax.set(xlim=ends, ylim=ends)
    dots = {name: replace(look, dashes=(0, 1)) for name, look in layers.items()}
    marks.legend(axes[0, 0], dots, title="layer", ncols=2, fontsize=7)
    footer(figure, rows, f"{len(wide)} experts, one batch of 16 samples", seeds=f"seed {rows['seed'].iloc[0]}")
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
        kind = {"color": look.color, "marker": look.marker, "ls": (0, look.dashes or None), "capsize": 2}
        axes[1, 0].errorbar(own.index * 1.06**place, own["probe_bias"], 2 * own["probe_bias_error"], **kind)
    marks.reference(axes[1, 0], 0)
    ticks = sorted(passes["cost"].round(2).unique())
    axes[0, 0].set_xticks(ticks[:: max(1, len(ticks) // 5)], minor=False)
    axes[1, 0].xaxis.set_major_formatter("{x:g}")
    axes[1, 0].xaxis.set_minor_formatter("")
    marks.reference(axes[0, 0], PAPER_DISTANCE, f"paper: {PAPER_DISTANCE:.2f}")
    marks.reference(axes[0, 0], TARGET_DISTANCE, f"to reach: {TARGET_DISTANCE:.2f}")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 1].set_ylim(bottom=0)
    marks.legend(axes[1, 1], looks, loc="upper right", fontsize=7)
    counts = ", ".join(f"{x:g}" for x in sorted(rows["x"].unique()))
    footer(figure, rows, f"marks: {counts} probes per expert; bars: 2 standard errors")
    return figure


@drawn
def role_seconds(measured: pd.DataFrame, participants: pd.DataFrame) -> Picture:
    """Measured seconds of ways to learn one expert's utility, and the share of a round that probing takes."""
    rows = study(measured, "probe_seconds")
    figure, (left, right) = panels(rows, (7.4, 2.9), 1, 2)
    times = 1000 * rows.groupby("setting")["value"].median().sort_values()
    looks = style.colored({name: "#D55E00" if "per pass" in name else "#999999" for name in times.index})
    marks.bars(left, times.reset_index().assign(seed=0), "setting", "value", looks, fmt="{:.1f}", horizontal=True)
    left.set_xlabel("milliseconds per expert, measured here (median)")
    shares = phase_shares(participants).query("share > 0")
    clocks = shares["clock"].map({"device": "device clock", "wall": "measured here\n(no link)"})
    phases, shares = style.of_phases(shares["phase"]), shares.assign(percent=100 * shares["share"], clock=clocks)
    marks.stacked(right, shares, "clock", "phase", "percent", phases, horizontal=True)
    for place, probe in enumerate(shares[shares["phase"] == "probe"].groupby("clock", sort=False)["percent"].sum()):
        right.text(50, place - 0.45, f"probe {probe:.1f} %", ha="center", fontsize=7)
    right.set(xlabel="share of a participant's round (%)", xlim=(0, 100), ylim=(1.5, -0.7))
    marks.legend(right, phases, True, ncols=3, fontsize=6.5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    footer(figure, rows, f"right: {participants['setting'].iloc[0]}, round 2 on")
    return figure


@drawn
def role_map(roles: pd.DataFrame, num_experts: int) -> Picture:
    """Which experts (``num_experts`` a layer) the first four participants of a run tuned and explored, by round."""
    shown = [p for p in range(4) if p in set(roles["participant"])]
    num_layers, num_rounds = int(roles["layer"].max()) + 1, int(roles["round"].max())
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    size = 3.7 * columns, 0.7 + rows * max(1.7, 0.024 * num_layers * num_experts)
    figure, axes = panels(roles, size, rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    level = roles["role"].map({"explored": 1, "exploited": 2})
    for ax, participant in zip(axes.flat, shown, strict=False):
        part, grid = roles[roles["participant"] == participant], np.zeros((num_layers * num_experts, num_rounds))
        grid[part["layer"] * num_experts + part["expert"], part["round"] - 1] = level[part.index]
        look = {"vmax": 2, "cbar": False, "xticklabels": False, "yticklabels": False}
        marks.heat(ax, grid, "", cmap=ListedColormap(list(LEVELS.values())), **look)
        ax.hlines(np.arange(1, num_layers) * num_experts, 0, num_rounds, color="black", linewidth=0.7)
        ax.set_yticks((np.arange(num_layers) + 0.5) * num_experts, range(num_layers))
        rounds = np.arange(0, num_rounds, max(1, num_rounds // 5))
        ax.set_xticks(rounds + 0.5, rounds + 1)
        ax.set(title=f"participant {participant}", xlabel="round")
        ax.label_outer()
    figure.supylabel(f"MoE layer ({num_experts} experts each)", fontsize=9)
    marks.legend(figure, style.colored(LEVELS), filled=True, loc="outside upper right", ncols=3)
    for patch in figure.legends[0].get_patches():
        patch.set(edgecolor="black", hatch="")
    return figure


@drawn
def role_convergence(rounds: pd.DataFrame, varied: str = "assignment") -> Picture:
    """Score and test loss of runs that differ in one setting (``varied``), over rounds and over the device clock."""
    figure, axes = panels(rounds, (7.4, 4.6), 2, 2, sharex="col", sharey="row")
    looks, seeds = style.of_settings(rounds["setting"].unique()), rounds["seed"].nunique()
    titles = {"metric": METRICS.get(unique(rounds, "metric_name"), "score"), "loss": "test loss"}
    for ax, (column, clock) in zip(axes.flat, itertools.product(titles, ("round", "device_s")), strict=True):
        marks.curves(ax, rounds, clock, "setting", looks, column, errorbar=None, markevery=2)
        if seeds > 1:
            thin = marks.hues("setting", looks) | {"units": "seed", "estimator": None, "linewidth": 0.6, "alpha": 0.45}
            sns.lineplot(rounds.dropna(subset=["metric"]), x=clock, y=column, ax=ax, **thin)
        ax.set(xlabel=style.CLOCKS[clock], ylabel=titles[column])
        ax.label_outer()
    marks.legend(axes[1, 0], looks, title=varied, title_fontsize=8)
    footer(figure, rounds, seeds=f"{seeds} seeds: mean, and each one thin" if seeds > 1 else "1 seed")
    return figure


@drawn
def role_ablation(outcome: pd.DataFrame) -> Picture:
    """Final score, rounds and device seconds to target of :func:`outcomes`, one bar per setting, one mark per seed."""
    measures = {
        "final_metric": "final score",
        "round_to_target": "rounds to target",
        "device_s_to_target": "device seconds to target",
    }
    figure, axes = panels(outcome, (8.2, 2.8), 1, len(measures))
    names, seeds = list(outcome["setting"].unique()), outcome["seed"].nunique()
    looks = style.of_settings(names)
    for ax, (column, title) in zip(axes, measures.items(), strict=True):
        missed = outcome[column].isna().groupby(outcome["setting"]).sum()
        whole = outcome[outcome["setting"].map(missed) == 0]
        if column == "final_metric":  # a bar would have to begin at 0
            line = {"marker": "_", "markersize": 22, "markeredgewidth": 3, "errorbar": None, "order": names}
            sns.pointplot(whole, x="setting", y=column, ax=ax, **line, **marks.hues("setting", looks))
            marks.reference(ax, outcome["target"].iloc[0])
        else:
            marks.bars(ax, whole, "setting", column, looks)
        dots = {"palette": ["white"] * seeds, "edgecolor": "black", "linewidth": 0.8, "size": 3, "legend": False}
        dots |= {"hue": "seed", "dodge": seeds > 1, "jitter": False, "order": names}
        sns.stripplot(outcome, x="setting", y=column, ax=ax, **dots)
        for place, name in enumerate(names):
            if missed[name]:
                marks.missed(ax, place - 0.3, f"not reached: {missed[name]}/{(outcome['setting'] == name).sum()}")
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
        ax.set(title=title, xlabel="", ylabel="", xlim=(-0.6, len(names) - 0.4))
        ax.grid(axis="x", visible=False)
    share = percent(outcome["target_fraction"].iloc[0])
    footer(figure, outcome, f"dashed: target, {share} of {names[0]}'s mean final score", "marks: single seeds")
    return figure


@drawn
def role_coverage(roles: pd.DataFrame, rounds: pd.DataFrame) -> Picture:
    """How many experts anybody has tuned so far (of :func:`roles_table`), and how evenly the tuning is spread."""
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
    marks.legend(right, looks, fontsize=7, loc="lower right")
    seeds = rounds["seed"].nunique()
    caption(figure, unique(rounds, "model"), unique(rounds, "task"), f"mean of {seeds} seed(s)")
    return figure
