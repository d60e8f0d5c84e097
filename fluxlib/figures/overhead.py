"""What a round costs, by phase, memory and link (notebook 06), from the ``rounds`` and ``participants`` tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fluxlib.devices import catalogue
from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, caption, clock_shapes, drawn, interval, unique
from fluxlib.figures.measured import HATCHES, study
from fluxlib.figures.times import FINAL_ROUNDS, times_to_target
from fluxlib.records import PHASES

SERIAL = tuple(phase for phase in PHASES if phase not in ("quantize", "profile"))
"""Phases that follow one another; a stale profile runs beside upload and server."""
GIB = 2**30


def breakdown(rounds: pd.DataFrame, participants: pd.DataFrame) -> pd.DataFrame:
    """Mean device seconds of each phase over rounds, of each round's slowest participant.

    Returns:
        One row per model, task, method and phase: ``seconds``, and ``share`` of the mean round.
    """
    columns = [f"{phase}_device_s" for phase in PHASES]
    accepted = participants[participants["rejected"] == ""].copy()
    accepted["path_s"] = accepted[[f"{phase}_device_s" for phase in SERIAL]].sum(axis=1)
    slowest = accepted.loc[accepted.groupby(["run_id", "round"])["path_s"].idxmax()]
    kept = rounds[["run_id", "round", "model", "task", "method", "round_device_s", "server_device_s"]]
    found = slowest[["run_id", "round", *columns]].merge(kept, on=["run_id", "round"])
    found = found.rename(columns={**dict(zip(columns, PHASES, strict=True)), "server_device_s": "server"})
    means = found.groupby(["model", "task", "method"], sort=False)[[*PHASES, "server", "round_device_s"]].mean()
    tidy = means.melt(
        id_vars="round_device_s", var_name="phase", value_name="seconds", ignore_index=False
    ).reset_index()
    return tidy.assign(share=tidy["seconds"] / tidy["round_device_s"]).drop(columns="round_device_s")


def relinked(rounds: pd.DataFrame, participants: pd.DataFrame, link: str) -> pd.DataFrame:
    """``rounds`` as the device clock would have counted them over another link; nothing is run again.

    Down- and upload scale with the link's rates. A round grows by what its longest path does (all phases but the
    profile, then the upload), which is exact while no profile outlasts the upload.
    """
    other, parts = catalogue.link(link), participants[participants["rejected"] == ""].copy()
    parts["old_s"] = parts[[f"{phase}_device_s" for phase in SERIAL]].sum(axis=1)
    parts["link"] = parts["run_id"].map(rounds.groupby("run_id")["link"].first())
    parts["new_s"] = parts["old_s"]
    for phase, rate in (("download", "down_bytes_per_s"), ("upload", "up_bytes_per_s")):
        taken = parts[f"{phase}_device_s"].to_numpy()
        before = [catalogue.link(name) for name in parts["link"]]
        sent = (taken - [one.latency_s for one in before]) * [getattr(one, rate) for one in before]
        parts["new_s"] += np.where(taken > 0, sent / getattr(other, rate) + other.latency_s, 0.0) - taken
    longest = parts.groupby(["run_id", "round"])[["old_s", "new_s"]].max()
    grown = (longest["new_s"] - longest["old_s"]).rename("grown_s").reset_index()
    out = rounds.merge(grown, on=["run_id", "round"], how="left").fillna({"grown_s": 0.0})
    out["round_device_s"] += out["grown_s"]
    out = out.sort_values(["run_id", "round"], kind="stable")
    out["device_s"] = out.groupby("run_id")["round_device_s"].cumsum()
    return out.drop(columns="grown_s").assign(link=link)


def speedups(rounds: pd.DataFrame, participants: pd.DataFrame, target_fraction: float = 0.95) -> pd.DataFrame:
    """Speed-up over FMD on the device clock for every link of the catalogue, one row per run and link."""
    found = [
        times_to_target(relinked(rounds, participants, link), target_fraction, final_rounds=FINAL_ROUNDS).assign(
            up_bits_per_s=8 * catalogue.LINKS[link].up_bytes_per_s
        )
        for link in catalogue.LINKS
    ]
    return pd.concat(found, ignore_index=True)


@drawn
def draw_breakdown(table: pd.DataFrame, rounds: pd.DataFrame) -> Picture:
    """Stacked bars of :func:`breakdown`, one panel per model and task, one bar per method."""
    panels = list(table.groupby(["model", "task"], sort=False))
    figure = Picture(figsize=(max(4.4, 2.5 * len(panels) + 1.3), 2.9))
    axes = axes_grid(figure, 1, len(panels))
    names = [*PHASES, "server"]
    for ax, ((model, task), part) in zip(axes[0], panels, strict=True):
        order = style.order(part["method"])
        bottom = np.zeros(len(order))
        for index, phase in enumerate(names):
            seconds = part[part["phase"] == phase].set_index("method")["seconds"].reindex(order).fillna(0).to_numpy()
            look = {"color": style.PHASE_COLORS.get(phase, "#000000"), "hatch": HATCHES[index % len(HATCHES)]}
            ax.bar(range(len(order)), seconds, 0.7, bottom=bottom, label=phase, edgecolor="w", linewidth=0.3, **look)
            bottom += seconds
        for place, top in enumerate(bottom):
            ax.annotate(f"{top:.0f}", (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        ax.set_xticks(range(len(order)), [style.method(method).title for method in order])
        ax.set_title(f"{model}\n{task}")
        ax.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("mean round, slowest participant (s)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    caption(figure, f"device clock: shapes of {clock_shapes(rounds)}", "mean over rounds")
    return figure


@drawn
def draw_speedups(table: pd.DataFrame) -> Picture:
    """Speed-up over FMD against the link's upload rate, one panel per model and task; a miss leaves a gap."""
    panels = list(table.groupby(["model", "task"], sort=False))
    figure = Picture(figsize=(max(4.4, 2.5 * len(panels) + 1.3), 2.6))
    axes = axes_grid(figure, 1, len(panels))
    for ax, ((model, task), part) in zip(axes[0], panels, strict=True):
        for method in style.order(part["method"]):
            own: Any = part[part["method"] == method].groupby("up_bits_per_s")["speedup_device_s"]
            mean, look = own.mean(), style.method(method)
            ax.plot(mean.index / 1e6, mean, color=look.color, marker=look.marker, ls=look.line, label=look.title)
        ax.set_xscale("log")
        ax.set_xlabel("upload (Mb/s)")
        ax.set_title(f"{model}\n{task}")
        ax.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("speed-up over FMD")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    share = f"{table['target_fraction'].iloc[0]:.0%}".replace("%", " %")
    shapes = ", ".join(pd.unique(table["clock_model"]))
    caption(figure, f"time to {share} of FMD's final score", f"device clock: {shapes}")
    return figure


