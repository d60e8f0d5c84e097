"""Figures of section 5: what merging costs, and what makes it cost less."""

from __future__ import annotations

import pandas as pd
import seaborn as sns

from fluxlib.analysis.runs import OWN_PHASES
from fluxlib.figures import marks, style
from fluxlib.figures.picture import Picture, drawn, footer, panels, split, study

BUDGETS = {"single": "one slot", "uniform": "uniform", "adaptive": "adaptive\n(eq. 1)", "joint": "joint"}
OPTIONS = {
    "weights: mean": "mean of experts",
    "weights: frequency": "frequency",
    "weights: attention x frequency": "attention x frequency (eq. 2)",
    "weights: squared gate": "squared gate",
    "aligned": "eq. 2, neurons aligned",
    "joint + squared gate": "joint, squared gate",
    "joint + squared gate + aligned": "joint, squared gate, aligned",
}
RANGE = ("pi", 100)
"""From the smallest to the largest seed: on a logarithmic axis a t interval of few seeds may reach below zero."""


@drawn
def discarding(table: pd.DataFrame) -> Picture:
    """Error, and distance from the full model's predictions, when what is not tuned is dropped or merged."""
    titles = {"discarded": "dropped", "single": "one slot\nper layer", "adaptive": "merged\n(paper)"}
    titles["joint + squared gate"] = "merged\n(joint)"
    figure, axes = panels(study(table, "error", "divergence"), (7.6, 2.7), 1, 2)
    measures = {"error": "error of the last hidden state", "divergence": "divergence (nats/token)"}
    for ax, (name, label) in zip(axes, measures.items(), strict=True):
        marks.bars(ax, study(table, name), "setting", "value", style.of_settings(titles), fmt="{:.3f}")
        ax.set_ylabel(label)
    footer(figure, study(table, "error"), "before any training")
    return figure


@drawn
def error_growth(table: pd.DataFrame) -> Picture:
    """How the error of one merged layer travels, and how errors of all layers accumulate."""
    rows = study(table, "growth")
    figure, (left, right) = panels(study(table, "growth", "accumulated"), (7.6, 3.0), 1, 2, sharey=True)
    layers = style.in_shades(sorted(rows["x"].unique()))
    marks.lines(left, rows, "layer", "value", "x", layers, errorbar=RANGE, err_style="bars", err_kws={"capsize": 2})
    left.set(ylabel="error of the hidden state", yscale="log", ylim=(0.01, 2))
    marks.legend(left, layers, title="merged alone: layer", fontsize=7, title_fontsize=7, ncols=2)
    both = style.of_settings({"discarded": "all layers: dropped", "merged": "all layers: merged"})
    marks.lines(right, study(table, "accumulated"), "layer", "value", "setting", both, errorbar=RANGE)
    marks.legend(right, both, fontsize=7)
    for ax in (left, right):
        ax.set(xlabel="after MoE layer", xticks=sorted(rows["x"].unique()))
    seeds = rows["seed"].nunique()
    told = f"{seeds} seeds: mean and min to max" if seeds > 1 else "1 seed: no band"
    footer(figure, rows, "uniform budgets, errors under 0.01 not drawn", seeds=told)
    return figure


