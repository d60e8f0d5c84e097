"""The search for each method's settings: a table of trials, and which of them is best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from fluxlib.figures import style
from fluxlib.figures.canvas import Picture, axes_grid, caption, drawn

SETTINGS = ("learning_rate", "local_steps")
"""Fields of :class:`~fluxlib.config.RunConfig` that are searched."""
COLUMNS = (
    "model",
    "task",
    "method",
    *SETTINGS,
    "variant",
    "num_seeds",
    "final",
    "at_s",
    "score",
    "mean",
    "is_best",
    "is_chosen",
)


def trials(rounds: pd.DataFrame, parameters: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per trial: its settings, its last score, and its score at the moment when all trials can be compared.

    That moment, ``at_s`` on the device clock, is when the quickest of the method's trials on this model and task had
    ended: more local work per round must pay within the same time. ``is_best`` marks the highest mean score over seeds
    there (the first of the table among equals). ``mean`` is a setting's score over all models and tasks, and
    ``is_chosen`` marks one setting per method, since nobody tunes a method per task: the lowest learning rate, and of
    that the fewest steps, among the settings whose mean is within one standard error of the highest (Hastie et al.,
    The Elements of Statistical Learning, 7.10). That error is of the scored samples, ``eval_samples`` of each trial;
    without such a number only the highest counts.

    Args:
        rounds: the ``rounds`` table of all trials.
        parameters: of each run, by run id.

    Raises:
        ValueError: methods with unequal numbers of trials, since that would not be the same search; a run without
            its settings, or without a score.
    """
    _check_runs(rounds, parameters)
    rows = []
    for (model, task, method), runs in rounds.groupby(["model", "task", "method"], sort=False):
        at_s = float(runs.groupby("run_id")["device_s"].max().min())
        for variant, same in runs.groupby("variant", sort=False):
            found = [_scores(run, at_s) for _, run in same.groupby("run_id")]
            settings = parameters[same["run_id"].iloc[0]]
            row: dict[str, Any] = {"model": model, "task": task, "method": method, "variant": variant, "at_s": at_s}
            row |= {name: settings[name] for name in SETTINGS}
            row |= {"num_seeds": len(found), "final": _mean(f for f, _ in found), "score": _mean(s for _, s in found)}
            samples = settings.get("eval_samples")
            row["variance"] = row["score"] * (1 - row["score"]) / (samples * len(found)) if samples else 0.0
            rows.append(row)
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "variance"]).sort_values(
        ["model", "task", "method", "local_steps", "learning_rate"], kind="stable", ignore_index=True
    )
    counts = frame.groupby(["model", "task", "method"]).size()
    if counts.nunique() > 1:
        listed = ", ".join(f"{name} {_span(found)}" for name, found in counts.groupby("method", sort=False))
        raise ValueError(f"methods must have equally many trials on each model and task; there are: {listed}")
    best = frame.groupby(["model", "task", "method"])["score"].transform("idxmax")
    frame["is_best"] = best.to_numpy() == frame.index.to_numpy()
    frame["mean"] = frame.groupby(["method", *SETTINGS])["score"].transform("mean")
    chosen = [_gentlest(trials) for _, trials in frame.groupby("method")]
    frame["is_chosen"] = frame.set_index(["method", *SETTINGS]).index.isin(chosen)
    return frame.drop(columns="variance")[list(COLUMNS)]


def _gentlest(trials: pd.DataFrame) -> tuple[str, float, int]:
    """Method and settings of the gentlest of its trials that are as good as the best, as far as can be told."""
    best = trials[trials["mean"] == trials["mean"].max()]
    panels = len(trials[["model", "task"]].drop_duplicates())
    error = math.sqrt(best["variance"].iloc[:panels].sum()) / panels
    alike = trials[trials["mean"] >= trials["mean"].max() - error]
    return min(alike[["method", *SETTINGS]].itertuples(index=False, name=None))


def _check_runs(rounds: pd.DataFrame, parameters: Mapping[str, Mapping[str, Any]]) -> None:
    for run, table in rounds.groupby("run_id"):
        if lacking := [name for name in SETTINGS if name not in parameters[str(run)]]:
            raise ValueError(f"{run} does not say its {', '.join(lacking)}")
        if table["metric"].isna().all():
            raise ValueError(f"{run} was never scored")


def _scores(run: pd.DataFrame, at_s: float) -> tuple[float, float]:
    """Last score of a run, and its last score by ``at_s``."""
    scored = run.dropna(subset=["metric"]).sort_values("round")
    return float(scored["metric"].iloc[-1]), float(
        scored.loc[scored["device_s"] <= at_s * (1 + 1e-9), "metric"].iloc[-1]
    )


def _span(numbers: pd.Series) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low} to {high}"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


@drawn
def draw_trials(frame: pd.DataFrame) -> Picture:
    """Score over learning rate, one column per model and task, one line per method, dashed for more local work.

    Args:
        frame: of :func:`trials`.
    """
    panels = list(frame.groupby(["model", "task"], sort=False))
    figure = Picture(figsize=(max(4.0, 3.2 * len(panels)), 3.0))
    axes = axes_grid(figure, 1, len(panels))
    for ax, ((model, task), part) in zip(axes[0], panels, strict=True):
        for method in style.order(part["method"]):
            look = style.method(method)
            for index, (steps, line) in enumerate(part[part["method"] == method].groupby("local_steps")):
                ax.plot(
                    line["learning_rate"], line["score"], color=look.color, marker=look.marker,
                    linestyle="-" if index == 0 else "--", label=f"{look.title}, {steps} steps",
                )  # fmt: skip
            best = part[(part["method"] == method) & part["is_chosen"]]
            ax.plot(best["learning_rate"], best["score"], "o", ms=11, mfc="none", mec=look.color, mew=1.2)
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("score at equal device time")
        ax.set_title(f"{model}\n{task}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    chosen = "ring: chosen, the gentlest within a standard error of the best mean over panels"
    caption(figure, chosen, f"{int(frame['num_seeds'].max())} seed(s)", "device clock")
    return figure
