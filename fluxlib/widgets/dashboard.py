"""The dashboard of ``notebooks/explore.ipynb``: turn a budget and see the plan, run it, compare it.

:class:`Dashboard` shows itself: as widgets in JupyterLab, as a picture wherever nobody can press a button (a headless
run, a saved notebook, GitHub).
"""

from __future__ import annotations

import html
import os
import threading
from pathlib import Path
from typing import Any

import pandas as pd

from fluxlib import figures, records
from fluxlib.config import REPO_ROOT, ConfigError, RunConfig
from fluxlib.store import folders, runs
from fluxlib.widgets.background import COMPLETE, FAILED, IDLE, STOPPED, BackgroundRun
from fluxlib.widgets.controls import Controls, with_labels
from fluxlib.widgets.monitor import HEADLESS
from fluxlib.widgets.preview import Preview, preview

TARGET_FRAC = 0.95
"""Target of a comparison: this share of the best score in it."""


class Dashboard:
    """Controls on the left; on the right what they mean, a run that can be watched and stopped, and earlier runs.

    Args:
        config: where the controls start, and everything that has no control.
        out: folder of the tables and checkpoints of runs that are started here.
        store: more folders of runs to compare with; None: those of :func:`fluxlib.store.folders`.
    """

    def __init__(self, config: RunConfig, out: Path | str = "", store: list[Path] | None = None) -> None:
        import ipywidgets

        self.out = Path(out) if out else REPO_ROOT / "build" / "explore"
        self._store = list(dict.fromkeys([self.out, *(store if store is not None else folders())]))
        self.controls = Controls(config)
        self.preview: Preview | None = None
        self.run: BackgroundRun | None = None
        self._lock = threading.RLock()
        self.message = ipywidgets.HTML()
        self.plan = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="100%", max_width="1000px"))
        self.curve = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="100%", max_width="900px"))
        self.progress = ipywidgets.IntProgress(min=0, max=1, layout=ipywidgets.Layout(width="240px"))
        self.status = ipywidgets.HTML("Nothing has been run yet.")
        self.start = ipywidgets.Button(description="Run", button_style="primary", icon="play")
        self.halt = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self.earlier = ipywidgets.SelectMultiple(rows=6, layout=ipywidgets.Layout(width="100%", max_width="900px"))
        self.table = ipywidgets.HTML()
        self.view = self._arrange(ipywidgets)
        self._connect()
        self.refresh()

    def press_run(self, timeout_s: float | None = None) -> BackgroundRun:
        """Do what the button does, and wait for the end of the run.

        Raises:
            ConfigError: what the dashboard would say in red.
            TimeoutError: the run goes on after ``timeout_s``.
        """
        self.refresh()
        if self.preview is None:
            raise ConfigError(self._problem)
        self._press_run()
        assert self.run is not None
        self.run.wait(timeout_s)
        return self.run

    def refresh(self, *_: Any) -> None:
        """Read the controls and show what they mean; what cannot be is said in place, and cannot be run."""
        with self._lock:
            try:
                self.preview = preview(self.controls.config(), self.controls.participant)
                self._problem, warning = "", self.preview.warning
            except ConfigError as error:
                self.preview, self._problem, warning = None, str(error), ""
            if self.preview is not None:
                self.plan.value = self.preview.picture()._repr_png_()
            # The picture of another choice would be taken for this one's.
            self.plan.layout.visibility = "visible" if self.preview is not None else "hidden"
            self.message.value = _note(with_labels(self._problem), "#b00020") or _note(warning, "#8a5a00")
            self._set_buttons()
            self._list_earlier()

    def picture(self) -> bytes:
        """What stands there now as one PNG: the run where there is one, the plan otherwise."""
        return bytes(self.curve.value if self.run is not None and self.curve.value else self.plan.value)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        shown: dict[str, Any] = {"text/plain": f"Dashboard of {self.controls.base.model}", "image/png": self.picture()}
        if os.environ.get(HEADLESS):
            return shown
        found = self.view._repr_mimebundle_()
        data = found[0] if isinstance(found, tuple) else found
        return {**shown, **{name: value for name, value in data.items() if name != "text/plain"}}

    def _arrange(self, ipywidgets: Any) -> Any:
        layout, column = ipywidgets.Layout, ipywidgets.VBox
        buttons = ipywidgets.HBox([self.start, self.halt, self.progress])
        left = column([*self.controls.view(), buttons], layout=layout(width="330px", min_width="330px"))
        title = ipywidgets.HTML("<b>Compare with earlier runs</b> (ctrl or shift for several)")
        running = column([self.status, self.curve, title, self.earlier, self.table])
        self.tabs = ipywidgets.Tab([self.plan, running], titles=["Plan", "Run and compare"])
        right = column([self.message, self.tabs], layout=layout(flex="1 1 auto", min_width="500px"))
        return ipywidgets.HBox([left, right], layout=layout(width="100%"))

    def _connect(self) -> None:
        self.controls.widgets["participants"].observe(lambda _: self.controls.follow_participants(), "value")
        for widget in self.controls.widgets.values():
            widget.observe(self.refresh, "value")
        self.start.on_click(self._press_run)
        self.halt.on_click(lambda _: self.run.stop() if self.run is not None else None)
        self.earlier.observe(lambda _: self._draw(), "value")

    def _press_run(self, *_: Any) -> None:
        if self.preview is None or (self.run is not None and self.run.busy):
            return
        self.tabs.selected_index = 1
        self.run = BackgroundRun(self.preview.config, self.out, self._changed)
        self.progress.max, self.progress.value = self.preview.config.rounds, 0
        self.status.value = "Loading the model, scoring the base ..."
        self.run.start()
        self._set_buttons()

    def _changed(self, run: BackgroundRun) -> None:
        """Called from the run's thread after each round and at its end."""
        with self._lock:
            if run.rows:
                self.progress.value = int(run.rows[-1]["round"])
            self.status.value = _status(run)
            self._set_buttons()
            if run.rows:
                self._draw()
            if not run.busy:
                self._list_earlier()

    def _set_buttons(self) -> None:
        busy = self.run is not None and self.run.busy
        self.start.disabled = busy or self.preview is None
        self.halt.disabled = not (self.run is not None and self.run.state == "running")

    def _list_earlier(self) -> None:
        """Runs of the same model and task in the store; what was chosen stays chosen."""
        config = self.controls.base.model_copy(update={n: self.controls.widgets[n].value for n in ("model", "task")})
        part = f"-{Path(config.model).name}-{config.task}-seed"
        fitting = {label: path for label, path in runs(self._store).items() if part in label}
        kept = tuple(path for path in self.earlier.value if path in fitting.values())
        if list(self.earlier.options) != list(fitting.items()):
            self.earlier.options = list(fitting.items())
            self.earlier.value = kept

    def _draw(self) -> None:
        with self._lock:
            shown = self._shown()
            if not shown:
                return
            target = TARGET_FRAC * max(float(run["metric"].max()) for run in shown.values())
            roles = self.run.tuned if self.run is not None else None
            first = self.run.first_round if self.run is not None else 1
            picture = figures.curves(shown, target=target, roles=roles, first_round=first)
            self.curve.value = picture._repr_png_()
            times = figures.compare_runs(shown, target)
            self.table.value = _table(times.round(3))

    def _shown(self) -> dict[str, pd.DataFrame]:
        """The run of this dashboard first, then those that were chosen."""
        shown: dict[str, pd.DataFrame] = {}
        own = None
        if self.run is not None and self.run.rows:
            own = self.run.config.run_id
            shown[f"{own} (this run)"] = self.run.table()
        for label, path in self.earlier.options:
            if path in self.earlier.value and not (path.stem == own and path.parent.parent == self.out):
                shown[label] = records.read("rounds", path)
        return shown


