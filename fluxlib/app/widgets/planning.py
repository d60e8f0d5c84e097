"""Where FLUX pays, as a map that sets device and link, and what a model of one's own would need.

Both rest on the tracked runs, and train nothing: those supply what is learned, the shapes of a model time and memory.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from fluxlib.analysis import store, where
from fluxlib.analysis.wording import REAL_SHAPES, percent, title
from fluxlib.app import pipeline
from fluxlib.app.widgets.history import RED, STYLE, note, paragraphs
from fluxlib.config import REPO_ROOT, RunConfig, figures_dir, results_dir
from fluxlib.devices import catalogue, clock, memory
from fluxlib.figures import overhead, style
from fluxlib.records import seconds

PROFILE, STUDY = "full", "06_scale_and_overhead"
"""Whose runs they are, and the study that says which of them the map is made of."""
LEGEND = (
    "{ours} at the target, over the best baseline that fits: purple, above 1, is sooner; orange is later. The name is"
    " the baseline's. ≥: it never arrives, ≤: {ours} does not, –: neither, or none fits. Tracked runs of {model}, with"
    " the shapes of {shapes}. A press sets device, link and sizes."
)


class PaysMap:
    """The map of where FLUX pays, or FLUX+ where that is the method: a button for every device and link."""

    def __init__(self, on_choice: Callable[[dict[str, str]], None]) -> None:
        import ipywidgets

        self._on_choice, self._shown = on_choice, ("", "")
        self.buttons: dict[tuple[str, str], Any] = {}
        """By device and link."""
        self.legend, self.grid = ipywidgets.HTML(), ipywidgets.GridBox()
        self.view = ipywidgets.VBox([self.legend, self.grid])

    def show(self, config: RunConfig) -> None:
        """The map for the model and method of ``config``; its device and link are framed."""
        kind = Path(config.model).name, "flux_plus" if config.method == "flux_plus" else "flux"
        if kind != self._shown:
            self._shown = kind
            self._fill(*kind)
        for place, button in self.buttons.items():
            button.layout.border = "3px solid #009E73" if place == (config.clock.fleet, config.clock.link) else "none"

    def _fill(self, model: str, ours: str) -> None:
        import ipywidgets

        file, self.buttons, self.grid.children = figures_dir(PROFILE) / f"where_{ours}_pays-{model}.csv", {}, ()
        if not file.is_file():
            self.legend.value = f"There is no map of {html.escape(model)}: the tracked runs are of the embedded bases."
            return
        shapes = REAL_SHAPES[model]
        self.legend.value = paragraphs([LEGEND.format(ours=title(ours), model=model, shapes=shapes)])
        cells = where.over_tasks(pd.read_csv(file, keep_default_na=False, na_values={"factor": [""]}))
        links = list(cells["link"].unique())
        shown = [ipywidgets.HTML(), *(ipywidgets.HTML(f"<b>{catalogue.LINKS[link].title}</b>") for link in links)]
        for cell in cells.to_dict("records"):
            device, link = cell["device"], cell["link"]
            if link == links[0]:
                shown.append(ipywidgets.HTML(f"<b>{overhead.memory_of(device)}</b>"))
            button = self.buttons[device, link] = _cell(cell)
            button.tooltip = f"{catalogue.DEVICES[device].title}, {catalogue.LINKS[link].title}"
            settings = {"clock.fleet": device, "clock.link": link, "clock.model": shapes}
            button.on_click(lambda _, settings=settings: self._on_choice(settings))
            shown.append(button)
        self.grid.layout.grid_template_columns = f"190px repeat({len(links)}, 104px)"
        self.grid.children = shown


def _cell(cell: Mapping[Any, Any]) -> Any:
    """A button in the colour of a factor, or white where there is none."""
    import ipywidgets

    known = cell["factor"] == cell["factor"]
    red, green, blue, _ = mpl.colormaps[style.DIVERGING](overhead.FACTORS(cell["factor"])) if known else (1, 1, 1, 1)
    button = ipywidgets.Button(
        description=f"{cell['sign']}{cell['factor']:.2g} {title(cell['baseline'])}" if known else "–",
        layout=ipywidgets.Layout(width="100px", height="34px"),
    )
    button.style.button_color = mpl.colors.to_hex((red, green, blue))
    button.style.text_color = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
    return button


class OwnModel:
    """A name is typed, and what that model would need on the device and link of the controls (``chosen``) is said."""

    def __init__(
        self, in_turn: Callable[..., object], chosen: Callable[[], tuple[RunConfig, catalogue.Device]]
    ) -> None:
        import ipywidgets

        self._chosen = chosen
        self.name = ipywidgets.Text(
            description="model", continuous_update=False, layout=ipywidgets.Layout(width="560px"),
            placeholder="a known name, a folder, a config.json, or owner/name of the hub",
        )  # fmt: skip
        self.ask = ipywidgets.Button(description="What would it need?", layout=ipywidgets.Layout(width="170px"))
        self.answer = ipywidgets.HTML()
        self.view = ipywidgets.VBox([ipywidgets.HBox([self.name, self.ask]), self.answer])
        self.ask.on_click(lambda _: in_turn(self._say))

    def _say(self) -> None:
        self.answer.value = "Counting ..."
        try:
            self.answer.value = needs(*self._chosen(), self.name.value.strip())
        except (OSError, ValueError) as error:
            self.answer.value = note(str(error), RED)


def needs(config: RunConfig, device: catalogue.Device, name: str) -> str:
    """What the model ``name`` would need on a device, by method, who is soonest at the target, and whether FLUX pays.

    ``config`` gives steps, adapters, the link, and the base whose tracked runs say what is learned. OSError or
    ValueError: an unknown name, or a model without experts.
    """
    shapes, link, batch = clock.shapes(name), catalogue.link(config.clock.link), config.training.batch_size
    raced = tracked_races(config.model, name, device.name, config.clock.link)
    rows = [
        {
            "method": title(method),
            f"on {device.title}, {batch} samples a step": _what_fits(config, method, name, device),
            "s to the target": _time(raced, method, "float32"),
            "with 8 bits on the link": _time(raced, method, "int8"),
        }
        for method in memory.METHODS
    ]
    told = [
        f"{name}: {shapes.num_experts} experts of {shapes.expert_parameters / 1e6:.3g} million parameters,"
        f" {shapes.parameters / 1e9:.3g} billion in all; {link.title}.",
        *(_pays(raced, ours) for ours in where.OURS if len(raced)),
        "Seconds are the device clock's, where a stored budget fits. What is learned, in how many rounds, is that of"
        f" the tracked runs of {Path(config.model).name}: whole experts, {raced['batch'].iloc[0]} samples a step."
        if len(raced)
        else f"No tracked runs of {config.model} say who is soonest.",
    ]
    table = pd.DataFrame(rows).to_html(index=False, border=0)
    return f"{STYLE}<div class='flux'>{table}</div>{paragraphs(told)}"


def _what_fits(config: RunConfig, method: str, name: str, device: catalogue.Device) -> str:
    """Shares of a model's experts that a method may tune and merge on a device, or why it does not fit."""
    try:
        asked = config.updated({"method": method, "clock.model": name})
        tuned, merged = memory.share_that_fits(asked, int(device.memory_bytes))
    except ValueError as error:
        return f"does not fit: {error}"
    if method in ("fmd", "fmq"):
        return "fits, all experts tuned, offloaded where they must"
    return f"fits, {percent(tuned)} of the experts tuned" + f", {percent(merged)} merged" * bool(merged)


