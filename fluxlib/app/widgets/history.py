"""Earlier runs in the store to choose from, and what the dashboard says of runs, as HTML."""

from __future__ import annotations

import html
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from fluxlib import records
from fluxlib.analysis import store
from fluxlib.analysis.wording import METRICS
from fluxlib.app.widgets.background import COMPLETE, FAILED, STOPPED, BackgroundRun
from fluxlib.config import RunConfig, flatten, make_config
from fluxlib.figures import style
from fluxlib.io import ConfigError
from fluxlib.records import seconds


class History:
    """Stored runs of one model and task in the folders ``places``; what is chosen stays so while the list grows.

    The list has the newest first; every stored copy of a run is an entry of its own. The button ``take_over`` gives
    ``on_take_over`` the configuration of the one that is chosen. ``in_turn`` does what a press or a choice asks for.
    """

    def __init__(
        self,
        places: list[Path],
        on_choice: Callable[[], None],
        on_take_over: Callable[[RunConfig], None],
        in_turn: Callable[..., object] = lambda action, *arguments: action(*arguments),
    ) -> None:
        import ipywidgets

        self._places, self._on_take_over = places, on_take_over
        self.choice = ipywidgets.SelectMultiple(rows=6, layout=ipywidgets.Layout(width="100%", max_width="900px"))
        self.take_over = ipywidgets.Button(
            description="Use its settings", icon="sliders", disabled=True, layout=ipywidgets.Layout(width="160px"),
            tooltip="turn the controls to what the chosen run had; an unfinished run goes on with Run",
        )  # fmt: skip
        self.note = ipywidgets.HTML()
        self.choice.observe(lambda _: in_turn(self._chosen, on_choice), "value")
        self.take_over.on_click(lambda _: in_turn(self._press))

    def show(self, model: str, task: str) -> None:
        """Show the runs of ``model`` and ``task``, the newest first."""
        part = f"-{Path(model).name}-{task}-seed"
        found = [file for file in store.runs(self._places).values() if part in f"-{file.stem}"]
        found.sort(key=store.modified, reverse=True)
        labels = store.tell_apart([describe(file, store.modified(file)) for file in found], found)
        options = list(zip(labels, found, strict=True))
        if list(self.choice.options) != options:
            # A run that goes on replaces its table: what was chosen is the run, not the file.
            kept = {(store.place_of(file), file.stem) for file in self.choice.value}
            self.choice.options = options
            self.choice.value = tuple(file for file in found if (store.place_of(file), file.stem) in kept)

    def unfinished(self, place: Path) -> list[str]:
        """Names of the runs in ``place`` that were interrupted, of any model and task."""
        return [file.stem for label, file in store.runs([place]).items() if label.endswith("unfinished)")]

    def chosen(self) -> dict[str, Path]:
        """Short labels of the chosen runs, in the order of the list."""
        files = [file for _, file in self.choice.options if file in self.choice.value]
        return dict(zip(store.tell_apart([short_name(file) for file in files], files), files, strict=True))

    def _chosen(self, on_choice: Callable[[], None]) -> None:
        self.take_over.disabled = len(self.choice.value) != 1
        self.note.value = ""
        on_choice()

    def _press(self) -> None:
        if len(self.choice.value) != 1:
            self.note.value = f"Choose one run, {len(self.choice.value)} are chosen."
            return
        try:
            found = store.parameters(self.choice.value[0])
            if not found:
                raise ConfigError("nothing readable says what they were")
            self._on_take_over(make_config(found))
        except ConfigError as error:
            self.note.value = f"These settings cannot be taken over: {error}"


@lru_cache(maxsize=512)
def describe(file: Path, modified: float) -> str:
    """One line on a stored run, modified at this time: name, rounds, last score, where it lies."""
    try:
        rounds = store.read(file)
    except records.TableError:
        return f"{short_name(file)} · cannot be read · {store.place_of(file).name}"
    scored = rounds.dropna(subset=["metric"])
    score = f"{rounds['metric_name'].iloc[0]} {scored['metric'].iloc[-1]:.3f}" if len(scored) else "not scored"
    last, planned = int(rounds["round"].max()), flatten(store.parameters(file)).get("federation.rounds")
    done = f"{last} of {planned} rounds, unfinished" if planned and last < planned else f"{last} rounds"
    return f"{short_name(file)} · {done} · {score} · {store.place_of(file).name}"


def short_name(file: Path) -> str:
    """Method, what was changed, and seed: what sets runs of one model and task apart."""
    found = store.parameters(file)
    if not {"method", "seed"} <= set(found):
        return file.stem
    title = style.method(str(found["method"])).title
    return " ".join(part for part in (title, str(found.get("variant", "")), f"seed {found['seed']}") if part)


RED, BROWN = "#b00020", "#8a5a00"

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
    cells = {title: times[name].map(form, na_action="ignore") for name, (title, form) in COLUMNS.items()}
    said = f"Target: {metric} {target:.3f}, {target_frac:.0%} of the best score shown (dotted line); –: not reached."
    return f"{STYLE}<div class='flux'>{said}{pd.DataFrame(cells).to_html(index=False, border=0, na_rep='–')}</div>"


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
        return note(f"Failed: {run.error}", RED)
    name = f'<span style="color:#666">{html.escape(run.config.run_id)}</span>'
    if not run.rows:
        return f"Loading the model, scoring the base ...<br>{name}"
    row = run.rows[-1]
    said = records.describe_result(row).replace("  ", " · ")
    line = f"<b>round {row['round']}</b> of {run.config.federation.rounds}: {said}"
    if run.state == STOPPED:
        return f"{line}<br><b>Stopped.</b> Run with the same settings goes on from here. {name}"
    if run.state == COMPLETE:
        return f"{line}<br><b>Complete.</b> Tables of {name} in {html.escape(str(run.out))}."
    return f"{line}<br>{run.state} ... {_remaining(run)} {name}"


def _remaining(run: BackgroundRun) -> str:
    """How long the rest may take, from the rounds so far; nothing before the first."""
    done = [row for row in run.rows if row["round"] > 0]
    if not done or run.state != "running":
        return "" if run.state == "running" else "after this round."
    each = sum(row["round_wall_s"] + row["evaluate_wall_s"] for row in done) / len(done)
    return f"about {each * (run.config.federation.rounds - done[-1]['round']):.0f} s left."
