"""The dashboard of ``notebooks/explore.ipynb``: turn a budget and see the plan, run it, compare it.

:class:`Dashboard` shows itself: as widgets in JupyterLab, as a picture wherever nobody can press a button (a headless
run, a saved notebook, GitHub).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from fluxlib import figures
from fluxlib.analysis import store as stored
from fluxlib.analysis.store import folders, place_of
from fluxlib.analysis.time_to_target import reach
from fluxlib.app.widgets.background import HEADLESS, BackgroundRun, going_on
from fluxlib.app.widgets.controls import Controls
from fluxlib.app.widgets.history import BROWN, RED, History, beginning, compared, note, paragraphs, status
from fluxlib.app.widgets.planning import OwnModel, PaysMap
from fluxlib.app.widgets.preview import Preview, preview
from fluxlib.config import REPO_ROOT, RunConfig
from fluxlib.devices.catalogue import Device
from fluxlib.figures import style
from fluxlib.io import ConfigError
from fluxlib.records import TableError

log = logging.getLogger(__name__)

TARGET_FRAC = 0.95
"""Target of a comparison: this share of the best score in it."""


class Dashboard:
    """Controls on the left; on the right what they mean, a run that can be watched and stopped, and earlier runs.

    A run into ``out`` that this process still computes (its page was closed, its cell was run again) is watched again.
    What is pressed or turned while something else is computed is done in its turn.

    Args:
        config: where the controls start, and everything that has no control; ConfigError: a name that no menu has.
        out: folder of the tables and checkpoints of runs that are started here.
        store: more folders of runs to compare with; None: all of :func:`fluxlib.analysis.store.folders` but trials.
    """

    def __init__(self, config: RunConfig, out: Path | str = "", store: list[Path] | None = None) -> None:
        import ipywidgets

        self.out = Path(out) if out else REPO_ROOT / "build" / "explore"
        places = [self.out, *(folders(trials=False) if store is None else store)]
        self.controls = Controls(config)
        self._thread = ThreadPoolExecutor(1, "dashboard")
        self.history = History(places, self._draw, partial(self._turn, self.controls.load), self.in_turn)
        self.map = PaysMap(partial(self.in_turn, self._turn, self.controls.turn))
        self.own_model = OwnModel(self.in_turn, self._chosen)
        self.preview: Preview | None = None
        self.run: BackgroundRun | None = None
        self._paused, self._change_waits = False, False
        layout = ipywidgets.Layout
        self.message, self.summary = ipywidgets.HTML(), ipywidgets.HTML()
        self.plan = ipywidgets.Image(format="png", layout=layout(width="100%", max_width="1000px"))
        self.curve = ipywidgets.Image(format="png", layout=layout(width="100%", max_width="900px", display="none"))
        self.progress = ipywidgets.IntProgress(min=0, max=1, layout=layout(width="100px"))
        self.status = ipywidgets.HTML(beginning(self.history.unfinished(self.out)))
        self.start = ipywidgets.Button(description="Run", button_style="primary", icon="play")
        self.halt = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self.start.layout.width = self.halt.layout.width = "92px"
        self.table = ipywidgets.HTML()
        self.view = self._arrange(ipywidgets)
        self._connect()
        if found := going_on(self.out):
            self._turn(self.controls.load, found.config)
            self._watch(found)
        self.refresh()

    def press_run(self) -> BackgroundRun:
        """Do what the button does, and wait for the end of the run; ConfigError: it cannot be begun."""
        self.in_turn(self.refresh)
        self.wait()
        if self.preview is None:
            raise ConfigError(self._problem)
        if self.run is not None and self.run.busy:
            raise ConfigError(f"{self.run.name} still runs: wait for it, or stop it")
        self.start.click()
        self.wait()
        assert self.run is not None
        self.run.join()
        self.wait()
        return self.run

    def in_turn(self, action: Callable[..., object], *arguments: Any) -> None:
        """Do ``action`` in a thread of its own when what came before is done; what goes wrong in it is said in place.

        JupyterLab and its kernel handle the messages of a page's widgets in several threads. A handler that computed
        would hold up the messages of its own thread and be overtaken by those of another.
        """

        def done() -> None:
            try:
                action(*arguments)
            except Exception as error:
                log.exception("a press or a turn failed")
                self._say(f"{type(error).__name__}: {error}")

        self._thread.submit(done)

    def wait(self) -> None:
        """Until everything that was pressed and turned has been done."""
        self._thread.submit(lambda: None).result()

    def refresh(self) -> None:
        """Read the controls and show what they mean; what cannot be is said in place, and cannot be run."""
        self.controls.follow_participants()
        try:
            self.preview, self._problem = preview(self.controls.config(), self.controls.participant), ""
        except ConfigError as error:
            self.preview, self._problem, self.summary.value = None, str(error), ""
            self._say(f"{error}\nNothing can be run until this is changed.")
        else:
            self.plan.value = self.preview.picture().png
            self.summary.value = paragraphs(self.preview.summary())
            self.map.show(self.preview.config)
            self._say("", self.preview.warning)
        # The picture of another choice would be taken for this one's.
        self.plan.layout.visibility = "hidden" if self._problem else "visible"
        self.controls.mark(self._problem)
        self._set_buttons()
        self._list_earlier()

    def picture(self) -> bytes:
        """What stands there now as one PNG: the run where there is one, the plan otherwise."""
        return bytes(self.curve.value if self.run is not None and self.curve.value else self.plan.value)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        shown: dict[str, Any] = {"text/plain": f"Dashboard of {self.controls.base.model}", "image/png": self.picture()}
        if os.environ.get(HEADLESS):
            return shown
        return self.view._repr_mimebundle_() | shown

    def _arrange(self, ipywidgets: Any) -> Any:
        layout, column = ipywidgets.Layout, ipywidgets.VBox
        buttons = ipywidgets.HBox([self.start, self.halt, self.progress])
        left = column([*self.controls.view, buttons], layout=layout(width="330px", min_width="330px"))
        title = ipywidgets.HTML("<b>Compare with earlier runs</b> of this model and task (ctrl or shift for several)")
        below = ipywidgets.HBox([self.history.take_over, self.history.note])
        running = column([self.status, self.curve, self.table, title, self.history.choice, below])
        shown = [self.plan, running, self.map.view, self.own_model.view]
        self.tabs = ipywidgets.Tab(shown, titles=["Plan", "Run and compare", "Where it pays", "Your model"])
        right = column([self.message, self.summary, self.tabs], layout=layout(flex="1 1 auto", min_width="500px"))
        return ipywidgets.HBox([left, right], layout=layout(width="100%"))

    def _connect(self) -> None:
        for widget in self.controls.widgets.values():
            widget.observe(lambda _: None if self._paused else self.in_turn(self.refresh), "value")
        self.start.on_click(lambda _: self.in_turn(self._press_run))
        # At once: the round in progress is long enough to wait for.
        self.halt.on_click(lambda _: self.run.stop() if self.run is not None else None)

    def _turn(self, change: Callable[..., None], *arguments: Any) -> None:
        """Turn several controls at once, by one of their methods."""
        self._paused = True
        try:
            change(*arguments)
        finally:
            self._paused = False
        self.refresh()

    def _chosen(self) -> tuple[RunConfig, Device]:
        """What the controls say, and the device of the participant that is shown; else ConfigError."""
        if self.preview is None:
            raise ConfigError(self._problem)
        return self.preview.config, self.preview.device

    def _press_run(self) -> None:
        if self.preview is not None and not (self.run is not None and self.run.busy):
            run = BackgroundRun(self.preview.config, self.out)
            self._watch(run)
            run.start()

    def _watch(self, run: BackgroundRun) -> None:
        """Show how a run goes, now and whenever it has got further."""
        self.run, run.on_change = run, self._changed
        self.tabs.selected_index = 1
        self.progress.max = run.config.federation.rounds
        self._changed(run)

    def _changed(self, _: BackgroundRun) -> None:
        """Called from the run's thread after each round and at its end; rounds that come faster are drawn together."""
        if not self._change_waits:
            self._change_waits = True
            self.in_turn(self._show_run)

    def _show_run(self) -> None:
        self._change_waits, run = False, self.run
        assert run is not None
        self.progress.value = int(run.rows[-1]["round"]) if run.rows else 0
        self.status.value = status(run)
        self._set_buttons()
        if run.rows:
            self._draw()
        if not run.busy:
            self._list_earlier()

    def _say(self, problem: str, warning: str = "") -> None:
        self.message.value = note(problem, RED) or note(warning, BROWN)

    def _set_buttons(self) -> None:
        self.start.disabled = self.preview is None or (self.run is not None and self.run.busy)
        self.halt.disabled = self.run is None or self.run.state != "running"

    def _list_earlier(self) -> None:
        """Runs of the same model and task in the store."""
        self.history.show(*(str(self.controls.widgets[name].value) for name in ("model", "task")))

    def _draw(self) -> None:
        shown = self._shown()
        scores = [run["metric"].max() for run in shown.values() if run["metric"].notna().any()]
        self.curve.layout.display = "" if scores else "none"
        if scores:
            target = TARGET_FRAC * float(max(scores))
            self.curve.value = figures.dashboard.curves(shown, target).png
            self.table.value = compared(reach(stored.as_one(shown), target, final_rounds=1), TARGET_FRAC)
        else:
            self.table.value = ""

    def _shown(self) -> dict[str, pd.DataFrame]:
        """The run of this dashboard first, then those that were chosen."""
        shown: dict[str, pd.DataFrame] = {}
        own = self.run.config if self.run is not None and self.run.rows else None
        if self.run is not None and own is not None:
            shown[f"this run: {style.method(own.method).title} {own.variant}"] = pd.DataFrame(self.run.rows)
        for label, file in self.history.chosen().items():
            mine = own is not None and place_of(file) == self.out and file.stem == own.run_id
            with suppress(TableError):  # it may be gone by now
                if not mine:
                    shown[label] = stored.read(file)
        return shown
