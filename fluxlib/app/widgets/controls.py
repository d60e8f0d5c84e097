"""Sliders and menus, and the configuration that they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fluxlib import methods, models, tasks
from fluxlib.analysis.wording import methods_in_order
from fluxlib.analysis.wording import title as method_title
from fluxlib.config import RunConfig
from fluxlib.devices import catalogue
from fluxlib.io import ConfigError

CLOCK_MODELS = ("self", "llama-moe-3.5b", "deepseek-moe-16b")
"""Whose shapes memory and time are predicted for."""

WIDTH = "300px"


class Controls:
    """The left side of the dashboard: everything that a reader may turn.

    Attributes:
        widgets: by the full name of the setting; ``participant`` is the one whose plan is shown.
        base: what is not on the dashboard stays as it is here.

    Raises:
        ConfigError: a name in ``base`` that its menu does not have.
    """

    def __init__(self, base: RunConfig) -> None:
        import ipywidgets

        self.base, start = base, base.settings()

        def menu(name: str, options: Mapping[str, str] | Sequence[str]) -> Any:
            titles = options if isinstance(options, Mapping) else {value: value for value in options}
            if start[name] not in titles:
                raise ConfigError(f"{name} is {start[name]!r}, allowed are {', '.join(titles)}")
            return ipywidgets.Dropdown(options=[(title, value) for value, title in titles.items()], value=start[name])

        def count(name: str, most: int) -> Any:
            return ipywidgets.IntSlider(value=start[name], min=1, max=max(most, start[name]), continuous_update=False)

        def share(name: str) -> Any:
            return ipywidgets.FloatSlider(
                value=start[name], min=0.0, max=1.0, step=0.05, readout_format=".2f", continuous_update=False
            )

        fleets = {name: f"fleet: {name} ({len(kinds)} kinds)" if len(kinds) > 1 else f"fleet: {name}"
                  for name, kinds in catalogue.FLEETS.items()}  # fmt: skip
        fleets |= {name: device.title for name, device in catalogue.DEVICES.items()}
        shapes = {name: name for name in (*CLOCK_MODELS, base.clock.model)} | {"self": "the mini model itself"}
        self.widgets: dict[str, Any] = {
            "model": menu("model", [*dict.fromkeys((*models.known()[:2], base.model))]),
            "task": menu("task", list(tasks.TASKS)),
            "method": menu("method", {name: method_title(name) for name in methods_in_order(methods.METHODS)}),
            "adapter.kind": menu("adapter.kind", {"none": "whole experts", "lora": "low-rank products (LoRA)"}),
            "adapter.rank": count("adapter.rank", 64),
            "clock.fleet": menu("clock.fleet", fleets),
            "clock.link": menu("clock.link", {name: link.title for name, link in catalogue.LINKS.items()}),
            "clock.model": menu("clock.model", shapes),
            "budget.tune_frac": share("budget.tune_frac"),
            "budget.merge_frac": share("budget.merge_frac"),
            "federation.participants": count("federation.participants", 16),
            "participant": ipywidgets.IntSlider(
                value=0, min=0, max=base.federation.participants - 1, continuous_update=False
            ),
            "federation.rounds": count("federation.rounds", 40),
            "training.local_steps": count("training.local_steps", 8),
            "merging.budgets": menu("merging.budgets", ["adaptive", "uniform", "single", "joint"]),
        }
        for name, widget in self.widgets.items():
            widget.description, widget.tooltip = CONTROLS[name]
            widget.style.description_width = "92px"
            widget.layout.width = WIDTH

    def view(self) -> list[Any]:
        """The widgets in the order in which a reader needs them, under four headings."""
        import ipywidgets

        shown = []
        for title, names in HEADINGS.items():
            shown += [ipywidgets.HTML(f"<b>{title}</b>"), *(self.widgets[name] for name in names)]
        return shown

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

    def turn(self, settings: Mapping[str, str]) -> None:
        """Turn some of the menus, by the full names of their settings."""
        for name, value in settings.items():
            self.widgets[name].value = value

    def load(self, config: RunConfig) -> None:
        """Turn everything to what ``config`` says; what has no control is taken over too. Else ConfigError."""
        import traitlets

        before = {name: widget.value for name, widget in self.widgets.items()}
        wanted = {name: value for name, value in config.settings().items() if name in self.widgets}
        try:
            for name, value in wanted.items():
                _show(self.widgets[name], value)
        except traitlets.TraitError:
            for other, value in before.items():
                self.widgets[other].value = value
            raise ConfigError(f"{name} is {wanted[name]!r}, which the dashboard cannot show") from None
        self.base = config
        self.follow_participants()

    def mark(self, message: str) -> None:
        """Frame the controls that ``message`` names."""
        for name, widget in self.widgets.items():
            named = re.search(_mention(name), message) is not None
            widget.layout.border = "2px solid #b00020" if named else "none"

    def follow_participants(self) -> None:
        """Keep the shown participant within their number."""
        most = self.widgets["federation.participants"].value - 1
        self.widgets["participant"].value = min(self.participant, most)
        self.widgets["participant"].max = most


def _show(widget: Any, value: Any) -> None:
    """Give ``widget`` a value, and a slider the range that it takes."""
    if hasattr(widget, "max") and isinstance(value, int) and value > widget.max:
        widget.max = value
    widget.value = value


HEADINGS = {
    "What": ("model", "task", "method", "adapter.kind", "adapter.rank"),
    "Who and where": ("federation.participants", "participant", "clock.fleet", "clock.link", "clock.model"),
    "Budgets, as shares of all experts": ("budget.tune_frac", "budget.merge_frac", "merging.budgets"),
    "How long": ("federation.rounds", "training.local_steps"),
}
CONTROLS = {
    "model": ("model", "base model that is fine-tuned"),
    "task": ("task", "generated task; its samples are dealt to the participants"),
    "method": ("method", "what a participant does in a round"),
    "adapter.kind": ("tuned are", "what of a tuned expert learns: all of it, or a low-rank product on top of it"),
    "adapter.rank": ("rank", "of the low-rank products; it counts with LoRA only"),
    "clock.fleet": ("devices", "devices of the participants, on the device clock"),
    "clock.link": ("link", "connection of each participant to the server, on the device clock"),
    "clock.model": ("sized as", "model whose shapes memory and time are predicted for"),
    "budget.tune_frac": ("tuned", "B_tune: share of all experts that fits with gradients"),
    "budget.merge_frac": ("merged", "B_non: share of all experts that fits beside them, merged and frozen"),
    "federation.participants": ("participants", "number of participants"),
    "participant": ("shown: no.", "the participant whose data and plan are shown"),
    "federation.rounds": ("rounds", "rounds of the run"),
    "training.local_steps": ("local steps", "optimizer steps of a participant in a round"),
    "merging.budgets": ("per layer", "how merged slots are spread over layers (eq. 1)"),
}
"""What stands beside a control, and its help."""


def _mention(name: str) -> str:
    """Where a message speaks of the setting ``name``, not of a model, a method or a participant."""
    return rf"\b{re.escape(name)}\b" if "." in name else rf"(?<![\w.]){name}(?= is |:)"
