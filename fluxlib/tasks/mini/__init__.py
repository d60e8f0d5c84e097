"""Generated tasks in the public schemas of Dolly, GSM8K, MMLU and PIQA, about one small invented world.

Every label (category, skill, subject, kind) has things of its own, with names found nowhere else, and facts about
them. A base model is pre-trained on all formats and names but on only a part of the facts
(:func:`fluxlib.tasks.mini.world.is_known`): fine-tuning a task means learning the rest, which lies with the
participants who hold that label. That is what makes experts specialise and participants differ.
"""

from fluxlib.tasks.mini.generate import DEFAULT_SIZE, FAMILIES, rows
from fluxlib.tasks.mini.world import vocabulary

__all__ = ["DEFAULT_SIZE", "FAMILIES", "rows", "vocabulary"]
