"""Earlier runs in the store: a list to choose from, in words that say what each of them is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd

from fluxlib import records
from fluxlib.analysis import store
from fluxlib.config import ConfigError, RunConfig, flatten, make_config
from fluxlib.figures import style


class History:
    """Stored runs of one model and task; those that are chosen stay chosen while the list grows.

    Args:
        places: folders of runs.
        trials: folders of trials, which are listed only when ``with_trials`` is ticked.
        in_turn: does what a press or a choice asks for; at once where nothing else is given.

    Attributes:
        choice: the list itself, newest first; every stored copy of a run is an entry of its own.
        take_over: the button beside it; ``on_take_over`` gets the configuration of the run that is chosen.
    """

    def __init__(
        self,
        places: list[Path],
        on_choice: Callable[[], None],
        on_take_over: Callable[[RunConfig], None],
        trials: Sequence[Path] = (),
        in_turn: Callable[..., object] = lambda action, *arguments: action(*arguments),
    ) -> None:
        import ipywidgets

        self._places, self._trials, self._on_take_over = places, list(trials), on_take_over
        self._shown: tuple[str, str] | None = None
        self.choice = ipywidgets.SelectMultiple(rows=6, layout=ipywidgets.Layout(width="100%", max_width="900px"))
        self.take_over = ipywidgets.Button(
            description="Use its settings", icon="sliders", disabled=True, layout=ipywidgets.Layout(width="160px"),
            tooltip="turn the controls to what the chosen run had; an unfinished run goes on with Run",
        )  # fmt: skip
        self.with_trials = ipywidgets.Checkbox(
            description="trials of the search too", indent=False, layout=ipywidgets.Layout(width="200px")
        )
        self.with_trials.layout.display = "" if self._trials else "none"
        self.note = ipywidgets.HTML()
        self.choice.observe(lambda _: in_turn(self._chosen, on_choice), "value")
        self.with_trials.observe(lambda _: in_turn(self.show, *self._shown) if self._shown else None, "value")
        self.take_over.on_click(lambda _: in_turn(self._press))

    def show(self, model: str, task: str) -> None:
        """Show the runs of ``model`` and ``task``, the newest first."""
        self._shown = (model, task)
        part = f"-{Path(model).name}-{task}-seed"
        places = [*self._places, *(self._trials if self.with_trials.value else [])]
        found = [file for file in store.runs(places).values() if part in f"-{store.run_id(file)}"]
        found.sort(key=store.modified, reverse=True)
        options = list(zip(store.tell_apart([describe(file) for file in found], found), found, strict=True))
        if list(self.choice.options) != options:
            # A run that goes on replaces its table: what was chosen is the run, not the file.
            kept = {_identity(file) for file in self.choice.value}
            self.choice.options = options
            self.choice.value = tuple(file for file in found if _identity(file) in kept)

    def unfinished(self, place: Path) -> list[str]:
        """Names of the runs in ``place`` that were interrupted, of any model and task."""
        return [store.run_id(file) for label, file in store.runs([place]).items() if label.endswith("unfinished)")]

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


def table(file: Path, kind: str = "rounds") -> pd.DataFrame | None:
    """A table of a stored run; ``None`` where it has none that can be read."""
    try:
        return store.read(file, kind)
    except records.TableError:
        return None


def describe(file: Path) -> str:
    """One line on a stored run: name, rounds, last score, where it lies."""
    return _describe(file, store.modified(file))


@lru_cache(maxsize=512)
def _describe(file: Path, modified: float) -> str:
    rounds = table(file)
    if rounds is None or rounds.empty:
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
        return store.run_id(file)
    title = style.method(str(found["method"])).title
    return " ".join(part for part in (title, str(found.get("variant", "")), f"seed {found['seed']}") if part)


def _identity(file: Path) -> tuple[Path, str]:
    """The run, wherever its newest table lies."""
    return store.place_of(file), store.run_id(file)
