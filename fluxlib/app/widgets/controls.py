"""Sliders and menus, and the configuration that they stand for."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from fluxlib import methods, models, tasks
from fluxlib.config import ConfigError, RunConfig, make_config
from fluxlib.devices import catalogue
from fluxlib.figures import style

CLOCK_MODELS = ("self", "llama-moe-3.5b", "deepseek-moe-16b")
"""Whose shapes memory and time are predicted for."""

WIDTH = "300px"


class Controls:
    """The left side of the dashboard: everything that a reader may turn.

    Attributes:
        widgets: by the name of the parameter; ``participant`` is the one whose plan is shown.
        base: what is not on the dashboard stays as it is here.

    Raises:
        ConfigError: a name in ``base`` that its menu does not have.
    """

    def __init__(self, base: RunConfig) -> None:
        import ipywidgets

        self.base = base
        slide = ipywidgets.FloatSlider

        def menu(name: str, options: list[Any]) -> Any:
            allowed = [option[1] if isinstance(option, tuple) else option for option in options]
            if (value := getattr(base, name)) not in allowed:
                raise ConfigError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")
            return ipywidgets.Dropdown(options=options, value=value)

        def count(name: str, most: int) -> Any:
            value = getattr(base, name)
            return ipywidgets.IntSlider(value=value, min=1, max=max(most, value), continuous_update=False)

        fleets = [(f"fleet: {name} ({len(kinds)} kinds)" if len(kinds) > 1 else f"fleet: {name}", name)
                  for name, kinds in catalogue.FLEETS.items()]  # fmt: skip
        fleets += [(device.title, name) for name, device in catalogue.DEVICES.items()]
        links = [(link.title, name) for name, link in catalogue.LINKS.items()]
        shown = list(dict.fromkeys((*CLOCK_MODELS, base.clock.model)))
        shapes = [("the mini model itself" if name == "self" else name, name) for name in shown]
        quarter = {"min": 0.0, "max": 1.0, "step": 0.05, "readout_format": ".2f", "continuous_update": False}
        self.widgets: dict[str, Any] = {
            "model": menu("model", list(dict.fromkeys((*models.known()[:2], base.model)))),
            "task": menu("task", list(tasks.TASKS)),
            "method": menu("method", _methods()),
            "fleet": menu("fleet", fleets),
            "link": menu("link", links),
            "clock_model": menu("clock_model", shapes),
            "tune_fraction": slide(value=base.budget.tune_frac, **quarter),
            "merge_fraction": slide(value=base.budget.merge_frac, **quarter),
            "participants": count("participants", 16),
            "participant": ipywidgets.IntSlider(
                value=0, min=0, max=base.federation.participants - 1, continuous_update=False
            ),
            "rounds": count("rounds", 40),
            "local_steps": count("local_steps", 8),
            "layer_budget": menu("layer_budget", ["adaptive", "uniform", "single", "joint"]),
        }
        for name, widget in self.widgets.items():
            widget.description = LABELS[name]
            widget.style.description_width = "92px"
            widget.layout.width = WIDTH
            widget.tooltip = HELP[name]

    def view(self) -> list[Any]:
        """The widgets in the order in which a reader needs them, under four headings."""
        import ipywidgets

        def heading(text: str) -> Any:
            return ipywidgets.HTML(f"<b>{text}</b>")

        groups = {
            "What": ("model", "task", "method"),
            "Who and where": ("participants", "participant", "fleet", "link", "clock_model"),
            "Budgets, as shares of all experts": ("tune_fraction", "merge_fraction", "layer_budget"),
            "How long": ("rounds", "local_steps"),
        }
        return [item for title, names in groups.items()
                for item in (heading(title), *(self.widgets[name] for name in names))]  # fmt: skip

    @property
    def participant(self) -> int:
        """Whose plan is shown."""
        return int(self.widgets["participant"].value)

    def config(self) -> RunConfig:
        """The configuration that the widgets say.

        Its ``variant`` names what was turned, so that two settings never share a place in the store.

        Raises:
            ConfigError: a combination that cannot be.
        """
        chosen = {name: widget.value for name, widget in self.widgets.items() if name != "participant"}
        return make_config(self.base.model_dump() | chosen | {"variant": self._variant(chosen)})

    def load(self, config: RunConfig) -> None:
        """Turn everything to what ``config`` says; what has no control is taken over from it too.

        Raises:
            ConfigError: a value that its control does not have, such as more rounds than the slider goes to.
        """
        import traitlets

        before = {name: widget.value for name, widget in self.widgets.items()}
        try:
            for name, widget in self.widgets.items():
                if name != "participant":
                    _show(widget, getattr(config, name))
        except traitlets.TraitError:
            for other, value in before.items():
                self.widgets[other].value = value
            message = f"{name} is {getattr(config, name)!r}, which the dashboard cannot show"
            raise ConfigError(message) from None
        self.base = config
        self.follow_participants()

    def mark(self, message: str) -> None:
        """Frame the controls that ``message`` names."""
        for name, widget in self.widgets.items():
            named = re.search(_mention(name), message) is not None
            widget.layout.border = "2px solid #b00020" if named else "none"

    def follow_participants(self) -> None:
        """Keep the shown participant within their number."""
        most = self.widgets["participants"].value - 1
        self.widgets["participant"].value = min(self.participant, most)
        self.widgets["participant"].max = most

    def _variant(self, chosen: dict[str, Any]) -> str:
        named = ("model", "task", "method", "tune_fraction", "merge_fraction")
        rest = {**self.base.model_dump(), **chosen}
        rest = {name: value for name, value in sorted(rest.items()) if name not in (*named, "variant", "seed")}
        digest = hashlib.sha256(repr(rest).encode()).hexdigest()[:4]
        return f"t{round(100 * chosen['tune_fraction'])}-m{round(100 * chosen['merge_fraction'])}-{digest}"


def _show(widget: Any, value: Any) -> None:
    """Give ``widget`` a value, and a slider the range that it takes."""
    if hasattr(widget, "max") and isinstance(value, int) and value > widget.max:
        widget.max = value
    widget.value = value


def _methods() -> list[tuple[str, str]]:
    return [(style.method(name).title, name) for name in style.order(methods.METHODS)]


LABELS = {
    "model": "model",
    "task": "task",
    "method": "method",
    "fleet": "devices",
    "link": "link",
    "clock_model": "sized as",
    "tune_fraction": "tuned",
    "merge_fraction": "merged",
    "participants": "participants",
    "participant": "shown: no.",
    "rounds": "rounds",
    "local_steps": "local steps",
    "layer_budget": "per layer",
}
HELP = {
    "model": "base model that is fine-tuned",
    "task": "generated task; its samples are dealt to the participants",
    "method": "what a participant does in a round",
    "fleet": "devices of the participants, on the device clock",
    "link": "connection of each participant to the server, on the device clock",
    "clock_model": "model whose shapes memory and time are predicted for",
    "tune_fraction": "B_tune: share of all experts that fits with gradients",
    "merge_fraction": "B_non: share of all experts that fits beside them, merged and frozen",
    "participants": "number of participants",
    "participant": "the participant whose data and plan are shown",
    "rounds": "rounds of the run",
    "local_steps": "optimizer steps of a participant in a round",
    "layer_budget": "how merged slots are spread over layers (eq. 1)",
}


def with_labels(message: str) -> str:
    """``message`` with the label of a control in front of each parameter's name."""
    for name, label in LABELS.items():
        if label != name:
            message = re.sub(_mention(name), f"{label} ({name})", message)
    return message


def _mention(name: str) -> str:
    """Where a message speaks of the parameter ``name``, not of a model, a method or a participant."""
    return rf"\b{name}\b(?! \()" if "_" in name else rf"\b{name}(?= is |:)"
