"""What a configuration's fields must be before they are compared or looked up."""

from __future__ import annotations

from typing import Any

from transformers.activations import ACT2FN


def check_fields(kind: str, config: Any, *whole: str) -> None:
    """Raise ValueError unless the fields ``whole`` are whole numbers and ``hidden_act`` is one that is known.

    Args:
        kind: of the model, for the message.
        config: a configuration that is being made.
        whole: names of fields.
    """
    for name in whole:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{kind}: {name} must be a whole number, got {value!r}")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"{kind}: hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {config.hidden_act!r}")