def _time(raced: pd.DataFrame, method: str, bits: str) -> str:
    """Seconds to the target of a method's fastest runs, mean over seeds; ≥ where one of them does not arrive."""
    rows = raced[(raced["method"] == method) & (raced["uplink"] == bits)] if len(raced) else raced
    if rows.empty:
        return "–"
    rows = rows.assign(missed=rows["device_s_to_target"].isna()).sort_values(["missed", "device_s_at_least"])
    best = rows.groupby("seed").first()
    return "≥" * bool(best["missed"].any()) + seconds(best["device_s_at_least"].mean())


def _pays(raced: pd.DataFrame, ours: str) -> str:
    """Whether FLUX, or FLUX+ against baselines with the same help on the link, is sooner than the best that fits."""
    kept = raced if ours == "flux_plus" else raced[raced["uplink"] != "int8"]
    cell = where.over_tasks(where.duels(kept, ours)).iloc[0] if len(kept) else None
    if cell is None or cell["factor"] != cell["factor"]:
        return f"{title(ours)} cannot be compared: it does not fit, or does not arrive, or no baseline does."
    verb = "pays" if cell["factor"] > 1 else "does not pay"
    sign = {where.LATER: "at least ", where.NEVER: "at most "}.get(cell["sign"], "")
    return (
        f"{title(ours)} {verb}: at the target {sign}{cell['factor']:.2g} times as soon as the best baseline that fits,"
        f" {title(cell['baseline'])}."
    )


@lru_cache(maxsize=16)
def tracked_races(base: str, name: str, device: str, link: str) -> pd.DataFrame:
    """:func:`fluxlib.analysis.where.races` of the tracked runs of ``base``, at the shapes of the model ``name``.

    With ``uplink``, the type that travelled, and ``batch``, samples of a step; empty where ``base`` has no such runs.
    """
    profile, folder = pipeline.load(REPO_ROOT / "config" / f"{PROFILE}.yaml"), results_dir(PROFILE)
    variants = [*profile.studies[STUDY]["map_runs"], *profile.studies[STUDY]["plus_runs"]]
    ids = pipeline.runs_read(profile, Path(base).name, variants)
    files = [file for run in ids if (file := folder / "rounds" / f"{run}.parquet").is_file()]
    if not files:
        return pd.DataFrame()
    runs = store.configs(folder, [file.stem for file in files])
    rounds, participants = (
        pd.concat([store.read(file, table) for file in files]) for table in ("rounds", "participants")
    )
    sized = {run: config.updated({"clock.model": name}) for run, config in runs.items()}
    raced = where.races(rounds, participants, sized, [device], [link])
    own = raced["run_id"].map(runs)
    return raced.assign(uplink=[run.wire.uplink for run in own], batch=[run.training.batch_size for run in own])