def clock_table(table: pd.DataFrame) -> pd.DataFrame:
    """Measured beside predicted seconds of each block of a round, and of all of them together.

    Args:
        table: ``measurements`` with the study ``clock_check``.

    Returns:
        One row per model, task and block, means over seeds: ``predicted_s``, ``measured_s``, ``factor`` (measured over
        predicted, between ``low`` and ``high``), and each block's share of the whole by both. Where all factors are
        alike the clock is wrong in seconds and right in shares; where they differ, shares are wrong as well.
    """
    rows = study(table, "clock_check")
    parts = rows["setting"].str.split(", ", expand=True)
    rows = rows.assign(block=parts[0], kind=parts[1])
    keys = ["model", "task", "block", "seed"]
    each = rows.pivot_table(index=keys, columns="kind", values="value", sort=False).reset_index()
    whole = each.groupby(["model", "task", "seed"], sort=False)[["measured", "predicted"]].sum().reset_index()
    found = []
    for (model, task, block), part in pd.concat([each, whole.assign(block="together")]).groupby(keys[:3], sort=False):
        mean, low, high = interval((part["measured"] / part["predicted"]).to_numpy())
        of = whole[(whole["model"] == model) & (whole["task"] == task)]
        found.append(
            {"model": model, "task": task, "block": block, "num_seeds": part["seed"].nunique()}
            | {f"{kind}_s": part[kind].mean() for kind in ("predicted", "measured")}
            | {"factor": mean, "low": low, "high": high}
            | {f"{kind}_share": part[kind].sum() / of[kind].sum() for kind in ("predicted", "measured")}
        )
    return pd.DataFrame(found)


@drawn
def draw_clock_check(table: pd.DataFrame) -> Picture:
    """Predicted beside measured seconds of each block, logarithmic; the factor between them is written.

    Args:
        table: ``measurements`` with the study ``clock_check``.
    """
    rows = study(table, "clock_check")
    parts = rows["setting"].str.split(", ", expand=True)
    means = rows.assign(block=parts[0], kind=parts[1]).groupby(["block", "kind"], sort=False)["value"].mean().unstack()
    figure = Picture(figsize=(4.6, 2.6))
    ax = axes_grid(figure, 1, 1)[0, 0]
    for index, (kind, color, hatch) in enumerate((("predicted", "#0072B2", ""), ("measured", "#E69F00", "//"))):
        places = np.arange(len(means)) + (index - 0.5) * 0.4
        ax.bar(places, means[kind], 0.4, color=color, hatch=hatch, edgecolor="w", label=kind)
    for place, (_, pair) in enumerate(means.iterrows()):
        ratio = f"x {pair['measured'] / pair['predicted']:.1f}"
        ax.annotate(ratio, (place, pair.max()), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    ax.set_yscale("log")
    ax.margins(y=0.2)
    ax.set_xticks(range(len(means)), means.index)
    ax.set_ylabel("seconds")
    ax.grid(axis="x", visible=False)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    caption(figure, f"{unique(rows, 'model')} on one thread here", "x: measured over predicted")
    return figure


@drawn
def draw_memory(rounds: pd.DataFrame) -> Picture:
    """Largest predicted memory of a participant, by model and method."""
    means = rounds[rounds["round"] > 0].groupby(["model", "method"], sort=False)["device_memory_bytes"].max() / GIB
    figure = Picture(figsize=(4.6, 2.6))
    ax = axes_grid(figure, 1, 1)[0, 0]
    shown, order = list(means.index.unique("model")), style.order(means.index.unique("method"))
    for index, method in enumerate(order):
        look, width = style.method(method), 0.8 / len(order)
        places = [place + (index - (len(order) - 1) / 2) * width for place in range(len(shown))]
        heights = [float(means.get((model, method), np.nan)) for model in shown]
        ax.bar(places, heights, width, color=look.color, hatch=look.hatch, edgecolor="w", label=look.title)
        for place, height in zip(places, heights, strict=True):
            ax.annotate(f"{height:.0f}", (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    ax.set_xticks(range(len(shown)), shown)
    ax.set_ylabel("memory of a step (GiB)")
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.12)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    caption(figure, f"predicted, shapes of {clock_shapes(rounds)}", "offloading fills the device's memory")
    return figure