COLUMNS = {
    "run": "run",
    "rounds": "rounds",
    "best_metric": "best score",
    "final_metric": "last score",
    "device_s_to_target": "device s to target",
    "wall_s_to_target": "measured s",
    "round_to_target": "rounds",
}


def _table(times: pd.DataFrame) -> str:
    target, metric = times["target"].iloc[0], times["metric_name"].iloc[0]
    shown = times[list(COLUMNS)].set_axis(list(COLUMNS.values()), axis=1)
    body = shown.to_html(index=False, border=0, na_rep="not reached", justify="left")
    return f"<style>.flux td {{white-space: nowrap}}</style><div class='flux'>target: {metric} {target:.3f}{body}</div>"


def _note(text: str, color: str) -> str:
    lines = html.escape(text).replace("\n", "<br>")
    return f'<div style="color:{color};border-left:4px solid {color};padding:4px 8px">{lines}</div>' if text else ""


def _status(run: BackgroundRun) -> str:
    last = html.escape(records.describe_round(run.rows[-1])) if run.rows else ""
    if run.state == FAILED:
        return _note(f"Failed: {run.error}", "#b00020")
    if run.state == STOPPED:
        return f"{last}<br><b>Stopped.</b> Press Run with the same settings to go on from here."
    if run.state == COMPLETE:
        return f"{last}<br><b>Complete.</b> Tables in {html.escape(str(run.out))}."
    return f"{last}<br>{run.state} ..." if run.state != IDLE else last
