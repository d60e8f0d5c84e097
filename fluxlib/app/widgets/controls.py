"""Sliders and menus, and the configuration that they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fluxlib import methods, models, tasks
from fluxlib.analysis.wording import REAL_SHAPES, methods_in_order
from fluxlib.analysis.wording import title as method_title
from fluxlib.config import GROUPS, RunConfig
from fluxlib.devices import catalogue
from fluxlib.io import ConfigError


class Controls:
    """The left side of the dashboard: everything that a reader may turn.

    Attributes:
        widgets: by the full name of the setting; ``participant`` is the one whose plan is shown.
        view: the widgets in the order in which a reader needs them, under four headings.
        base: what is not on the dashboard stays as it is here; ConfigError: a name that its menu does not have.
    """

    def __init__(self, base: RunConfig) -> None:
        import ipywidgets

        self.base, start = base, base.settings()
        self.widgets: dict[str, Any] = {}
        self.view: list[Any] = []

        def heading(text: str) -> None:
            self.view.append(ipywidgets.HTML(f"<b>{text}</b>"))

        def show(name: str, label: str, widget: Any, tooltip: str = "") -> None:
            group, _, own = name.rpartition(".")
            fields = (GROUPS[group] if group else RunConfig).model_fields
            widget.description, widget.tooltip = label, tooltip or fields[own].description
            widget.style.description_width, widget.layout.width = "92px", "300px"
            self.widgets[name] = widget
            self.view.append(widget)

        def menu(name: str, label: str, options: Mapping[str, str] | Sequence[str]) -> None:
            titles = options if isinstance(options, Mapping) else {value: value for value in options}
            if start[name] not in titles:
                raise ConfigError(f"{name} is {start[name]!r}, allowed are {', '.join(titles)}")
            pairs = [(title, value) for value, title in titles.items()]
            show(name, label, ipywidgets.Dropdown(options=pairs, value=start[name]))

        def count(name: str, label: str, most: int) -> None:
            most = max(most, start[name])
            show(name, label, ipywidgets.IntSlider(start[name], 1, most, continuous_update=False))

        def share(name: str, label: str) -> None:
            show(name, label, ipywidgets.FloatSlider(start[name], min=0, max=1, step=0.05, continuous_update=False))

        fleets = {name: f"fleet: {name} ({len(kinds)} kinds)" if len(kinds) > 1 else f"fleet: {name}"
                  for name, kinds in catalogue.FLEETS.items()}  # fmt: skip
        fleets |= {name: device.title for name, device in catalogue.DEVICES.items()}
        shapes = {name: name for name in ("self", *REAL_SHAPES.values(), base.clock.model)}
        heading("What")
        menu("model", "model", list(dict.fromkeys((*models.known()[:2], base.model))))
        menu("task", "task", tasks.TASKS)
        menu("method", "method", {name: method_title(name) for name in methods_in_order(methods.METHODS)})
        menu("adapter.kind", "tuned are", {"none": "whole experts", "lora": "low-rank products (LoRA)"})
        count("adapter.rank", "rank", 64)
        heading("Who and where")
        count("federation.participants", "participants", 16)
        shown = ipywidgets.IntSlider(0, 0, base.federation.participants - 1, continuous_update=False)
        show("participant", "shown: no.", shown, "the participant whose data and plan are shown")
        menu("clock.fleet", "devices", fleets)
        menu("clock.link", "link", {name: link.title for name, link in catalogue.LINKS.items()})
        menu("clock.model", "sized as", shapes | {"self": "the mini model itself"})
        heading("Budgets, as shares of all experts")
        share("budget.tune_frac", "tuned")
        share("budget.merge_frac", "merged")
        menu("merging.budgets", "per layer", ["adaptive", "uniform", "single", "joint"])
        heading("How long")
        count("federation.rounds", "rounds", 40)
        count("training.local_steps", "local steps", 8)

    @property
    def participant(self) -> int:
        """Whose plan is shown."""
        return int(self.widgets["participant"].value)

    def config(self) -> RunConfig:
        """The configuration that the widgets say; ConfigError: a combination that cannot be.

        Its ``variant`` names what was turned, so that two settings never share a place in the store.
        """
        chosen = {name: widget.value for name, widget in self.widgets.items() if name != "participant"}
        plain = self.base.updated(chosen | {"variant": ""})
        tuned, merged = (round(100 * share) for share in (plain.budget.tune_frac, plain.budget.merge_frac))
        return plain.updated({"variant": f"t{tuned}-m{merged}-{plain.numbers[:4]}"})

    def turn(self, settings: Mapping[str, Any]) -> None:
        """Turn some of them, by the full names of their settings; a slider goes as far as it has to."""
        for name, value in settings.items():
            widget = self.widgets[name]
            if hasattr(widget, "max"):
                widget.max = max(widget.max, value)
            widget.value = value

    def load(self, config: RunConfig) -> None:
        """Turn everything to what ``config`` says; what has no control is taken over too. Else ConfigError."""
        import traitlets

        before = {name: widget.value for name, widget in self.widgets.items()}
        wanted = {name: value for name, value in config.settings().items() if name in self.widgets}
        try:
            self.turn(wanted)
        except traitlets.TraitError:
            name = next(name for name in wanted if self.widgets[name].value != wanted[name])
            self.turn(before)
            raise ConfigError(f"{name} is {wanted[name]!r}, which the dashboard cannot show") from None
        self.base = config

    def mark(self, message: str) -> None:
        """Frame the controls that ``message`` names."""
        for name, widget in self.widgets.items():
            # A name without a group is also a word: what is meant is the setting, not a model, a method, a participant.
            mention = rf"\b{re.escape(name)}\b" if "." in name else rf"(?<![\w.]){name}(?= is |:)"
            widget.layout.border = "2px solid #b00020" if re.search(mention, message) else "none"

    def follow_participants(self) -> None:
        """Keep the shown participant within their number."""
        most = self.widgets["federation.participants"].value - 1
        self.widgets["participant"].value = min(self.participant, most)
        self.widgets["participant"].max = most
