"""What the dashboard says, as HTML: notes, the state of a run, runs side by side."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import pandas as pd

from fluxlib.analysis.wording import METRICS
from fluxlib.app.widgets.background import COMPLETE, FAILED, STOPPED, BackgroundRun
from fluxlib.app.widgets.controls import with_labels

RED, BROWN = "#b00020", "#8a5a00"


def seconds(value: float) -> str:
    """Three digits, and no powers of ten: a mini model's rounds take milliseconds, a real one's minutes."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "run_id": ("run", str),
    "rounds": ("rounds done", str),
    "best_metric": ("best score", "{:.3f}".format),
    "final_metric": ("last score", "{:.3f}".format),
    "device_s_to_target": ("to target: device s", seconds),
    "wall_s_to_target": ("measured s", seconds),
    "round_to_target": ("rounds", "{:.1f}".format),
}
"""Of a comparison: what stands above a column, and how its values are written."""

STYLE = """<style>.flux table {border-collapse: collapse; margin: 4px 0} .flux th, .flux td {padding: 2px 8px;
text-align: right; white-space: nowrap} .flux th:first-child, .flux td:first-child {text-align: left}
.flux thead {border-bottom: 1px solid #999}</style>"""


def compared(times: pd.DataFrame, target_frac: float) -> str:
    """Runs side by side: a table of :func:`fluxlib.analysis.time_to_target.reach`."""
    target, metric = times["target"].iloc[0], METRICS.get(times["metric_name"].iloc[0], "score")
    head = "".join(f"<th>{title}</th>" for title, _ in COLUMNS.values())
    body = ""
    for row in times.to_dict(orient="records"):
        cells = (("–" if value != value else form(value))
                 for value, form in ((row[name], form) for name, (_, form) in COLUMNS.items()))  # fmt: skip
        body += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
    said = f"Target: {metric} {target:.3f}, {target_frac:.0%} of the best score shown (dotted line); –: not reached."
    return f"{STYLE}<div class='flux'>{said}<table><thead><tr>{head}</tr></thead>{body}</table></div>"


def note(text: str, color: str) -> str:
    """A message that stands out; empty for no text."""
    lines = html.escape(text).replace("\n", "<br>")
    look = f"color:{color};border-left:4px solid {color};padding:4px 8px;margin-bottom:4px;line-height:1.4"
    return f'<div style="{look}">{lines}</div>' if text else ""


def paragraphs(sentences: list[str]) -> str:
    """A line each."""
    return f'<div style="line-height:1.5">{"<br>".join(html.escape(sentence) for sentence in sentences)}</div>'


def beginning(unfinished: list[str]) -> str:
    """What stands there before anything was run; ``unfinished`` names runs that can go on."""
    if not unfinished:
        return "Nothing has been run yet: press <b>Run</b>."
    names = ", ".join(map(html.escape, unfinished))
    return f"Unfinished: {names}. Choose it below, <b>Use its settings</b>, and <b>Run</b> goes on from its last round."


def status(run: BackgroundRun) -> str:
    """Where a run is, in two lines."""
    if run.state == FAILED:
        return note(f"Failed: {with_labels(run.error)}", RED)
    name = f'<span style="color:#666">{html.escape(run.config.run_id)}</span>'
    if not run.rows:
        return f"Loading the model, scoring the base ...<br>{name}"
    line = _round_line(run)
    if run.state == STOPPED:
        return f"{line}<br><b>Stopped.</b> Run with the same settings goes on from here. {name}"
    if run.state == COMPLETE:
        return f"{line}<br><b>Complete.</b> Tables of {name} in {html.escape(str(run.out))}."
    return f"{line}<br>{run.state} ... {_remaining(run)} {name}"


def _round_line(run: BackgroundRun) -> str:
    row = run.rows[-1]
    said = [f"<b>round {row['round']}</b> of {run.config.federation.rounds}"]
    if row["metric"] == row["metric"]:
        said.append(f"{METRICS.get(row['metric_name'], 'score')} {row['metric']:.3f}, loss {row['loss']:.3f}")
    said.append(f"{row['wall_s']:.1f} s here, {seconds(row['device_s'])} s on the device clock")
    said.append(f"{row['uplink_bytes'] / 1e6:.1f} MB up, {row['downlink_bytes'] / 1e6:.1f} MB down in this round")
    return " · ".join(said) + (f" · {row['num_rejected']} replies refused" if row["num_rejected"] else "")


def _remaining(run: BackgroundRun) -> str:
    """How long the rest may take, from the rounds so far; nothing before the first."""
    done = [row for row in run.rows if row["round"] > 0]
    if not done or run.state != "running":
        return "" if run.state == "running" else "after this round."
    each = sum(row["round_wall_s"] + row["evaluate_wall_s"] for row in done) / len(done)
    return f"about {each * (run.config.federation.rounds - done[-1]['round']):.0f} s left."