@drawn
def attention_frequency(table: pd.DataFrame) -> Picture:
    """Attention received by an expert's tokens over its frequency, one panel per layer; first task and seed."""
    both = study(table, "activation", "attention")
    first = both[(both["task"] == both["task"].iloc[0]) & (both["seed"] == both["seed"].iloc[0])]
    wide = first.pivot_table(index=["layer", "expert"], columns="study", values="value").reset_index()
    layers = list(wide[wide["activation"] > 0].groupby("layer"))
    columns = min(4, len(layers))
    shape = -(-len(layers) // columns), columns
    figure, axes = panels(both, (max(5.0, 1.9 * columns), 0.6 + 1.8 * shape[0]), *shape, sharey=True, squeeze=False)
    for ax, (layer, own) in zip(axes.flat, layers, strict=False):
        middle = own.median()
        rare = (own["activation"] < middle["activation"]) & (own["attention"] > middle["attention"])
        look = {"hue": rare, "style": rare, "palette": {False: "#0072B2", True: "#D55E00"}, "legend": False}
        sns.scatterplot(own, x="activation", y="attention", markers={False: "o", True: "^"}, s=20, ax=ax, **look)
        correlation = own["activation"].corr(own["attention"], method="spearman")
        ax.set_title(f"layer {layer:.0f}: rank corr. {correlation:+.2f}", fontsize=8)
        ax.set(xlabel="frequency", ylabel="attention received")
        ax.label_outer()
    for ax in axes.flat[len(layers) :]:
        ax.set_visible(False)
    footer(figure, first, "first task and seed; triangles: rarer than the median, attended to more")
    return figure


@drawn
def layer_budgets(table: pd.DataFrame) -> Picture:
    """Slots of each layer by rule, and the error each rule leaves."""
    figure, (left, right) = panels(study(table, "budgets", "error"), (7.6, 2.9), 1, 2, width_ratios=[1.3, 1])
    looks = style.of_settings({name: title.replace("\n", " ") for name, title in BUDGETS.items()})
    marks.bars(left, study(table, "budgets"), "layer", "value", looks, by="setting")
    left.set(xlabel="MoE layer", ylabel="merged slots, mean")
    marks.legend(figure, looks, filled=True, loc="outside upper center", ncols=4)
    titles = {"joint + squared gate" if name == "joint" else name: title for name, title in BUDGETS.items()}
    marks.bars(right, study(table, "error"), "setting", "value", style.of_settings(titles), fmt="{:.3f}")
    right.set_ylabel("error of the last hidden state")
    footer(figure, study(table, "error"), "'joint' on the right with squared gate weights")
    return figure


@drawn
def clustering_time(table: pd.DataFrame) -> Picture:
    """Milliseconds of clustering layer by layer and at once, and how many times faster the latter is."""
    rows = split(study(table, "clustering_seconds"), "shape", "how")
    ms = (1e3 * rows.groupby(["shape", "how", "seed"], sort=False)["value"].median()).rename("ms")
    figure, ax = panels(table[table["study"].str.startswith("clustering")], (6.0, 2.9))
    looks = style.of_settings({"per layer": "scikit-learn, layer by layer", "fused": "fused"})
    marks.bars(ax, ms.reset_index(), "shape", "ms", looks, by="how", fmt="{:.3g} ms")
    wide = ms.unstack("how", sort=False)
    ratios = (wide["per layer"] / wide["fused"]).groupby("shape", sort=False).mean()
    for place, ratio in enumerate(ratios):
        ax.text(place, 0.9, f"{ratio:.0f} times", transform=ax.get_xaxis_transform(), ha="center", fontsize=9)
    ax.set(yscale="log", ylim=(0.3 * ms.min(), 12 * ms.max()), ylabel="processor time (ms)")
    marks.legend(figure, looks, filled=True, loc="outside upper center", ncols=2)
    footer(figure, rows.assign(model="random experts"), "medians, in turns", "paper: 40 times")
    return figure


@drawn
def merge_options(table: pd.DataFrame) -> Picture:
    """Error of merge weights and of what goes beyond the paper, as a share of the paper's own in the same case."""
    rows, case = study(table, "error"), ["task", "seed"]
    paper = rows[rows["setting"] == "weights: attention x frequency"].set_index(case)["value"].rename("paper")
    relative = rows.join(paper, on=case).assign(value=lambda joined: joined["value"] / joined["paper"])
    figure, ax = panels(rows, (6.2, 2.9))
    marks.bars(ax, relative, "setting", "value", style.of_settings(OPTIONS), fmt="{:.2f}", horizontal=True)
    marks.reference(ax, 1, vertical=True)
    ax.set(xlabel="error of the last hidden state, over that of eq. 1 and 2")
    footer(figure, rows)
    return figure


@drawn
def own_share(table: pd.DataFrame) -> Picture:
    """Where a round's time goes: on the device clock by link and samples, and measured here without transfer."""
    device, here = study(table, "phase_device_s"), study(table, "phase_wall_s")
    parts = device["setting"].str.split(": ", expand=True)
    device = device.assign(phase=parts[1], bar=parts[0] + ", " + device["x"].map("{:.0f} samples".format))
    rows = pd.concat([device, here.assign(phase=here["setting"], bar="measured here, 64 samples")])
    seconds = rows.groupby(["bar", "phase"], sort=False, as_index=False)["value"].median()
    shares = seconds.assign(share=seconds["value"] / seconds.groupby("bar")["value"].transform("sum"))
    figure, ax = panels(study(table, "phase_device_s", "phase_wall_s"), (7.6, 3.2))
    looks = style.of_phases(shares["phase"])
    marks.stacked(ax, shares, "bar", "phase", "share", looks, horizontal=True)
    own = shares[shares["phase"].isin(OWN_PHASES)].groupby("bar", sort=False)["share"].sum()
    for place, name in enumerate(shares["bar"].unique()):
        ax.text(1.01, place, f"FLUX's own {100 * own[name]:.1f} %", va="center", fontsize=7)
    ax.set(xlabel="share of the round, everything in the way", xlim=(0, 1.25), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    marks.legend(figure, looks, filled=True, loc="outside upper center", ncols=len(looks))
    footer(figure, here, "device clock: NVIDIA L20, real shapes")
    return figure
